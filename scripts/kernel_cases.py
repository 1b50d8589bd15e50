"""What `bench_kernels.py` times: launches of every decode kernel at DeepSeek-V3 sizes, with the bytes they must move.

Weights and caches come in several copies that launches take turns with, so that none is in the chip's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepspan.backends.torch_triton.kernels import experts, few_rows, mla_decode, quant, rope_cache, router
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight
from deepspan.models.catalog import load_spec

FP8 = torch.float8_e4m3fn
DENSE = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (7168, 18432))
LATENT, ROPE, PAGE = 512, 64, 64


class Setting(NamedTuple):
    device: torch.device
    sweep: bool  # other configurations than the chosen ones too
    copies_of: int = 1 << 29  # bytes that together no cache holds
    experts: int = 257


class Case(NamedTuple):
    """``runs`` are equal launches on different data; ``error`` is a relative norm against the eager twin."""

    kernel: str
    shape: str
    config: str
    moved: int  # bytes
    operations: int
    runs: Sequence[Callable[[], object]]
    error: Callable[[], float] | None = None


def random_codes(device: torch.device, *shape: int) -> Tensor:
    """Random e4m3 codes of all magnitudes up to 240, none NaN."""
    raw = torch.randint(0, 240, shape, dtype=torch.uint8, device=device)
    return raw.add_((raw >= 120).to(torch.uint8).mul_(8)).view(FP8)


def random_scales(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, device=device) * 1e-3


def random_rows(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _distance(run: Callable[[], Tensor], twin: Callable[[], Tensor], add: bool = False) -> float:
    """``add``: both are partial results over dimension 1, or may be."""
    got, want = run().double(), twin().double()
    if add:
        got, want = (x.sum(1) if x.dim() == 3 else x for x in (got, want))
    return float((got - want).norm() / want.norm())


# Dense products -------------------------------------------------------------------------------------------------------


def dense(setting: Setting) -> Iterator[Case]:
    for (outputs, inputs), rows in itertools.product(DENSE, (1, 8, 64)):
        yield from _dense(setting, outputs, inputs, rows, gated=False)
    for rows in (1, 8, 64):
        yield from _dense(setting, 36864, 7168, rows, gated=True)


def _dense(setting: Setting, outputs: int, inputs: int, rows: int, gated: bool) -> Iterator[Case]:
    size = outputs * inputs
    device = setting.device
    weights = [
        Fp8Weight(random_codes(device, outputs, inputs), random_scales(device, -(-outputs // 128), inputs // 128))
        for _ in range(1 + setting.copies_of // size)
    ]
    x = quant.quantise(random_rows(device, rows, inputs))
    twin = partial(few_rows.few_rows_eager, x, weights[0], gated=gated)
    width = outputs // 2 if gated else outputs
    chosen = few_rows.choose(rows, width, inputs, gated, quant.chip_of(device))
    for label, config in [("chosen", chosen), *(_dense_sweep(chosen, gated) if setting.sweep else [])]:
        runs = [partial(few_rows.few_rows, x, weight, gated=gated, config=config) for weight in weights]
        yield Case(
            "few_rows gated" if gated else "few_rows",
            f"{outputs}x{inputs} M{rows}",
            f"{label} {tuple(config)}",
            size + rows * (inputs + 2 * width),
            2 * rows * size,
            runs,
            partial(_distance, runs[0], twin),
        )


def _dense_sweep(chosen: few_rows.Config, gated: bool) -> Iterator[tuple[str, few_rows.Config]]:
    for block_n, stages, splits in itertools.product((64, 128), (3, 4, 6), (1,) if gated else (1, 2, 3, 4, 6, 8)):
        config = few_rows.Config(chosen.block_m, block_n // 2 if gated else block_n, splits, 4, stages)
        if (block_n + chosen.block_m) * 128 * stages < 200 << 10:
            yield "sweep", config


# Experts --------------------------------------------------------------------------------------------------------------


def grouped(setting: Setting) -> Iterator[Case]:
    device, count = setting.device, setting.experts
    stack = random_stack(device, count)
    for tokens in (1, 8, 32, 128):
        yield from _experts(setting, stack, tokens)


def random_stack(device: torch.device, count: int) -> experts.Stack:
    """``count`` experts of V3."""
    return experts.Stack(
        Fp8Weight(random_codes(device, count, 4096, 7168), random_scales(device, count, 32, 56)),
        Fp8Weight(random_codes(device, count, 7168, 2048), random_scales(device, count, 56, 16)),
    )


def _choices(setting: Setting, tokens: int) -> Tensor:
    """Eight routed experts for each token, evenly, and the shared one, the last."""
    routed = torch.rand(tokens, setting.experts - 1, device=setting.device).topk(8).indices
    return torch.cat([routed, torch.full_like(routed[:, :1], setting.experts - 1)], 1).int()


def _experts(setting: Setting, stack: experts.Stack, tokens: int) -> Iterator[Case]:
    choices = [_choices(setting, tokens) for _ in range(8)]
    weights = torch.rand(tokens, 9, device=setting.device)
    x = quant.quantise(random_rows(setting.device, tokens, 7168))
    chosen = experts.choose(tokens, quant.chip_of(setting.device))
    tiles = [
        experts.group(ids, setting.experts, chosen) if tokens > 1 else experts.one_pair_tiles(ids) for ids in choices
    ]
    h = quant.quantise(experts.gate_up(x, choices[0], stack, tiles[0]))
    hit = sum(len(ids.unique()) for ids in choices) / len(choices)  # the copies differ; bytes are their mean
    pairs = 9 * tokens
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
            "experts.gate_up", shape, name, int(hit * 4096 * 7168) + tokens * 7168 + pairs * 4096,
            2 * pairs * 4096 * 7168, ups, partial(_distance, ups[0], up_twin),
        )  # fmt: skip
        downs = [partial(experts.down, h, ids, weights, stack, tile, config=config) for ids, tile in arguments]
        down_twin = partial(experts.down_eager, h, choices[0], weights, stack)
        yield Case(
            "experts.down", shape, name, int(hit * 7168 * 2048) + pairs * (2048 + 4 * 7168),
            2 * pairs * 7168 * 2048, downs, partial(_distance, downs[0], down_twin, add=True),
        )  # fmt: skip


def _experts_sweep(chosen: experts.Config) -> Iterator[tuple[str, experts.Config]]:
    up = ((32, 3), (32, 4), (32, 6), (64, 3), (64, 4), (64, 6), (64, 7), (64, 9))
    down = ((64, 3), (64, 4), (64, 6), (128, 3), (128, 4), (128, 5), (128, 6), (64, 8))
    for (up_n, up_stages), (down_n, down_stages) in zip(up, down, strict=True):
        yield "sweep", experts.Config(chosen.block_m, up_n, up_stages, down_n, down_stages)


# Attention ------------------------------------------------------------------------------------------------------------


def attention(setting: Setting) -> Iterator[Case]:
    for batch, context, heads in (
        (1, 1024, 128), (1, 8192, 128), (1, 65536, 128), (32, 4096, 128), (128, 1024, 128), (128, 4096, 128),
        (128, 4096, 16), (128, 8192, 16),
    ):  # fmt: skip
        yield from _attention(setting, batch, context, heads)


def _attention(setting: Setting, batch: int, context: int, heads: int) -> Iterator[Case]:
    device = setting.device
    size = batch * context * (LATENT + ROPE) * 2
    pages = batch * context // PAGE
    caches = [
        (
            random_rows(device, pages, PAGE, LATENT + ROPE),
            torch.randperm(pages, device=device).int().view(batch, -1),
            torch.full((batch,), context, dtype=torch.int32, device=device),
        )
        for _ in range(1 + setting.copies_of // size)
    ]
    q = random_rows(device, batch, heads, LATENT + ROPE)
    chip = quant.chip_of(device)
    config = mla_decode.choose(heads, chip, fp8=False)
    parts = mla_decode.parts_for(batch, heads, context, config, chip)
    chosen = ("chosen", config, parts)
    for label, config, part in [chosen, *(_attention_sweep(heads, parts) if setting.sweep else [])]:
        runs = [partial(mla_decode.mla_decode, q, *cache, 0.04, LATENT, context, part, config) for cache in caches]
        yield Case(
            "mla_decode",
            f"{batch} x {context}, {heads} heads",
            f"{label} {tuple(config)} parts {part}",
            size + batch * heads * (2 * LATENT + ROPE) * 2,
            2 * batch * context * heads * (2 * LATENT + ROPE),
            runs,
            partial(_distance, runs[0], partial(mla_decode.mla_decode_eager, q, *caches[0], 0.04, LATENT)),
        )


def _attention_sweep(heads: int, parts: int) -> list[tuple[str, mla_decode.Config, int]]:
    few = ((16, 64, 4, 2), (16, 32, 4, 4), (16, 64, 8, 2))
    many = ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3))
    configs = [mla_decode.Config(*tile) for tile in (few if heads <= 16 else many)]
    return [("sweep", config, part) for config in configs for part in sorted({parts, 2 * parts, max(1, parts // 2)})]


# Small kernels --------------------------------------------------------------------------------------------------------


def small(setting: Setting) -> Iterator[Case]:
    """Norms, the router, RoPE with the cache write: microseconds of latency rather than bytes."""
    device = setting.device
    spec = load_spec("deepseek_v3")
    weight, bias = random_rows(device, 256, 7168), torch.randn(256, device=device)
    norm, latent_norm = torch.rand(7168, device=device), torch.rand(LATENT, device=device)
    tables = rope_cache.Tables(torch.rand(4096, 32, device=device), torch.rand(4096, 32, device=device))
    for tokens in (1, 8, 64):
        x = random_rows(device, tokens, 7168)
        for parts in (1, 9):
            branch = torch.randn(tokens, parts, 7168, device=device)
            branch = branch.squeeze(1).bfloat16() if parts == 1 else branch
            add_norm = partial(quant.add_norm_quantise, branch, x, norm, 1e-6)
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
