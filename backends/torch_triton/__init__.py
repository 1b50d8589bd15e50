"""PyTorch behind the Runner protocol: eager operators on a CPU, Triton kernels and graphs on a GPU, fused operators of
torch-npu on an NPU.
"""

from __future__ import annotations

from ...configs.schema import RunConfig
from ...models.spec import ModelSpec
from ..base import Rank, Runner
from ..memory import describe_host, host_copy_bandwidth
from .device import choose_device, copy_bandwidth, describe_gpus, describe_npus, is_npu
from .rank import TorchRank, join
from .runner import TorchRunner


class TorchBackend:
    def start(self, run: RunConfig) -> Rank:
        return join(run)

    def build(self, spec: ModelSpec, run: RunConfig, rank: Rank) -> Runner:
        assert isinstance(rank, TorchRank), "made by start"
        device = choose_device(run)
        if device.type == "cpu":
            return TorchRunner(spec, run, rank)
        if is_npu(device):
            from .npu.runner import NpuRunner

            return NpuRunner(spec, run, device, rank)
        from .gpu.runner import GpuRunner  # Triton comes with PyTorch for GPUs only

        return GpuRunner(spec, run, device, rank)

    def devices(self) -> list[str]:
        return [*describe_gpus(), *describe_npus(), describe_host()]

    def copy_bandwidth(self, run: RunConfig) -> float:
        device = choose_device(run)
        return host_copy_bandwidth() if device.type == "cpu" else copy_bandwidth(device)


def backend() -> TorchBackend:
    return TorchBackend()
