"""Estimates for a run before it uses a GPU: tokens, FLOPs, memory, hours, storage, cost."""
