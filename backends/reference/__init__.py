"""The numpy reference behind the Runner protocol: slow, small models only, and what every other backend must match."""

from __future__ import annotations

from ...configs.schema import RunConfig
from ...models.errors import InputError
from ...models.spec import ModelSpec
from ..base import Rank, Runner, SingleProcess
from ..memory import describe_host, host_copy_bandwidth
from .runner import ReferenceRunner


class ReferenceBackend:
    def start(self, run: RunConfig) -> Rank:
        if run.launch.launcher != "none" or max(run.parallel.model_dump().values()) > 1:
            raise InputError("the reference backend is one process", "parallel, launch", "set every degree to 1")
        return SingleProcess()

    def build(self, spec: ModelSpec, run: RunConfig, rank: Rank) -> Runner:
        return ReferenceRunner(spec, run)

    def devices(self) -> list[str]:
        return [describe_host()]

    def copy_bandwidth(self, run: RunConfig) -> float:
        return host_copy_bandwidth()


def backend() -> ReferenceBackend:
    return ReferenceBackend()
