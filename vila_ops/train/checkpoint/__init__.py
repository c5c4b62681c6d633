"""Resume checkpoints: fp32 parameters and moments by name, in safetensors, independent of the world size.

    RESUME/step-000050/rank-00000-of-00002.safetensors   one file per rank, with that rank's share of the names
    RESUME/step-000050/manifest.json                     written last: sizes, sha256, the curve so far

RESUME is `resume/<address>` of the store. The training loop calls `checkpointer`; `rank_file` makes the bytes of one
rank's file, `storage` writes to disk or S3, and `ranks` makes the ranks agree. This module imports nothing, so that the
task can remove RESUME without importing torch.
"""
