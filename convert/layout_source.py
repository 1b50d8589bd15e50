"""A MindSpore directory as the source of a run: canonical parameters out of whatever its layout holds them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models.layouts.recognise import recognise
from .allowances import Allowances
from .checkpoint import Checkpoint
from .formats import Range
from .golden_stick import plain_names
from .kinds.mindspore import open_mindspore
from .kinds.options import Options


def is_mindspore(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is in one of MindSpore's layouts, by its names."""
    layout = recognise(checkpoint.headers.keys(), plain_names(checkpoint.tensors.keys()))
    return layout is not None and layout.startswith("mindspore_")


class LayoutSource:
    """The parameters of a MindSpore directory: inference or training layout, fused or not, plain or W8A8.

    Construction checks names, shapes, types and the name map, and raises InputError for what is missing, left over or
    wrong. ``config`` names the model of a directory without config.json. Close it after reading.
    """

    def __init__(self, directory: Path, config: str | None = None):
        self._source = open_mindspore(directory, Options(config=config), Allowances())
        self.has_mtp = self._source.has_mtp

    def names(self) -> list[str]:
        return self._source.weights.names()

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """As `CheckpointWeights.read`."""
        return np.ascontiguousarray(self._source.weights.read(name, dtype, rows, cols))

    def format(self, name: str) -> str:
        """int8_channel for a weight of a W8A8 module, else the precision in which values are given."""
        quantised = any(self._source.reader.is_quantised(stored) for stored in self._source.weights.sources(name))
        return "int8_channel" if quantised else "bf16"

    def group_size(self, name: str) -> None:
        """None: the layouts hold no 4-bit weights."""

    def fp8_blocks(self, name: str, rows: Range | None = None, cols: Range | None = None) -> None:
        """None: the layouts hold no FP8."""

    def int8_channels(self, name: str, rows: Range | None = None, cols: Range | None = None) -> None:
        """None: W8A8 modules are given as the weights that they mean, from which the same codes follow."""

    def static_input(self, name: str, rows: Range | None = None) -> tuple[float, int, None] | None:
        """As `CheckpointWeights.static_input`; a bias follows from the codes."""
        for stored in self._source.weights.sources(name):
            if found := self._source.reader.static_input(stored):
                return *found, None
        return None

    def int8_blocks(self, name: str, rows: Range | None = None, cols: Range | None = None) -> None:
        """None: the layouts hold no blocks."""

    def int4(self, name: str, rows: Range | None = None, cols: Range | None = None) -> None:
        """None: nor 4-bit words."""

    def close(self) -> None:
        self._source.checkpoint.close()
