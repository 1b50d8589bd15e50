"""Opening what a conversion reads, checked from its headers as strictly as loading it would be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.catalog import load_spec
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
from .huggingface import plain_config
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


@dataclass(frozen=True)
class Model:
    """What a checkpoint of another layout is a checkpoint of: by a config.json, or by a model's name."""

    spec: ModelSpec
    config: Mapping[str, Any] | None
    path: Path | None
    named: Mapping[str, str]

    def config_file(self, has_mtp: bool, declared: Any = None) -> dict[str, bytes]:
        """config.json for what is written; a name gives none."""
        return {} if self.config is None else plain_config(self.config, has_mtp, declared)


def source_model(directory: Path, options: Options) -> Model:
    """By the directory's config.json, or by what the user names in its place."""
    path = Path(options.config) if options.config else directory / "config.json"
    if path.is_file():
        config = read_object(path)
        return Model(spec_from_hf(config, str(path)), config, path, {})
    if options.config:
        return Model(load_spec(options.config), None, None, {"config": options.config})
    todo = "give --config with the config.json, or the name, of the model that the weights belong to"
    raise InputError("no config.json", str(directory), todo)


def check_rounding(stored: Mapping[str, TensorInfo], narrowed: Iterable[str], allows: Allowances) -> None:
    """Refuse to narrow plain tensors to BF16 that are stored wider, unless that was allowed."""
    for name in narrowed:
        info = stored.get(name)
        if info is not None and info.dtype in ("F32", "F16") and not allows("round", info.name):
            todo = f"give --allow 'round={info.name}' to round it to BF16"
            raise InputError(f"{info.name} is {info.dtype}, and BF16 in this model", str(info.path), todo)
