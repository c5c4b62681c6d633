"""Prefect flows: when and again; the work is in vila_ops."""
