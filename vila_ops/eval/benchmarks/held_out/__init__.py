"""Benchmarks of ours on held-out objects of a prepared mixture."""
