"""Which tensors of a checkpoint hold which parameters of a model; what is missing, left over or wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.errors import InputError
from ..models.params import Param, parameters
from ..models.spec import ModelSpec
from .quant_config import QuantConfig
from .safetensors import TensorInfo
from .storage import Stored, find_storage


@dataclass(frozen=True)
class Inventory:
    """A checkpoint is complete when ``missing``, ``extra`` and ``faults`` are empty.

    Two absences are legal. A checkpoint may lack its MTP layers as a whole (``has_mtp`` is then False, and ``params``
    has none of theirs). An MTP layer may lack its embed_tokens or its shared_head.head, each of which is a copy of the
    main model's table in every published checkpoint; ``shared`` maps such names to the main table.
    """

    params: Mapping[str, Param]
    stored: Mapping[str, Stored]
    shared: Mapping[str, str]
    has_mtp: bool
    missing: list[str]
    extra: list[str]
    faults: list[InputError]


def take_inventory(tensors: Mapping[str, TensorInfo], spec: ModelSpec, config: QuantConfig) -> Inventory:
    """Look up every parameter of ``spec`` among ``tensors``, by headers alone."""
    wanted = list(parameters(spec))
    stored: dict[str, Stored] = {}
    faults: list[InputError] = []
    faulty: set[str] = set()
    for param in wanted:
        try:
            found = find_storage(param, tensors, config)
        except InputError as fault:
            faults.append(fault)
            faulty.add(param.name)
            continue
        if found is not None:
            stored[param.name] = found
    known = stored.keys() | faulty
    mtp_layers = spec.mtp_layers()
    has_mtp = any(param.layer in mtp_layers for param in wanted if param.name in known)
    params = {param.name: param for param in wanted if has_mtp or param.layer not in mtp_layers}
    shared = {
        name: main
        for name, param in params.items()
        if name not in known and (main := main_table(param, spec)) is not None
    }
    missing = [name for name in params if name not in known and name not in shared]
    used = {info.name for found in stored.values() for info in found.tensors.values()}
    # What is left of a module that is damaged is part of that damage, not a tensor too many.
    damaged = {_module(name) for name in (*missing, *faulty)}
    return Inventory(
        params=params,
        stored=stored,
        shared=shared,
        has_mtp=has_mtp,
        missing=missing,
        extra=[name for name in tensors if name not in used and _module(name) not in damaged],
        faults=faults,
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def main_table(param: Param, spec: ModelSpec) -> str | None:
    """The main model's table that an MTP layer's embedding or head is a copy of."""
    if param.layer not in spec.mtp_layers():
        return None
    if param.name.endswith(".embed_tokens.weight"):
        return "model.embed_tokens.weight"
    if param.name.endswith(".shared_head.head.weight"):
        return "lm_head.weight"
    return None
