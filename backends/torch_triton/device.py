"""Where a run computes and in which precisions: the only file of this backend that knows devices by their names."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import psutil
import torch

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.holding import Held, stored_dtype
from ...models.spec import ModelSpec
from ..memory import GIB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(run: RunConfig) -> torch.device:
    """Where the run computes; auto is the GPU (NVIDIA's or AMD's, which PyTorch names alike) if there is one."""
    if run.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"torch_triton does not run on {run.device} yet", "device", "set it to auto, cuda or cpu")
    if run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here", "device: cuda", "set it to cpu, or install PyTorch for your GPU")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if run.launch.launcher == "torchrun" else 0)


def collectives(device: torch.device) -> str:
    """The libraries behind torch.distributed: gloo between hosts, NCCL (RCCL on AMD) between GPUs."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def choose_gpu_dtype(run: RunConfig, spec: ModelSpec, stored: Mapping[str, Held]) -> str:
    """How a GPU holds linear weights: bf16, fp8, w8a8 or int4. auto is as most are ``stored``: GPUs run all."""
    if run.dtype == "auto":
        return stored_dtype(spec, stored)
    if run.dtype == "fp32":
        raise InputError("a GPU does not compute in fp32", "dtype", "set it to auto, bf16, fp8, w8a8 or int4")
    return run.dtype


def choose_gpu_kv_dtype(run: RunConfig) -> str:
    """How a GPU holds the cache."""
    if run.engine.kv_dtype == "fp32":
        raise InputError("a GPU holds no cache in fp32", "engine.kv_dtype", "set it to auto, bf16 or fp8")
    return "fp8" if run.engine.kv_dtype == "fp8" else "bf16"


def multiplies_blocks(device: torch.device) -> bool:
    """Whether cuBLASLt multiplies FP8 matrices that have 1 x 128 and 128 x 128 scales there: Hopper, CUDA 12.9 on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    version = tuple(map(int, torch.version.cuda.split(".")[:2]))
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= (12, 9)


def memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes; without a GPU, of the host."""
    if device.type == "cpu":
        host = psutil.virtual_memory()
        return host.available, host.total
    free, total = torch.cuda.mem_get_info(device)
    return free, total


def describe_gpus() -> list[str]:
    """Each GPU of this machine in a line: name and memory."""
    return [
        f"cuda: {torch.cuda.get_device_name(number)}, {memory(torch.device('cuda', number))[1] / GIB:.1f} GiB"
        for number in range(torch.cuda.device_count())
    ]


_COPY_BYTES = 2 << 30
_COPY_REPEATS = 10


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy in a GPU's memory; the best of a few."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPY_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * _COPY_BYTES / best


def choose_dtype(run: RunConfig) -> str:
    """How linear weights are held, fp32 or bf16. auto is bf16 where the processor multiplies it faster than fp32."""
    if run.dtype == "auto":
        return "bf16" if _has_fast_bf16() else "fp32"
    if run.dtype not in DTYPES:
        todo = "set it to auto, bf16 or fp32: checkpoints of every format are converted while they load"
        raise InputError(f"a cpu does not compute in {run.dtype}", "dtype", todo)
    return run.dtype


def choose_kv_dtype(run: RunConfig, dtype: str) -> str:
    """How the cache is held: fp32, bf16 or fp8. auto is the dtype of the linear weights."""
    return dtype if run.engine.kv_dtype == "auto" else run.engine.kv_dtype


def _has_fast_bf16() -> bool:
    """Instructions for BF16 products; others convert to FP32 at every use, which costs more than the halved bytes."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` matrices here, and so can keep weights in blocks that suit its kernels."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
