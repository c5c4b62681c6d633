"""The benchmarks, one file each: items and a generator in, metrics with intervals out."""
