"""Runners of an NPU's path over CPU tensors, with the plain operators that define what its fused ones compute."""

import torch

from deepspan.backends.torch_triton.npu.runner import NpuRunner
from deepspan.configs.schema import RunConfig
from tests.backends.opening import BLOCK, WIDTH, DictWeights


def run_of(dtype, parallel=None, **engine):
    return RunConfig.model_validate(
        {
            "model": {"path": "weights come from the test"},
            "dtype": dtype,
            "engine": {"max_batch": 8, "max_seq_len": BLOCK * WIDTH, "block_size": BLOCK, **engine},
            "device": "cpu",  # where torch.distributed runs
            "parallel": parallel or {},
            "launch": {"launcher": "torchrun", "timeout": 60} if parallel else {},
        }
    )


def opened(spec, weights, dtype, rank=None, parallel=None, **engine):
    runner = NpuRunner(spec, run_of(dtype, parallel, **engine), torch.device("cpu"), rank)
    runner.load(weights)
    return runner


def loaded(spec, values, dtype, **engine):
    return opened(spec, DictWeights(values), dtype, **engine)
