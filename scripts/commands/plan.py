"""``deepspan plan``: what each rank will hold, and whether it fits, from the run and the spec alone."""

from __future__ import annotations

import argparse
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...backends.base import stored_as
from ...backends.working import working_bytes
from ...configs.schema import RunConfig
from ...models.capacity import GIB, StagePlan, activation_bytes, plan_stages
from ...models.catalog import load_spec
from ...models.costs import Precision, decode_bytes
from ...models.errors import InputError
from ...models.holding import GROUPS, Held, Holding, stored_dtype
from ...models.params import parameters
from ...models.sharding import Grid
from ...models.spec import ModelSpec
from ..launching import check_ranks
from ..options import add_run
from ..runtime import holding_of, model_spec, note, open_checkpoint, open_weights, read_run
from ..words import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--decode", metavar="1x4096,32x4096", help="sequences x context of decode steps to estimate")
    parser.add_argument("--bandwidth", metavar="GB/s", type=float, help="of a device's memory, for the time of a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "A model.path that is not there yet is planned from model.spec. Exit code 2 when it does not fit."


def run(options: argparse.Namespace) -> int:
    bandwidth = options.bandwidth
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise InputError(f"bandwidth is {bandwidth}", "--bandwidth", "give the GB/s of a device, above 0")
    if bandwidth is not None and options.decode is None:
        raise InputError("--bandwidth does not go without --decode", "--bandwidth", "give --decode too")
    config = read_run(options.run_name, options.overrides)
    spec = planned_spec(config)
    deployment = Deployment.of(config, spec)
    activations = _activations(config, spec, deployment.grid)
    stages = list(plan_stages(spec, deployment.grid, deployment.precision, activations))
    steps = [_decode_step(part, spec, deployment, bandwidth) for part in _parts(options.decode)]
    if options.json:
        print(json.dumps({**_as_json(deployment, stages), **({"decode": steps} if steps else {})}))
    else:
        _print(deployment, stages)
        _print_steps(steps)
    _check_fits(deployment, stages, config)
    return 0


@dataclass(frozen=True)
class Deployment:
    """A run's degrees, precision and the bytes that a device may use (None: unknown here)."""

    grid: Grid
    precision: Precision
    budget_bytes: int | None

    @classmethod
    def of(cls, config: RunConfig, spec: ModelSpec) -> Deployment:
        grid = check_ranks(config)
        weights = _holding(config, spec)
        cache = config.engine.kv_dtype
        if cache == "auto":
            cache = "fp32" if weights.dtype == "fp32" else "bf16"
        memory = config.engine.device_memory_gib
        budget = None if memory is None else int(memory * GIB * config.engine.memory_fraction)
        return cls(grid, Precision(weights, cache), budget)


def _activations(config: RunConfig, spec: ModelSpec, grid: Grid) -> int:
    """What the runner would leave free for steps, where it says so: on GPUs, which an "auto" is planned for."""
    if config.backend == "torch_triton" and config.device in ("auto", "cuda"):
        return working_bytes(spec, config)
    return activation_bytes(spec, grid, config.engine.max_batch_tokens, config.engine.max_batch)


def _holding(config: RunConfig, spec: ModelSpec) -> Holding:
    """How the devices hold linear weights. INT4 of a checkpoint that is not there yet is that of groups of 128."""
    is_stored = config.model.weights == "checkpoint"
    stored = _stored(config, spec) if is_stored and config.dtype in ("auto", "w8a8", "int4") else {}
    dtype = _auto_dtype(config, stored_dtype(spec, stored)) if config.dtype == "auto" else config.dtype
    if dtype == "int4" and is_stored and not stored:
        stored = {param.name: Held("int4", GROUPS[0]) for param in parameters(spec) if param.quantised}
    return holding_of(config, dtype, stored)


def _auto_dtype(config: RunConfig, stored: str) -> str:
    """What the backends choose on their accelerators; on CPUs, the larger of what they may."""
    if config.device == "cpu" or config.backend == "reference":
        return "fp32"
    if config.backend == "mindspore_ascend" or config.device == "npu":
        return "w8a8" if stored == "w8a8" else "bf16"
    return stored


def _stored(config: RunConfig, spec: ModelSpec) -> dict[str, Held]:
    """How each parameter is stored, by the headers of the files if they are there."""
    if config.model.path is None or not any(Path(config.model.path).glob("*.safetensors")):
        return {}
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(config.model.path))
        return stored_as(config, open_weights(opened, config, spec, checkpoint))


