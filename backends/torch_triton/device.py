"""Where a run computes and in which precisions: the only file of this backend that knows devices by their names."""

from __future__ import annotations

import platform

import torch

from ...configs.schema import RunConfig
from ...models.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_device(run: RunConfig) -> None:
    """Refuse a device that this backend cannot use."""
    if run.device not in ("auto", "cpu"):
        raise InputError(f"torch_triton does not run on {run.device} yet", "device", "set it to auto or cpu")


def choose_dtype(run: RunConfig) -> str:
    """How linear weights are held, fp32 or bf16. auto is bf16 where the processor multiplies it faster than fp32."""
    if run.dtype == "auto":
        return "bf16" if _has_fast_bf16() else "fp32"
    if run.dtype not in DTYPES:
        todo = "set it to auto, bf16 or fp32: checkpoints of every format are converted while they load"
        raise InputError(f"a cpu does not compute in {run.dtype}", "dtype", todo)
    return run.dtype


def choose_kv_dtype(run: RunConfig, dtype: str) -> str:
    """How the cache is held, fp32 or bf16. auto is the dtype of the linear weights."""
    if run.engine.kv_dtype == "auto":
        return dtype
    if run.engine.kv_dtype not in DTYPES:
        raise InputError(
            f"a cpu holds no cache in {run.engine.kv_dtype}", "engine.kv_dtype", "set it to auto, bf16 or fp32"
        )
    return run.engine.kv_dtype


def _has_fast_bf16() -> bool:
    """Instructions for BF16 products; others convert to FP32 at every use, which costs more than the halved bytes."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` matrices here, and so can keep weights in blocks that suit its kernels."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
