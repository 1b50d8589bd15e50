"""Which device a run computes on and in which precision, and what this machine offers."""

from __future__ import annotations

import mindspore as ms

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ..memory import describe_host

ASCEND, CPU = "Ascend", "CPU"
DTYPES = {"fp32": ms.float32, "bf16": ms.bfloat16}
_NAMES = {"cpu": CPU, "npu": ASCEND, "ascend": ASCEND}


def has_ascend() -> bool:
    """Whether this build of MindSpore knows NPUs and finds one."""
    return bool(ms.hal.is_available(ASCEND)) and ms.hal.device_count(ASCEND) > 0


def choose_device(run: RunConfig) -> str:
    """MindSpore's name of the run's device."""
    if run.device == "auto":
        return ASCEND if has_ascend() else CPU
    if run.device not in _NAMES:
        raise InputError(f"device {run.device}", "device", "mindspore_ascend runs on ascend or cpu")
    device = _NAMES[run.device]
    if device == ASCEND and not has_ascend():
        raise InputError("no NPU that MindSpore can use", "device", "see docs/ascend.md, or set device: cpu")
    return device


def native_dtype(device: str) -> str:
    """FP32 on a CPU, whose MindSpore has no BF16 products, BF16 on an NPU: activations, cache and plain weights."""
    return "fp32" if device == CPU else "bf16"


def choose_dtype(run: RunConfig, device: str, stored: str) -> str:
    """How linear weights are held: the device's native type, or W8A8. auto follows ``stored`` W8A8 on an NPU."""
    native = native_dtype(device)
    if run.dtype not in ("auto", native, "w8a8"):
        raise InputError(f"dtype {run.dtype} on {device}", "dtype", f"use {native} or w8a8")
    if run.engine.kv_dtype not in ("auto", native):
        raise InputError(f"kv_dtype {run.engine.kv_dtype} on {device}", "engine.kv_dtype", f"use {native}")
    if run.dtype != "auto":
        return run.dtype
    return stored if stored == "w8a8" and device == ASCEND else native


def describe_devices() -> list[str]:
    """Each device in a line; the host always is one."""
    if not has_ascend():
        return [describe_host()]
    names = [ms.hal.get_device_name(index, ASCEND) for index in range(ms.hal.device_count(ASCEND))]
    return [*(f"ascend:{index}: {name}" for index, name in enumerate(names)), describe_host()]