def _parts(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _decode_step(part: str, spec: ModelSpec, deployment: Deployment, bandwidth: float | None) -> dict[str, Any]:
    """What a rank of each stage reads, and how long that takes, one stage after the other."""
    batch, _, context = part.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and int(batch)):
        raise InputError(f"{part!r} is not sequences x context", "--decode", "write it as 32x4096")
    read = decode_bytes(spec, deployment.grid, deployment.precision, int(batch), int(context))
    step = {"batch": int(batch), "context": int(context), "bytes_of_a_rank": read}
    return step if bandwidth is None else {**step, "ms": sum(read) / bandwidth / 1e6}


def _print_steps(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        read = " + ".join(f"{size / GIB:.3f}" for size in step["bytes_of_a_rank"])
        time = f": {step['ms']:.2f} ms if memory were all that counts" if "ms" in step else ""
        print(f"decode of {step['batch']} at context {step['context']:,}: a rank reads {read} GiB{time}")


def planned_spec(config: RunConfig) -> ModelSpec:
    """The model of a run whose checkpoint may not be there yet."""
    model = config.model
    if model.path and not Path(model.path).exists() and model.spec:
        note(f"{model.path} is not there; planned from the spec {model.spec}")
        spec = load_spec(model.spec)
        return spec.replace(model.overrides) if model.overrides else spec
    return model_spec(config)


def _cache_tokens(deployment: Deployment, stages: list[StagePlan]) -> int | None:
    """Tokens that every stage has room for, over all data-parallel replicas."""
    if deployment.budget_bytes is None:
        return None
    return deployment.grid.dp * min(stage.cache_tokens(deployment.budget_bytes) for stage in stages)


def _as_json(deployment: Deployment, stages: list[StagePlan]) -> dict[str, Any]:
    return {
        "world_size": deployment.grid.world_size,
        "weights": deployment.precision.weights.dtype,
        "kv_dtype": deployment.precision.cache,
        "budget_bytes": deployment.budget_bytes,
        "kv_tokens": _cache_tokens(deployment, stages),
        "stages": [
            {
                "ranks": [stage.ranks.start, stage.ranks.stop - 1],
                "layers": [stage.layers.start, stage.layers.stop - 1],
                "weight_bytes": stage.weight_bytes,
                "activation_bytes": stage.activation_bytes,
                "kv_bytes_per_token": stage.cache_bytes_per_token,
            }
            for stage in stages
        ],
    }


def _print(deployment: Deployment, stages: list[StagePlan]) -> None:
    degrees = ", ".join(f"{key} {value}" for key, value in vars(deployment.grid).items() if value > 1)
    weights, cache = deployment.precision.weights.dtype, deployment.precision.cache
    ranks = count(deployment.grid.world_size, "rank")
    print(f"{ranks} ({degrees or 'one process'}), {weights}, cache {cache}")
    for stage in stages:
        who = f"each of ranks {_span(stage.ranks)}" if len(stage.ranks) > 1 else f"rank {stage.ranks.start}"
        print(f"\n{who}: layers {_span(stage.layers)}")
        for group, size in sorted(stage.weight_bytes.items(), key=lambda item: -item[1]):
            print(f"  {group:<12} {size / GIB:9.3f} GiB")
        print(f"  {'activations':<12} {stage.activation_bytes / GIB:9.3f} GiB, estimated")
        print(
            f"  {'together':<12} {stage.fixed_bytes / GIB:9.3f} GiB, and {stage.cache_bytes_per_token:,} bytes a token"
        )
    tokens = _cache_tokens(deployment, stages)
    if tokens is None:
        print("\nset engine.device_memory_gib to see how much cache fits")
    else:
        print(f"\ncache for {tokens:,} tokens in {deployment.budget_bytes or 0:,} bytes a device")


def _span(numbers: range) -> str:
    return f"{numbers.start} to {numbers.stop - 1}"


def _check_fits(deployment: Deployment, stages: list[StagePlan], config: RunConfig) -> None:
    """One sequence of full length is the least that a run must hold."""
    if deployment.budget_bytes is None:
        return
    needed = max(stage.fixed_bytes + config.engine.max_seq_len * stage.cache_bytes_per_token for stage in stages)
    if needed > deployment.budget_bytes:
        missing = (needed - deployment.budget_bytes) / GIB
        raise InputError(
            f"{needed / GIB:.1f} GiB needed for one sequence of {config.engine.max_seq_len} tokens, "
            f"{deployment.budget_bytes / GIB:.1f} GiB usable",
            "each device",
            f"{missing:.1f} GiB are missing: use more devices, a narrower dtype or a shorter engine.max_seq_len",
        )
