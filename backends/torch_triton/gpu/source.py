"""Where a GPU's weights come from: a checkpoint through the host, or random numbers drawn on the device itself."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ....models.sharding import shards
from ....models.spec import ModelSpec
from ...base import Weights
from ..parallel import ALONE, Mesh
from ..weights import TensorSource
from .matrices import Fp8Matrix, of_e4m3fn, quantise_blocks


class DeviceTensors(Protocol):
    """The parameters of a spec on a device: what this rank of ``mesh`` holds of them. Canonical names."""

    device: torch.device
    mesh: Mesh
    has_mtp: bool

    def first_row(self, name: str) -> int:
        """Where this rank's rows of a parameter begin."""

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The values, in ``dtype``: BF16 or FP32."""

    def fp8(self, name: str) -> Fp8Matrix:
        """A linear weight as FP8 blocks: as stored if it is stored so, else quantised here."""


class StoredTensors:
    """The parameters out of ``weights``; missing, leftover and misshapen ones raise InputError."""

    def __init__(self, spec: ModelSpec, weights: Weights, device: torch.device, mesh: Mesh = ALONE):
        self._weights = weights
        self._source = TensorSource(spec, weights, torch.bfloat16, mesh)
        self.device, self.mesh = device, mesh
        self.has_mtp = self._source.has_mtp

    def first_row(self, name: str) -> int:
        return self._source.first_row(name)

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self._source.read(name, dtype).to(self.device)

    def fp8(self, name: str) -> Fp8Matrix:
        shard = self._source.shard(name)
        stored = self._weights.fp8_blocks(name, shard.rows, shard.cols)
        if stored is None:
            return quantise_blocks(self.plain(name, torch.float32))
        codes_NK, scales_RC = (torch.from_numpy(np.require(part, requirements=["C", "W"])) for part in stored)
        return of_e4m3fn(codes_NK.to(self.device).view(torch.float8_e4m3fn), scales_RC.to(self.device))


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

    def plain(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Linear weights and tables of deviation 1 / sqrt(in), norms near 1, router biases near 0."""
        shard = self._shards[name]
        param = shard.param
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(key[:7], "little"))
        values = torch.randn(param.shape, generator=generator, dtype=dtype, device=self.device)
        if len(param.shape) == 2:
            rows, cols = (slice(*cut) if cut else slice(None) for cut in (shard.rows, shard.cols))
            return values.mul_(1 / math.sqrt(param.shape[1]))[rows, cols].contiguous()
        return values.mul_(0.1).add_(1) if name.endswith("norm.weight") else values.mul_(0.05)

    def fp8(self, name: str) -> Fp8Matrix:
        return quantise_blocks(self.plain(name))
