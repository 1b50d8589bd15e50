"""A process of `test_symmetric`: prints as JSON whether sums go over memory shared with the other process."""

import json

import torch
import torch.distributed as dist

from deepspan.backends.torch_triton.gpu.linear import Form, Norm
from deepspan.backends.torch_triton.gpu.symmetric import connect
from deepspan.backends.torch_triton.parallel import ordered_sum
from deepspan.backends.torch_triton.rank import join
from tests.gpu_path.opening import run_of
from tests.kernels.device import DEVICE
from tests.kernels.interpreter import compute_bf16_as_on_a_gpu

SHAPES = [(1, 7168), (2, 40), (30, 7168), (150, 7168)]  # the last is the library's


def main():
    rank = join(run_of("bf16", {"tp": 2}))
    connect(rank, DEVICE)
    group = rank.mesh.tp
    right = []
    for seed, shape in enumerate(SHAPES * 3):
        parts = torch.stack([random(shape, 10 * seed + index) for index in range(2)])
        x = parts[group.index].to(DEVICE)
        norm = Norm(torch.ones(shape[1], device=DEVICE), 1e-6, Form(), plain=True)
        right.append(torch.equal(norm(x, None, group).residual.cpu(), ordered_sum(parts).bfloat16()))
    print(json.dumps({"connected": group.peers is not None, "right": all(right)}))
    dist.barrier()


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


if __name__ == "__main__":
    compute_bf16_as_on_a_gpu()
    main()
