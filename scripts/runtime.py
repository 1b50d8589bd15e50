"""From RUN on the command line to a loaded model: what every command that computes something shares."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from .. import backends
from ..backends.base import FloatArray, Rank, Runner, Weights, stored_as
from ..backends.leading import Leader, follow
from ..configs.schema import RunConfig, load_run
from ..convert.checkpoint import Checkpoint
from ..convert.layout_source import LayoutSource, is_mindspore
from ..convert.random_weights import RandomWeights
from ..convert.weights import CheckpointWeights
from ..models.catalog import load_spec
from ..models.errors import InputError
from ..models.hf_config import spec_from_hf
from ..models.holding import Held, Holding
from ..models.layouts.recognise import recognise
from ..models.quant import StoredInt4
from ..models.spec import ModelSpec, nearest
from ..serving.batch import GenerationOptions, prompt_logits
from ..serving.engine import Engine, EngineLimits
from ..serving.prompt import Tokenizer, read_json, stop_token_ids
from ..serving.request import check_token_ids
from .progress import Progress

RANDOM_SEED = 0  # random weights are the same in every process and run


def shipped_runs() -> list[str]:
    """Names of the run configurations that are part of the installation."""
    folder = resources.files("deepspan.configs") / "run"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_run(run: str, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> RunConfig:
    """RUN as a configuration: a YAML file, a checkpoint directory, or the name of a shipped run.

    ``overrides`` and ``flags`` are `load_run`'s.
    """
    if not run or not Path(run).exists():
        if run not in shipped_runs():
            todo = "give a run YAML, a checkpoint directory, or a shipped run"
            raise InputError("no such run", run, f"{todo} ({', '.join(shipped_runs())})")
        run = str(resources.files("deepspan.configs") / "run" / f"{run}.yaml")
    config = load_run(run, overrides, flags, note)
    if config.engine.speculative_tokens:
        raise InputError("speculation is not supported yet", "engine.speculative_tokens", "set it to 0")
    return config


@dataclass
class Session:
    """A loaded model. Close it, or use it as a context manager."""

    run: RunConfig
    spec: ModelSpec
    rank: Rank
    runner: Runner
    holding: Holding  # how the runner holds linear weights
    optional_tokenizer: Tokenizer | None
    stop_token_ids: frozenset[int]
    opened: ExitStack  # the files and the runner, closed in reverse order

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; InputError when the run has none (random weights and no ``model.tokenizer``)."""
        if self.optional_tokenizer is None:
            raise InputError("this run has no tokenizer", "model.tokenizer", "name a directory or a tokenizer.json")
        return self.optional_tokenizer

    @cached_property
    def engine(self) -> Engine:
        """The engine over the runner, as the run's ``engine`` section says."""
        engine = self.run.engine
        limits = EngineLimits(
            max_batch=engine.max_batch,
            max_seq_len=engine.max_seq_len,
            max_batch_tokens=engine.max_batch_tokens,
            prefix_cache=engine.prefix_cache,
            speculative_tokens=engine.speculative_tokens,
            replicas=self.run.parallel.dp,
        )
        return Engine(self.runner, self.spec.vocab_size, limits, self.optional_tokenizer)

    def generation_options(self, **changes: Any) -> GenerationOptions:
        """The run's ``sampling`` section, with ``changes`` to its values."""
        values = self.run.sampling.model_dump() | changes
        stop_strings = tuple(values.pop("stop"))
        return GenerationOptions(stop_token_ids=self.stop_token_ids, stop_strings=stop_strings, **values)

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """float32 [tokens, vocab]: after every token of a text, the logits of the next.

        Uses the cache blocks that the engine hands out, so ask for logits after the last completion.
        """
        check_token_ids(token_ids, self.spec.vocab_size)
        limit = self.run.engine.max_seq_len
        if len(token_ids) > limit:
            raise InputError(
                f"text of {len(token_ids)} tokens is too long", f"engine.max_seq_len = {limit}", "shorten or raise it"
            )
        return prompt_logits(self.runner, token_ids, self.run.engine.max_batch_tokens)

    def close(self) -> None:
        self.opened.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_run(run: RunConfig) -> Session:
    """Load the model of a run. Everything that can be wrong with the input is found before the weights are read.

    Of several ranks, rank 0 alone returns: the others take part in its steps until its session ends, and so do they.
    """
    with ExitStack() as opened:
        checkpoint = None
        if run.model.path and run.model.weights == "checkpoint":
            checkpoint = opened.enter_context(open_checkpoint(run.model.path))
        spec = model_spec(run, checkpoint)
        run = _fit_to_model(run, spec)
        tokenizer = _tokenizer(run, spec)
        stop_tokens = _stop_tokens(run, spec, tokenizer)
        weights = open_weights(opened, run, spec, checkpoint)
        backend = backends.load(run.backend)
        rank = backend.start(run)
        runner = backend.build(spec, run, rank)
        opened.callback(runner.close)
        with Progress("loading", len(list(weights.names()))) as progress:
            runner.load(CountedWeights(weights, progress))
        rank.barrier()  # a step's collectives wait launch.timeout for each other; loading may take longer
        if rank.rank > 0:
            follow(runner, rank)
            raise SystemExit(0)
        if rank.world_size > 1:
            runner = Leader(runner, rank)
            opened.callback(runner.close)
        holding = holding_of(run, runner.dtype, stored_as(run, weights))
        return Session(run, spec, rank, runner, holding, tokenizer, stop_tokens, opened.pop_all())


