"""The run configuration: one YAML for every backend. Unknown keys are errors that name the nearest key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..models.errors import InputError
from ..models.spec import nearest
from .mindformers import is_mindformers, run_from_mindformers


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


EMBEDDED = "demo"  # the spec whose checkpoint is part of the installation


class ModelSection(Section):
    """Which weights: a checkpoint directory, or a spec by name with random weights.

    The spec ``demo`` needs no path: its checkpoint comes with the installation.
    """

    path: str | None = None
    spec: str | None = None
    weights: Literal["checkpoint", "random"] = "checkpoint"
    overrides: dict[str, Any] = {}
    tokenizer: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _find_embedded(cls, values: Any) -> Any:
        wants_weights = isinstance(values, dict) and values.get("weights", "checkpoint") == "checkpoint"
        if wants_weights and values.get("path") is None and values.get("spec") == EMBEDDED:
            return {**values, "path": str(resources.files("deepspan.models") / EMBEDDED)}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.weights == "checkpoint" and self.path is None:
            raise ValueError("weights: checkpoint needs model.path, the checkpoint directory")
        if self.path is None and self.spec is None:
            raise ValueError("give model.path or model.spec")
        return self


class Parallel(Section):
    tp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)
    dp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)


class Engine(Section):
    max_batch: int = Field(32, ge=1, le=4096)
    max_seq_len: int = Field(4096, ge=1)
    max_batch_tokens: int = Field(8192, ge=1)
    block_size: int = Field(64, ge=1, le=1024)
    kv_dtype: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    memory_fraction: float = Field(0.9, gt=0, le=1)
    device_memory_gib: float | None = Field(None, gt=0)  # what a device has; default: what it reports
    prefix_cache: bool = True
    speculative_tokens: int = Field(0, ge=0, le=8)
    graphs: bool = True


class SamplingSection(Section):
    temperature: float = Field(0.6, ge=0, le=100)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(512, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[str] = []


class Launch(Section):
    launcher: Literal["none", "torchrun", "msrun"] = "none"
    nodes: int = Field(1, ge=1)
    procs_per_node: int = Field(1, ge=1)
    master_addr: str = "127.0.0.1"
    master_port: int = Field(8118, ge=1, le=65535)
    log_dir: str = "output/log"
    join: bool = True
    timeout: int = Field(300, ge=1)
    env: dict[str, str] = {}


class Server(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key_env: str | None = None
    served_name: str | None = None


class RunConfig(Section):
    model: ModelSection
    backend: Literal["torch_triton", "mindspore_ascend", "reference"] = "torch_triton"
    device: Literal["auto", "cuda", "npu", "ascend", "cpu"] = "auto"
    dtype: Literal["auto", "bf16", "fp32", "fp8", "w8a8", "int4"] = "auto"  # of linear weights; auto: see README
    parallel: Parallel = Parallel()
    engine: Engine = Engine()
    sampling: SamplingSection = SamplingSection()
    launch: Launch = Launch()
    server: Server = Server()


def load_run(
    run: str,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> RunConfig:
    """Read RUN (a run YAML or a checkpoint directory) and apply ``key.path=value`` overrides.

    A YAML of MindFormers is mapped onto this schema; ``note`` is told once which of its keys have no meaning here.

    ``flags`` maps key paths to values and is applied last: options of a command that stand for keys of the YAML.
    Relative paths in a YAML are relative to the YAML's folder. Raises InputError for anything that is not a valid run.
    """
    path = Path(run)
    if path.is_dir():
        values: dict[str, Any] = {"model": {"path": run}}
    elif path.is_file():
        values = _read_yaml(path)
        if is_mindformers(values):
            values, unused = run_from_mindformers(values, run)
            note(f"{run}: no meaning here: {', '.join(unused)}")
    else:
        raise InputError("no such run", run, "give a run YAML or a checkpoint directory")
    given = {}  # key -> where on the command line its value stands
    for override in overrides:
        given[_apply_override(values, override)] = f"--set {override}"
    for key, value in (flags or {}).items():
        _set(values, key, value)
        given[key] = "command line"
    return _validate(values, run, given)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("not a YAML file", str(path), " ".join(str(error).split())) from None
    if not isinstance(values, dict):
        raise InputError("not a run configuration", str(path), "give a mapping with the keys model, backend, …")
    if is_mindformers(values):
        return values
    _refuse_keys_given_twice(text, path)
    model = values.get("model")
    if isinstance(model, dict):
        for key in ("path", "tokenizer"):
            if isinstance(model.get(key), str):
                model[key] = str(path.parent / Path(model[key]).expanduser())
    return values


def _refuse_keys_given_twice(text: str, path: Path) -> None:
    """YAML's reader takes the last one, so that a second ``engine:`` would undo the first without a word."""
    nodes = [yaml.compose(text, yaml.SafeLoader)]
    for node in nodes:  # which grows
        if not isinstance(node, yaml.MappingNode):
            continue
        keys: set[str] = set()
        for key, value in node.value:
            if key.value in keys:
                where = f"{path}, line {key.start_mark.line + 1}"
                raise InputError(f"key {key.value!r} is there twice", where, "remove one of them")
            keys.add(key.value)
            if value not in nodes:  # an alias can lead back
                nodes.append(value)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """The key of ``engine.max_batch=8``; the value is read as YAML, so numbers, booleans, null and lists work."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise InputError(f"cannot read {override!r}", "--set", "write it as key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"cannot read the value {text!r}", f"--set {override}", "quote it as YAML") from None
    _set(values, key, value)
    return key


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise InputError(f"{parent} is not a section", key, "check the key path")
    section[leaf] = value


def _validate(values: Mapping[str, Any], run: str, given: Mapping[str, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        where = given.get(key, run)
        if first["type"] == "extra_forbidden":
            raise InputError(f"unknown key {key!r}", where, nearest(key, _all_keys(RunConfig))) from None
        if first["type"] == "missing":
            raise InputError(f"missing key {key!r}", where, "add it") from None
        if first["type"] == "value_error":
            raise InputError(str(first["ctx"]["error"]), where, f"correct the section {key}") from None
        todo = "give a section of keys" if first["type"] == "model_type" else first["msg"]
        raise InputError(f"{key} is {first['input']!r}", where, todo) from None


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
