"""Opening what a conversion reads, checked from its headers as strictly as loading it would be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import InputError
from ...models.hf_config import spec_from_hf
from ...models.params import Param, parameters
from ...models.spec import ModelSpec
from ..allowances import Allowances, AllowedCheckpoint
from ..fast_weights import FastWeights
from ..meter import Meter, MeteredReader
from ..plan import SourceFiles
from ..safetensors import TensorInfo
from ..storage import Stored
from ..strict_json import read_object
from ..weights import quant_config
from .options import Options


@dataclass(frozen=True, eq=False)
class HuggingFaceSource:
    """An opened Hugging Face directory. ``params`` are those to be converted, in checkpoint order.

    ``dropped`` maps tensors that are left out to the rule that says so.
    """

    checkpoint: AllowedCheckpoint
    spec: ModelSpec
    weights: FastWeights
    params: Mapping[str, Param]
    dropped: Mapping[str, str]
    files: SourceFiles
    meter: Meter

    @property
    def has_mtp(self) -> bool:
        """Whether MTP layers are converted."""
        return any(param.layer in self.spec.mtp_layers() for param in self.params.values())

    def stored(self) -> Mapping[str, Stored]:
        """How each parameter is stored that has tensors of its own."""
        return {name: self.weights.stored(name) for name in self.params if name not in self.weights.shared}


def open_huggingface(directory: Path, options: Options, allows: Allowances) -> HuggingFaceSource:
    """Raises InputError for anything that headers can show to be wrong; no tensor data is read."""
    meter = Meter()
    checkpoint = AllowedCheckpoint.open(directory, MeteredReader(meter))
    try:
        config_path = directory / "config.json"
        spec = spec_from_hf(checkpoint.config, str(config_path))
        checkpoint.make_exceptions(allows, quant_config(checkpoint, spec).block)
        weights = FastWeights(checkpoint, spec)
        mtp = spec.mtp_layers() if options.drop_mtp else range(0)
        table = {param.name: param for param in parameters(spec)}
        params = {name: table[name] for name in weights.names() if table[name].layer not in mtp}
        own = [name for name in weights.names() if name not in params and name not in weights.shared]
        dropped = {info.name: "drop-mtp" for name in own for info in weights.stored(name).tensors.values()}
        files = SourceFiles(directory, checkpoint.headers, config_path)
        return HuggingFaceSource(checkpoint, spec, weights, params, {**checkpoint.dropped, **dropped}, files, meter)
    except BaseException:
        checkpoint.close()
        raise


def source_config(directory: Path, options: Options) -> tuple[dict[str, Any], Path]:
    """config.json of a directory of another layout, or the one that the user names in its place."""
    path = options.config or directory / "config.json"
    if not path.is_file():
        todo = "give --config with the config.json of the model that the weights belong to"
        raise InputError("no config.json", str(directory), todo)
    return read_object(path), path


def check_rounding(stored: Mapping[str, TensorInfo], narrowed: Iterable[str], allows: Allowances) -> None:
    """Refuse to narrow plain tensors to BF16 that are stored wider, unless that was allowed."""
    for name in narrowed:
        info = stored.get(name)
        if info is not None and info.dtype in ("F32", "F16") and not allows("round", info.name):
            todo = f"give --allow 'round={info.name}' to round it to BF16"
            raise InputError(f"{info.name} is {info.dtype}, and BF16 in this model", str(info.path), todo)
