"""What a checkpoint directory is, from its JSON files and headers alone. Damage is part of the answer, not an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..models.errors import InputError
from ..models.hf_config import spec_from_hf
from ..models.layouts.recognise import expected_names, recognise
from ..models.spec import ModelSpec
from .checkpoint import Checkpoint
from .golden_stick import plain_names
from .inventory import take_inventory
from .safetensors import Header, Reader, TensorInfo
from .weights import quant_config


@dataclass
class Inspection:
    """``formats`` counts parameters by how they are stored; ``faults`` are errors that loading would end with."""

    directory: Path
    layout: str | None
    spec: ModelSpec | None
    headers: Mapping[str, Header]
    has_mtp: bool = False
    formats: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    faults: list[InputError] = field(default_factory=list)

    @property
    def tensors(self) -> list[TensorInfo]:
        """Every tensor of every readable file."""
        return [info for header in self.headers.values() for info in header.tensors.values()]

    def check_complete(self) -> None:
        """Raise one InputError that sums up everything that is wrong."""
        counts = {"missing": len(self.missing), "extra": len(self.extra), "faulty": len(self.faults)}
        if any(counts.values()):
            what = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
            raise InputError(f"not a complete checkpoint: {what}", str(self.directory), "see deepspan inspect")


def inspect_directory(directory: Path, spec: ModelSpec | None = None) -> Inspection:
    """``spec`` is for a directory without a config.json. Raises InputError only for what is no checkpoint at all."""
    files = sorted(file.name for file in directory.iterdir() if file.name.endswith(".safetensors"))
    if not files:
        with Checkpoint.open(directory):  # says what the directory holds instead
            raise AssertionError("a checkpoint without files was opened")
    with Reader() as reader:
        headers, faults = _headers(directory, files, reader)
        names = {name for header in headers.values() for name in header.tensors}
        layout = recognise(files, names)
        checkpoint = Checkpoint(directory, headers, reader)
        found = Inspection(directory, layout, spec or _spec(checkpoint, faults), headers, faults=faults)
        if layout == "huggingface":
            _check_files(directory, faults)
            _take_stock(found, checkpoint)
        elif layout is not None and found.spec is not None:
            _compare_names(found, layout, found.spec, files, names)
    return found


def _headers(directory: Path, files: list[str], reader: Reader) -> tuple[dict[str, Header], list[InputError]]:
    headers, faults = {}, []
    for file in files:
        try:
            headers[file] = reader.header(directory / file)
        except InputError as fault:
            faults.append(fault)
    return headers, faults


def _spec(checkpoint: Checkpoint, faults: list[InputError]) -> ModelSpec | None:
    try:
        return spec_from_hf(checkpoint.config, str(checkpoint.directory / "config.json"))
    except InputError as fault:
        faults.append(fault)
        return None


def _check_files(directory: Path, faults: list[InputError]) -> None:
    """The index and the files against each other, as loading would."""
    try:
        Checkpoint.open(directory).close()
    except InputError as fault:
        if str(fault) not in map(str, faults):
            faults.append(fault)


def _take_stock(found: Inspection, checkpoint: Checkpoint) -> None:
    if found.spec is None:
        return
    try:
        inventory = take_inventory(checkpoint.tensors, found.spec, quant_config(checkpoint, found.spec))
    except InputError as fault:
        found.faults.append(fault)
        return
    found.has_mtp = inventory.has_mtp and bool(found.spec.mtp_layers())
    found.formats = Counter(stored.format for stored in inventory.stored.values())
    found.missing, found.extra = inventory.missing, inventory.extra
    found.faults += inventory.faults


def _compare_names(found: Inspection, layout: str, spec: ModelSpec, files: list[str], names: set[str]) -> None:
    names = plain_names(names)
    wanted, found.has_mtp = expected_names(layout, spec, files, names)
    scales = {f"{name.removesuffix('.weight')}.scale" for name in wanted}
    found.missing = sorted(wanted - names)
    found.extra = sorted(names - wanted - scales)
