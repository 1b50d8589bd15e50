"""MindSpore behind the Runner protocol: graph mode, fused operators on Ascend NPUs and plain ones on a CPU."""

from __future__ import annotations

import mindspore as ms

from ...configs.schema import RunConfig
from ...models.spec import ModelSpec
from ..base import Runner
from ..memory import host_copy_bandwidth
from .device import choose_device, describe_devices
from .rank import MindSporeRank, join
from .runner import MindSporeRunner


class MindSporeBackend:
    def start(self, run: RunConfig) -> MindSporeRank:
        ms.set_device(choose_device(run))
        ms.set_context(mode=ms.GRAPH_MODE)
        return join(run)

    def build(self, spec: ModelSpec, run: RunConfig, rank: MindSporeRank) -> Runner:
        return MindSporeRunner(spec, run, rank)

    def devices(self) -> list[str]:
        return describe_devices()

    def copy_bandwidth(self, run: RunConfig) -> float:
        return host_copy_bandwidth()


def backend() -> MindSporeBackend:
    return MindSporeBackend()
