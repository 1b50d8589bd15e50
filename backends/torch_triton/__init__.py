"""PyTorch behind the Runner protocol: eager operators on a CPU, every stored weight format, BF16 and FP32."""

from __future__ import annotations

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.spec import ModelSpec
from ..base import Rank, Runner, SingleProcess
from ..memory import describe_host, host_copy_bandwidth
from .runner import TorchRunner


class TorchBackend:
    def start(self, run: RunConfig) -> Rank:
        if run.launch.launcher != "none" or max(run.parallel.model_dump().values()) > 1:
            raise InputError("torch_triton runs in one process", "parallel, launch", "set every degree to 1")
        return SingleProcess()

    def build(self, spec: ModelSpec, run: RunConfig, rank: Rank) -> Runner:
        return TorchRunner(spec, run)

    def devices(self) -> list[str]:
        return [describe_host()]

    def copy_bandwidth(self, run: RunConfig) -> float:
        return host_copy_bandwidth()


def backend() -> TorchBackend:
    return TorchBackend()