def open_checkpoint(directory: str) -> Checkpoint:
    """The checkpoint of a run, whose headers are read; DeepSeek's rank files are for its own demo."""
    if recognise([file.name for file in Path(directory).glob("*.safetensors")], ()) == "deepseek_demo":
        todo = "bring them back first: deepspan convert demo-to-hf"
        raise InputError("rank files of DeepSeek's demo are no checkpoint to run", directory, todo)
    return Checkpoint.open(directory)


def open_weights(opened: ExitStack, run: RunConfig, spec: ModelSpec, checkpoint: Checkpoint | None) -> Weights:
    """What a run loads from; ``opened`` closes it."""
    if checkpoint is None:
        return RandomWeights(spec, RANDOM_SEED)
    if is_mindspore(checkpoint):
        has_config = (checkpoint.directory / "config.json").is_file()
        return opened.enter_context(closing(LayoutSource(checkpoint.directory, None if has_config else run.model.spec)))
    return CheckpointWeights(checkpoint, spec)


def holding_of(run: RunConfig, dtype: str, stored: Mapping[str, Held]) -> Holding:
    """How a run's backend holds linear weights: torch_triton alone leaves some in another format than the run's."""
    return Holding(dtype, stored if run.backend == "torch_triton" else {})


class CountedWeights:
    """Weights that report each parameter that is read for the first time."""

    def __init__(self, weights: Weights, progress: Progress):
        self._weights = weights
        self._progress = progress
        self._seen: set[str] = set()

    @property
    def has_mtp(self) -> bool:
        return self._weights.has_mtp

    def names(self) -> Iterable[str]:
        return self._weights.names()

    def read(
        self, name: str, dtype: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> NDArray:
        self._count(name)
        return self._weights.read(name, dtype, rows, cols)

    def format(self, name: str) -> str:
        return self._weights.format(name)

    def group_size(self, name: str) -> int | None:
        return self._weights.group_size(name)

    def fp8_blocks(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray, NDArray] | None:
        self._count(name)
        return self._weights.fp8_blocks(name, rows, cols)

    def int8_channels(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray, NDArray] | None:
        self._count(name)
        return self._weights.int8_channels(name, rows, cols)

    def static_input(self, name: str, rows: tuple[int, int] | None = None) -> tuple[float, int, NDArray | None] | None:
        return self._weights.static_input(name, rows)

    def int8_blocks(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray, NDArray] | None:
        self._count(name)
        return self._weights.int8_blocks(name, rows, cols)

    def int4(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> StoredInt4 | None:
        self._count(name)
        return self._weights.int4(name, rows, cols)

    def _count(self, name: str) -> None:
        self._seen.add(name)
        self._progress.show(len(self._seen))


def model_spec(run: RunConfig, checkpoint: Checkpoint | None = None) -> ModelSpec:
    """The spec of the checkpoint, which a named spec must equal, or the named one for random weights."""
    model = run.model
    config_file = Path(model.path or "") / "config.json"
    if model.path and (config_file.is_file() or not model.spec):
        config = checkpoint.config if checkpoint else read_json(config_file)
        spec = spec_from_hf(config, str(config_file))
        if model.spec:
            _check_same(spec, load_spec(model.spec), str(config_file), model.spec)
    else:
        assert model.spec, "the schema asks for a path or a spec, and a directory may lack config.json"
        spec = load_spec(model.spec)
    return spec.replace(model.overrides) if model.overrides else spec


def _check_same(found: ModelSpec, named: ModelSpec, where: str, name: str) -> None:
    """Sizes must agree; how a copy is stored (``fp8``, and MTP layers left out) may differ."""
    for field in found.__dataclass_fields__:
        if field in ("fp8", "num_nextn_predict_layers", "bos_token_id", "eos_token_ids", "mtp_hidden"):
            continue
        ours, theirs = getattr(found, field), getattr(named, field)
        if ours != theirs:
            raise InputError(f"{field} is {ours}, and {theirs} in {name}", where, "correct model.spec or model.path")


def _fit_to_model(run: RunConfig, spec: ModelSpec) -> RunConfig:
    """Lower the default ``max_seq_len`` to what the model was made for; one that the user wrote is the user's."""
    limit = spec.max_position_embeddings
    if "max_seq_len" in run.engine.model_fields_set or run.engine.max_seq_len <= limit:
        return run
    return run.model_copy(update={"engine": run.engine.model_copy(update={"max_seq_len": limit})})


def _tokenizer(run: RunConfig, spec: ModelSpec) -> Tokenizer | None:
    model = run.model
    if model.tokenizer is None and (model.path is None or not (Path(model.path) / "tokenizer.json").is_file()):
        return None
    path = model.tokenizer or model.path
    assert path is not None, "checked above"
    tokenizer = Tokenizer.open(path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise InputError(
            f"tokenizer of {tokenizer.vocab_size} tokens for a model of {spec.vocab_size}",
            path,
            "use the tokenizer of this checkpoint: another one gives fluent nonsense",
        )
    return tokenizer


def _stop_tokens(run: RunConfig, spec: ModelSpec, tokenizer: Tokenizer | None) -> frozenset[int]:
    file = Path(run.model.path or "") / "generation_config.json"
    generation_config = read_json(file) if run.model.path and file.is_file() else {}
    return stop_token_ids({"eos_token_id": list(spec.eos_token_ids)}, generation_config, tokenizer)


def note(message: str) -> None:
    """One line for the user beside the results."""
    print(f"note: {message}", file=sys.stderr)


def unknown_choice(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is none of ``known``."""
    return InputError(f"unknown {what} {name!r}", what, nearest(name, known))
