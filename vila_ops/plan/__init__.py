"""What a run will take, before a GPU is used: tokens, FLOPs, memory, hours, storage, money."""
