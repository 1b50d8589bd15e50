"""A checkpoint of any layout under canonical names, through what would convert it back to Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ...models.errors import InputError
from ...models.layouts.recognise import recognise
from ...models.params import Param, parameters
from ...models.spec import ModelSpec
from ..allowances import Allowances
from ..checkpoint import Checkpoint
from ..fast_weights import FastWeights
from ..formats import Range
from ..kinds import demo_to_hf
from ..kinds.dequantize import unit_of
from ..kinds.mindspore import open_mindspore
from ..kinds.options import Options
from ..kinds.source import source_model
from ..layout_io import CanonicalReader
from ..meter import Meter, MeteredReader
from ..plan import Plan
from ..safetensors import Reader, TensorInfo
from ..storage import PLAIN, Stored
from ..strict_json import parse_object

if TYPE_CHECKING:
    from typing_extensions import Self

_ROUNDED = Allowances(["round=*"])  # to look at a checkpoint, it may be stored wider than BF16


@dataclass(frozen=True, eq=False)
class View:
    """``params`` are those that can be read; ``forms`` says how each is stored: a dtype, or the name of a format.

    ``units`` gives the number of a parameter's rows below which reading is wasteful. ``stored`` are the formats of
    quantised parameters whose tensors can be read one by one, from ``checkpoint``.
    """

    directory: Path
    layout: str
    spec: ModelSpec
    params: Mapping[str, Param]
    forms: Mapping[str, str]
    units: Callable[[str], int]
    weights: CanonicalReader
    stored: Mapping[str, Stored]
    checkpoint: Checkpoint
    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, dtype: str, rows: Range) -> NDArray:
        """Rows of a parameter as "bf16" patterns or as "f32"; thread-safe."""
        return self.weights.read(name, dtype, rows)


def open_view(directory: Path, config: str | None = None) -> View:
    """``config`` is a config.json, or a model's name, for a directory that has none.

    Raises InputError for anything that headers can show to be wrong; no tensor data is read.
    """
    if not directory.is_dir():
        raise InputError("not a directory", str(directory), "give the directory that holds the checkpoint")
    options = Options(config=None if (directory / "config.json").is_file() else config)
    if recognise([entry.name for entry in directory.iterdir()], ()) == "deepseek_demo":
        return _demo_view(demo_to_hf.plan(directory, options), source_model(directory, options).spec)
    with Checkpoint.open(directory) as checkpoint:
        layout = recognise(checkpoint.headers.keys(), checkpoint.tensors.keys())
    if layout == "huggingface":
        opened = Checkpoint.open(directory, MeteredReader(Meter()))
        return _huggingface_view(layout, opened, source_model(directory, options).spec, opened.close)
    if layout is None:
        raise InputError("no layout of the DeepSeek-V3 family", str(directory), "see deepspan inspect")
    return _mindspore_view(directory, options)


def _huggingface_view(layout: str, checkpoint: Checkpoint, spec: ModelSpec, close: Callable[[], None]) -> View:
    try:
        weights = FastWeights(checkpoint, spec)
    except BaseException:
        close()
        raise
    table = {param.name: param for param in parameters(spec)}
    forms = {name: weights.format(name) for name in weights.names()}
    low_bit = {name: weights.stored(name) for name, form in forms.items() if form not in PLAIN.values()}
    return View(
        directory=checkpoint.directory,
        layout=layout,
        spec=spec,
        params={name: table[name] for name in weights.names()},
        forms=forms,
        units=lambda name: unit_of(low_bit[name])[0] if name in low_bit else 1,
        weights=weights,
        stored=low_bit,
        checkpoint=checkpoint,
        close=close,
    )


def _demo_view(plan: Plan, spec: ModelSpec) -> View:
    return _huggingface_view("deepseek_demo", _Planned(plan), spec, plan.close)


def _mindspore_view(directory: Path, options: Options) -> View:
    source = open_mindspore(directory, options, _ROUNDED)
    weights, tensors = source.weights, source.checkpoint.tensors
    return View(
        directory=directory,
        layout=source.layout,
        spec=source.model.spec,
        params=source.params,
        forms={name: PLAIN[tensors[weights.sources(name)[0]].dtype] for name in source.params},
        units=weights.unit,
        weights=weights,
        stored={},
        checkpoint=source.checkpoint,
        close=source.checkpoint.close,
    )


class _Planned(Checkpoint):
    """What a plan would write, read without being written."""

    def __init__(self, plan: Plan):
        super().__init__(plan.source.directory, {}, Reader())
        outputs = {output.name: output for shard in plan.shards for output in shard.outputs}
        self._outputs = outputs
        self._config = plan.small_files.get("config.json", b"{}")
        self.tensors = MappingProxyType(
            {
                name: TensorInfo(name, output.dtype, output.shape, plan.source.directory, 0, output.nbytes)
                for name, output in outputs.items()
            }
        )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """That of the Hugging Face directory."""
        assert isinstance(self._config, bytes)
        return parse_object(self._config)

    def read(self, name: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        made = self._outputs[name].make(*(rows or (0, self._outputs[name].rows)))
        return made if cols is None else made[:, slice(*cols)]
