"""Where the kernels under test run: see conftest."""

import os

import torch

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


def seeded(seed: int) -> torch.Generator:
    """Random numbers, of one sequence on each kind of device."""
    return torch.Generator(DEVICE).manual_seed(seed)
