"""The model on a GPU: FP8 or BF16 weights, Triton kernels, decode steps as graphs that the host only starts."""
