"""What `bench_kernels.py` times: launches of every decode kernel at DeepSeek-V3 sizes, with the bytes they must move.

Weights and caches come in several copies that launches take turns with, so that none is in the chip's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspan.backends.torch_triton.cache import FP8_CACHE, to_entries
from deepspan.backends.torch_triton.kernels import experts, few_rows, mla_decode, norm, quant, rope_cache, router
from deepspan.backends.torch_triton.kernels.weights import Int4Weight
from deepspan.models.catalog import load_spec
from deepspan.scripts.kernel_formats import (
    FP8_KIND,
    INT4_KIND,
    INT8_KIND,
    Kind,
    bytes_of,
    bytes_of_value,
    random_rows,
)

LATENT, ROPE, PAGE = 512, 64, 64


class Sizes(NamedTuple):
    """Of V3: outputs and inputs of dense products, and of a gated one; experts; batch, context and heads."""

    dense: Sequence[tuple[int, int]] = (
        (2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (7168, 18432),
    )  # fmt: skip
    gated: tuple[int, int] = (36864, 7168)
    hidden: int = 7168
    width: int = 2048
    attention: Sequence[tuple[int, int, int]] = (
        (1, 1024, 128), (1, 8192, 128), (1, 65536, 128), (32, 4096, 128), (32, 8192, 128), (128, 1024, 128),
        (128, 4096, 128), (128, 4096, 16), (128, 8192, 16),
    )  # fmt: skip


V3 = Sizes()


class Setting(NamedTuple):
    device: torch.device
    sweep: bool  # other configurations than the chosen ones too
    copies_of: int = 1 << 29  # bytes that together no cache holds
    experts: int = 257
    sizes: Sizes = V3


class Case(NamedTuple):
    """``runs`` are equal launches on different data; ``error`` is a relative norm against the eager twin."""

    kernel: str
    shape: str
    config: str
    moved: int  # bytes
    operations: int
    runs: Sequence[Callable[[], object]]
    error: Callable[[], float] | None = None


def _distance(run: Callable[[], Tensor], twin: Callable[[], Tensor], add: bool = False) -> float:
    """``add``: both are partial results over dimension 1, or may be."""
    got, want = run().double(), twin().double()
    if add:
        got, want = (x.sum(1) if x.dim() == 3 else x for x in (got, want))
    return float((got - want).norm() / want.norm())


# Dense products -------------------------------------------------------------------------------------------------------


def dense(setting: Setting, kind: Kind = FP8_KIND) -> Iterator[Case]:
    for (outputs, inputs), rows in itertools.product(setting.sizes.dense, (1, 8, 64)):
        yield from _dense(setting, kind, outputs, inputs, rows, gated=False)
    for rows in (1, 8, 64):
        yield from _dense(setting, kind, *setting.sizes.gated, rows, gated=True)


def _dense(setting: Setting, kind: Kind, outputs: int, inputs: int, rows: int, gated: bool) -> Iterator[Case]:
    device = setting.device
    first = kind.weight(device, outputs, inputs)
    size = bytes_of(first)
    weights = [first, *(kind.weight(device, outputs, inputs) for _ in range(setting.copies_of // size))]
    x = kind.operand(random_rows(device, rows, inputs))
    twin = partial(few_rows.few_rows_eager, x, first, gated=gated)
    width = outputs // 2 if gated else outputs
    chosen = few_rows.choose(rows, width, inputs, gated, quant.chip_of(device), isinstance(first, Int4Weight))
    for label, config in [("chosen", chosen), *(_dense_sweep(chosen, gated) if setting.sweep else [])]:
        runs = [partial(few_rows.few_rows, x, weight, gated=gated, config=config) for weight in weights]
        yield Case(
            "few_rows gated" if gated else "few_rows",
            f"{outputs}x{inputs} M{rows}",
            f"{label} {tuple(config)}",
            size + rows * (bytes_of_value(x) * inputs + 2 * width),
            2 * rows * outputs * inputs,
            runs,
            partial(_distance, runs[0], twin),
        )


def _dense_sweep(chosen: few_rows.Config, gated: bool) -> Iterator[tuple[str, few_rows.Config]]:
    for tile, stages, splits in itertools.product((64, 128), (3, 4, 6), (1,) if gated else (1, 2, 3, 4, 6, 8)):
        config = few_rows.Config(chosen.block_m, tile // 2 if gated else tile, splits, 4, stages)
        if (tile + chosen.block_m) * 128 * stages < 200 << 10:
            yield "sweep", config


# Experts --------------------------------------------------------------------------------------------------------------


def grouped(setting: Setting, kind: Kind = FP8_KIND) -> Iterator[Case]:
    stack = random_stack(setting.device, setting.experts, kind, setting.sizes)
    for tokens in (1, 8, 32, 128):
        yield from _experts(setting, kind, stack, tokens)


def random_stack(device: torch.device, count: int, kind: Kind = FP8_KIND, sizes: Sizes = V3) -> experts.Stack:
    """``count`` experts."""
    gate_up = kind.weight(device, count, 2 * sizes.width, sizes.hidden)
    return experts.Stack(gate_up, kind.weight(device, count, sizes.hidden, sizes.width))


def _choices(setting: Setting, tokens: int) -> Tensor:
    """Eight routed experts for each token, evenly, and the shared one, the last."""
    routed = torch.rand(tokens, setting.experts - 1, device=setting.device).topk(8).indices
    return torch.cat([routed, torch.full_like(routed[:, :1], setting.experts - 1)], 1).int()


def _experts(setting: Setting, kind: Kind, stack: experts.Stack, tokens: int) -> Iterator[Case]:
    hidden, width = setting.sizes.hidden, setting.sizes.width
    choices = [_choices(setting, tokens) for _ in range(8)]
    weights = torch.rand(tokens, 9, device=setting.device)
    x = kind.operand(random_rows(setting.device, tokens, hidden))
    chosen = experts.choose(choices[0], stack, quant.chip_of(setting.device))
    tiles = [experts.group(ids, setting.experts, chosen) for ids in choices]
    h = kind.operand(experts.gate_up(x, choices[0], stack, tiles[0], chosen))
    hit = sum(len(ids.unique()) for ids in choices) / len(choices)  # the copies differ; bytes are their mean
    pairs = 9 * tokens
    up_bytes, down_bytes = (round(hit * bytes_of(weight) / setting.experts) for weight in stack)
    value_bytes = bytes_of_value(x)
    shape = f"T{tokens}, {hit:.1f} experts"
    if tokens > 1:
        groupings = [partial(experts.group, ids, setting.experts, chosen) for ids in choices]
        yield Case("experts.group", shape, "chosen", 8 * pairs, 0, groupings)
    for label, config in [("chosen", chosen), *(_experts_sweep(chosen) if setting.sweep else [])]:
        name = f"{label} {tuple(config)}"
        arguments = list(zip(choices, tiles, strict=True))
        ups = [partial(experts.gate_up, x, ids, stack, tile, config) for ids, tile in arguments]
        up_twin = partial(experts.gate_up_eager, x, choices[0], stack)
        yield Case(
            "experts.gate_up", shape, name, up_bytes + tokens * hidden * value_bytes + pairs * 2 * width,
            2 * pairs * 2 * width * hidden, ups, partial(_distance, ups[0], up_twin),
        )  # fmt: skip
        downs = [partial(experts.down, h, ids, weights, stack, tile, config=config) for ids, tile in arguments]
        down_twin = partial(experts.down_eager, h, choices[0], weights, stack)
        yield Case(
            "experts.down", shape, name, down_bytes + pairs * (width * value_bytes + 4 * hidden),
            2 * pairs * hidden * width, downs, partial(_distance, downs[0], down_twin, add=True),
        )  # fmt: skip


def _experts_sweep(chosen: experts.Config) -> Iterator[tuple[str, experts.Config]]:
    up = ((32, 3), (32, 4), (32, 6), (64, 3), (64, 4), (64, 6), (64, 7), (64, 9))
    down = ((64, 3), (64, 4), (64, 6), (128, 3), (128, 4), (128, 5), (128, 6), (64, 8))
    for (up_n, up_stages), (down_n, down_stages) in zip(up, down, strict=True):
        yield "sweep", experts.Config(chosen.block_m, up_n, up_stages, down_n, down_stages)


# Attention ------------------------------------------------------------------------------------------------------------


def attention(setting: Setting, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """``dtype``: of the cache."""
    for batch, context, heads in setting.sizes.attention:
        yield from _attention(setting, dtype, batch, context, heads)


def _attention(setting: Setting, dtype: torch.dtype, batch: int, context: int, heads: int) -> Iterator[Case]:
    device = setting.device
    entry = to_entries(random_rows(device, LATENT + ROPE), LATENT, dtype)
    size = batch * context * entry.nbytes
    pages = batch * context // PAGE
    caches = [
        (
            to_entries(random_rows(device, pages, PAGE, LATENT + ROPE), LATENT, dtype),
            torch.randperm(pages, device=device).int().view(batch, -1),
            torch.full((batch,), context, dtype=torch.int32, device=device),
        )
        for _ in range(1 + setting.copies_of // size)
    ]
    q = random_rows(device, batch, heads, LATENT + ROPE)
    chip = quant.chip_of(device)
    config = mla_decode.choose(batch, heads, context, q, caches[0][0], LATENT, chip)
    parts = mla_decode.parts_for(batch, heads, context, config, chip)
    chosen = ("chosen", config, parts)
    for label, config, part in [chosen, *(_attention_sweep(heads, parts) if setting.sweep else [])]:
        runs = [partial(_attended, q, *cache, 0.04, LATENT, context, part, config) for cache in caches]
        yield Case(
            "mla_decode",
            f"{batch} x {context}, {heads} heads",
            f"{label} {tuple(config)} parts {part}",
            size + batch * heads * (2 * LATENT + ROPE) * 2,
            2 * batch * context * heads * (2 * LATENT + ROPE),
            runs,
            partial(_distance, runs[0], partial(mla_decode.attend_eager, q, *caches[0], 0.04, LATENT)),
        )


def _attended(*arguments: Any) -> Tensor:
    return mla_decode.merged(mla_decode.attend(*arguments))


def _attention_sweep(heads: int, parts: int) -> list[tuple[str, mla_decode.Config, int]]:
    few = ((16, 64, 4, 2), (16, 32, 4, 4), (16, 64, 8, 2))
    many = ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3))
    configs = [mla_decode.Config(*tile) for tile in (few if heads <= 16 else many)]
    return [("sweep", config, part) for config in configs for part in sorted({parts, 2 * parts, max(1, parts // 2)})]


# Formats --------------------------------------------------------------------------------------------------------------


def int8_weights(setting: Setting) -> Iterator[Case]:
    """INT8 with a scale for each row, as `dense` and `grouped` time FP8."""
    yield from dense(setting, INT8_KIND)
    yield from grouped(setting, INT8_KIND)


def int4_weights(setting: Setting) -> Iterator[Case]:
    yield from dense(setting, INT4_KIND)
    yield from grouped(setting, INT4_KIND)


def fp8_cache(setting: Setting) -> Iterator[Case]:
    yield from attention(setting, FP8_CACHE)


# Small kernels --------------------------------------------------------------------------------------------------------


def small(setting: Setting) -> Iterator[Case]:
    """Norms, the router, RoPE with the cache write: microseconds of latency rather than bytes."""
    device = setting.device
    spec = load_spec("deepseek_v3")
    weight, bias = random_rows(device, 256, 7168), torch.randn(256, device=device)
    hidden_norm, latent_norm = torch.rand(7168, device=device), torch.rand(LATENT, device=device)
    tables = rope_cache.Tables(torch.rand(4096, 32, device=device), torch.rand(4096, 32, device=device))
    for tokens in (1, 8, 64):
        x = random_rows(device, tokens, 7168)
        for parts in (1, 9):
            branch = torch.randn(tokens, parts, 7168, device=device)
            branch = branch.squeeze(1).bfloat16() if parts == 1 else branch
            add_norm = partial(norm.add_norm_quantise, branch, x, hidden_norm, 1e-6)
            yield Case(
                "add_norm_quantise", f"T{tokens} P{parts}", "chosen", branch.nbytes + tokens * 7168 * 5, 0, [add_norm]
            )
        room = router.scratch(tokens, 256, device)
        route = partial(_router_weights, x, weight, bias, spec, room)
        route_twin = partial(_router_twin, x, weight, bias, spec)
        moved = weight.numel() * 2 + tokens * 7168 * 2
        error = partial(_distance, route, route_twin)
        yield Case("router", f"T{tokens}", "chosen", moved, 2 * tokens * weight.numel(), [route], error)
        quantise = partial(quant.quantise, random_rows(device, 9 * tokens, 2048))
        yield Case("quantise", f"T{9 * tokens} x 2048", "chosen", 9 * tokens * 2048 * 3, 0, [quantise])
        kv, q = random_rows(device, tokens, LATENT + ROPE), random_rows(device, tokens, 128, 192)[:, :, 128:]
        at = torch.arange(tokens, device=device)
        cache = random_rows(device, tokens, PAGE, LATENT + ROPE)
        rope = partial(rope_cache.rope_cache, kv, latent_norm, 1e-6, q, q, at, at, tables, cache)
        yield Case("rope_cache", f"T{tokens}", "chosen", tokens * (2 * 576 * 2 + 128 * 64 * 4), 0, [rope])


def _router_weights(*arguments: object) -> Tensor:
    return router.choose_experts(*arguments).weights  # type: ignore[arg-type]


def _router_twin(*arguments: object) -> Tensor:
    return router.choose_experts_eager(*arguments).weights  # type: ignore[arg-type]
