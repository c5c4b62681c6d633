"""Resume checkpoints: fp32 parameters and moments by name, in safetensors, free of any world size.

    RESUME/step-000050/rank-00000-of-00002.safetensors   each rank writes its share of the names
    RESUME/step-000050/manifest.json                     last: sizes, sha256, the curve so far

RESUME is the store's `resume/<address>`. `saver` is what the loop calls; `share` is the bytes of a file, `shelves` the
disk and S3, `ranks` how ranks agree. Nothing is imported here: the task removes RESUME without torch.
"""
