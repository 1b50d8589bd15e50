"""Where a GPU's weights come from: a checkpoint through the host, or random numbers drawn on the device itself."""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....models.sharding import Range, shards
from ....models.spec import ModelSpec
from ...base import Weights
from ..kernels.weights import Fp8Weight, Int4Weight, Int8Weight
from ..parallel import ALONE, Mesh
from ..weights import TensorSource
from .int4 import int4_weight, quantise_groups
from .matrices import of_e4m3fn, quantise_blocks, quantise_channels, quantise_int8_blocks

SEED = 0  # of the weights that runs draw


class Window(NamedTuple):
    """Rows and columns of this rank's part of a matrix; None is all of them."""

    rows: Range | None = None
    cols: Range | None = None


WHOLE = Window()


class DeviceTensors(Protocol):
    """The parameters of a spec on a device: what this rank of ``mesh`` holds of them. Canonical names.

    The quantised forms are as stored if a weight is stored so and the window cuts nothing, else made here.
    """

    device: torch.device
    mesh: Mesh
    has_mtp: bool

    def first_row(self, name: str) -> int:
        """Where this rank's rows of a parameter begin."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of this rank's part of a parameter."""

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16, window: Window = WHOLE) -> Tensor:
        """The values, in ``dtype``: BF16 or FP32."""

    def fp8(self, name: str, window: Window = WHOLE) -> Fp8Weight:
        """A linear weight as FP8 blocks."""

    def int8(self, name: str, window: Window = WHOLE) -> Int8Weight:
        """As INT8, with scales of channels or, if it is stored so, of blocks."""

    def int4(self, name: str, window: Window = WHOLE) -> Int4Weight:
        """As INT4 in groups."""


class StoredTensors:
    """The parameters out of ``weights``; missing, leftover and misshapen ones raise InputError."""

    def __init__(self, spec: ModelSpec, weights: Weights, device: torch.device, mesh: Mesh = ALONE):
        self._weights = weights
        self._source = TensorSource(spec, weights, torch.bfloat16, mesh)
        self.device, self.mesh = device, mesh
        self.has_mtp = self._source.has_mtp

    def first_row(self, name: str) -> int:
        return self._source.first_row(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shard(name).shape

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16, window: Window = WHOLE) -> Tensor:
        return _windowed(self._source.read(name, dtype), window).to(self.device)

    def fp8(self, name: str, window: Window = WHOLE) -> Fp8Weight:
        stored = self._weights.fp8_blocks(name, *self._of_weight(name, window))
        if stored is None:
            return quantise_blocks(self.plain(name, torch.float32, window))
        codes_NK, scales_RC = self._tensors(stored)
        return of_e4m3fn(codes_NK.view(torch.float8_e4m3fn), scales_RC)

    def int8(self, name: str, window: Window = WHOLE) -> Int8Weight:
        of_weight = self._of_weight(name, window)
        if self._weights.format(name) == "int8_block":
            blocks = self._weights.int8_blocks(name, *of_weight)
            if blocks is None:
                return quantise_int8_blocks(self.plain(name, torch.float32, window))
            return Int8Weight(*self._tensors(blocks))
        channels = self._weights.int8_channels(name, *of_weight)
        if channels is None:
            return quantise_channels(self.plain(name, torch.float32, window))
        return Int8Weight(*self._tensors(channels))

    def int4(self, name: str, window: Window = WHOLE) -> Int4Weight:
        stored = self._weights.int4(name, *self._of_weight(name, window))
        if stored is None:
            return quantise_groups(self.plain(name, torch.float32, window))
        return int4_weight(name, stored, self.device)

    def _of_weight(self, name: str, window: Window) -> Window:
        """The window of this rank's part as one of the whole weight."""
        shard = self._source.shard(name)
        return Window(*(_inside(part, cut) for part, cut in zip((shard.rows, shard.cols), window, strict=True)))

    def _tensors(self, arrays: tuple[NDArray, NDArray]) -> tuple[Tensor, Tensor]:
        codes, scales = (torch.from_numpy(np.require(part, requirements=["C", "W"])) for part in arrays)
        return codes.to(self.device), scales.to(self.device)


class DrawnTensors:
    """Random parameters like `convert.random_weights`, but from the device's own generator: other numbers, no copy."""

    def __init__(self, spec: ModelSpec, seed: int, device: torch.device, mesh: Mesh = ALONE):
        self.device, self.mesh = device, mesh
        self.has_mtp = spec.num_nextn_predict_layers > 0
        self._shards = {shard.param.name: shard for shard in shards(spec, mesh.grid, mesh.rank)}
        self._seed = seed

    def first_row(self, name: str) -> int:
        rows = self._shards[name].rows
        return rows[0] if rows else 0

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shards[name].shape

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16, window: Window = WHOLE) -> Tensor:
        """Linear weights and tables of deviation 1 / sqrt(in), norms near 1, router biases near 0."""
        shard = self._shards[name]
        param = shard.param
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(key[:7], "little"))
        values = torch.randn(param.shape, generator=generator, dtype=dtype, device=self.device)
        if len(param.shape) == 2:
            part = _windowed(values.mul_(1 / math.sqrt(param.shape[1])), Window(shard.rows, shard.cols))
            cut = _windowed(part, window)
            return values if cut is values else cut.clone(memory_format=torch.contiguous_format)  # frees the rest
        return values.mul_(0.1).add_(1) if name.endswith("norm.weight") else values.mul_(0.05)

    def fp8(self, name: str, window: Window = WHOLE) -> Fp8Weight:
        return quantise_blocks(self.plain(name, window=window))

    def int8(self, name: str, window: Window = WHOLE) -> Int8Weight:
        return quantise_channels(self.plain(name, window=window))

    def int4(self, name: str, window: Window = WHOLE) -> Int4Weight:
        return quantise_groups(self.plain(name, window=window))


def _windowed(values: Tensor, window: Window) -> Tensor:
    if window == WHOLE:
        return values
    rows, cols = (slice(*cut) if cut else slice(None) for cut in window)
    return values[rows, cols]


def _inside(part: Range | None, cut: Range | None) -> Range | None:
    """A range of a part, as one of the whole."""
    if part is None or cut is None:
        return part or cut
    return part[0] + cut[0], part[0] + cut[1]
