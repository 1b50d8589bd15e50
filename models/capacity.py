"""What each rank must hold before anything loads: weights by group, cache per token, room for activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .costs import Precision, cache_bytes
from .errors import InputError
from .holding import Holding, check_groups, shard_bytes
from .sharding import Grid, Shard, check_divides, shards, stage_layers
from .spec import ModelSpec

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """Bytes on each rank of a pipeline stage; degrees divide the model, so all of them hold the same.

    ``cache_bytes_per_token`` counts the stage's layers only. MLA's latent is the same on all TP ranks.
    """

    ranks: range
    layers: range
    weight_bytes: dict[str, int]
    cache_bytes_per_token: int
    activation_bytes: int

    @property
    def fixed_bytes(self) -> int:
        return sum(self.weight_bytes.values()) + self.activation_bytes

    def cache_tokens(self, budget_bytes: int) -> int:
        """Tokens whose cache fits beside weights and activations into ``budget_bytes``; 0 when not even those fit."""
        return max(0, budget_bytes - self.fixed_bytes) // self.cache_bytes_per_token


def plan_stages(
    spec: ModelSpec, grid: Grid, precision: Precision, activations: int, mtp: bool = True
) -> Iterator[StagePlan]:
    """The plan of every pipeline stage, with so many bytes for ``activations``.

    Raises InputError for degrees that do not divide the model, or not between FP8 scale blocks or INT4 groups.
    """
    check_divides(spec, grid)
    for stage in range(grid.pp):
        first = stage * grid.stage_ranks
        held = list(shards(spec, grid, first, mtp))
        if precision.weights.dtype == "fp8":
            _check_blocks(spec, held)
        check_groups(held, precision.weights)
        layers = stage_layers(spec, grid, stage)
        cached = len(layers) + (spec.num_nextn_predict_layers if mtp and stage == grid.pp - 1 else 0)
        yield StagePlan(
            range(first, first + grid.stage_ranks),
            layers,
            weight_bytes(held, precision.weights),
            cached * cache_bytes(spec, precision.cache),
            activations,
        )


def weight_bytes(held: Iterable[Shard], holding: Holding) -> dict[str, int]:
    """Bytes of a rank's parts of parameters by `Param.group`."""
    total: Counter[str] = Counter()
    for shard in held:
        total[shard.param.group] += shard_bytes(shard, holding)
    return dict(total)


def activation_bytes(spec: ModelSpec, grid: Grid, tokens: int, outputs: int) -> int:
    """An upper estimate of what one step keeps at once: residual, one layer's attention or experts, and FP32 logits.

    ``tokens`` run in a step at most, ``outputs`` of them get logits.
    """
    heads = spec.num_attention_heads // grid.tp
    residual = 4 * spec.hidden_size
    attention = heads * (2 * spec.qk_head_dim + 2 * spec.v_head_dim) + (spec.q_lora_rank or 0) + spec.latent_dim
    routed = spec.num_experts_per_tok * (3 * spec.moe_intermediate_size // grid.expert_slices + 2 * spec.hidden_size)
    dense = 3 * spec.intermediate_size // grid.tp
    return 2 * tokens * (residual + max(attention, routed, dense)) + 8 * outputs * spec.vocab_size


def _check_blocks(spec: ModelSpec, held: Iterable[Shard]) -> None:
    """FP8 weights are split between whole scale blocks, or into equal parts of one."""
    if spec.fp8 is None:
        return
    for shard in held:
        for window, block in zip((shard.rows, shard.cols), spec.fp8.block, strict=True):
            part = window[1] - window[0] if window else block
            if shard.param.quantised and part % block and block % part:
                raise InputError(
                    f"parts of {part} of {shard.param.name} cut its scale blocks of {block}",
                    "parallel",
                    "choose degrees whose parts are multiples or divisors of the block, or dtype bf16",
                )
