"""Prefect flows: when a task runs, and when it is retried. The work is in vila_ops."""
