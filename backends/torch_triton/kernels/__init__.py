"""Triton kernels for decode steps: per file one idea, as kernel, launcher and eager PyTorch twin."""
