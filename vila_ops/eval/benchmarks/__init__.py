"""Benchmarks, one module each; see `eval.benchmark` for the protocol."""
