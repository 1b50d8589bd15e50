"""Where a run computes and in which precisions: the only file of this backend that knows devices by their names."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Mapping

# torch-npu asks every `import torch` to import it, too; here that happens when an NPU is chosen.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import psutil
import torch

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.holding import Held, stored_dtype
from ...models.spec import ModelSpec
from ..memory import GIB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NPU = "npu"


def choose_device(run: RunConfig) -> torch.device:
    """Where the run computes; auto is the GPU (NVIDIA's or AMD's, which PyTorch names alike) if there is one."""
    if run.device == "ascend":
        raise InputError("torch_triton does not run on ascend", "device", "set it to npu, or backend: mindspore_ascend")
    if run.device == _NPU:
        _start_npus()
        return torch.device(_NPU, _local_rank(run))
    if run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here", "device: cuda", "set it to cpu, or install PyTorch for your GPU")
    return torch.device("cuda", _local_rank(run))


def _local_rank(run: RunConfig) -> int:
    return int(os.environ["LOCAL_RANK"]) if run.launch.launcher == "torchrun" else 0


def _start_npus() -> None:
    """Import torch-npu, which makes PyTorch know NPUs. InputError when it is not there, or finds no CANN or no NPU."""
    where = f"device: {_NPU}"
    if importlib.util.find_spec("torch_npu") is None:
        todo = "install CANN and then pip install 'deepspan[npu]', or set it to cpu"
        raise InputError("the package torch_npu is not installed", where, todo)
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        todo = "install the CANN that fits it and source its set_env.sh, or set it to cpu"
        raise InputError(f"torch_npu does not start: {reason}", where, todo) from None
    if not torch.get_device_module(_NPU).is_available():
        raise InputError("torch_npu finds no NPU here", where, "set it to cpu, or install the NPU's driver")


def is_npu(device: torch.device) -> bool:
    return device.type == _NPU


def collectives(device: torch.device) -> str:
    """The libraries behind torch.distributed: gloo between hosts, NCCL (RCCL on AMD) and HCCL between devices."""
    return {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", _NPU: "cpu:gloo,npu:hccl"}[device.type]


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


def choose_npu_dtype(run: RunConfig, spec: ModelSpec, stored: Mapping[str, Held], device: torch.device) -> str:
    """How an NPU holds linear weights: bf16 or w8a8; auto follows ``stored`` W8A8. Plain operators take fp32, too."""
    if run.dtype == "auto":
        return "w8a8" if stored_dtype(spec, stored) == "w8a8" else "bf16"
    if run.dtype not in ("bf16", "w8a8") and not (run.dtype == "fp32" and device.type == "cpu"):
        raise InputError(f"an NPU does not compute in {run.dtype}", "dtype", "set it to auto, bf16 or w8a8")
    return run.dtype


def check_npu_kv_dtype(run: RunConfig) -> None:
    """An NPU holds the cache in BF16."""
    if run.engine.kv_dtype not in ("auto", "bf16"):
        raise InputError(f"an NPU holds no cache in {run.engine.kv_dtype}", "engine.kv_dtype", "set it to auto or bf16")


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
    free, total = torch.get_device_module(device).mem_get_info(device)
    return free, total


def describe_gpus() -> list[str]:
    """Each GPU of this machine in a line: name and memory."""
    return [
        f"cuda: {torch.cuda.get_device_name(number)}, {memory(torch.device('cuda', number))[1] / GIB:.1f} GiB"
        for number in range(torch.cuda.device_count())
    ]


def describe_npus() -> list[str]:
    """Each NPU of this machine in a line, or why torch-npu, which is there, finds none; nothing without torch-npu."""
    if importlib.util.find_spec("torch_npu") is None:
        return []
    try:
        _start_npus()
    except InputError as error:
        return [f"{_NPU}: no: {error.what}: {error.todo}"]
    module = torch.get_device_module(_NPU)
    return [
        f"{_NPU}: {module.get_device_name(number)}, {memory(torch.device(_NPU, number))[1] / GIB:.1f} GiB"
        for number in range(module.device_count())
    ]


_COPY_BYTES = 2 << 30
_COPY_REPEATS = 10


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy in a device's memory; the best of a few."""
    module = torch.get_device_module(device)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(_COPY_REPEATS):
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
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
