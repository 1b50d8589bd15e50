"""The kernels of one MoE layer in their order, as a decode step of few tokens launches them, for `bench_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepspan.backends.torch_triton.kernels import (
    absorb,
    experts,
    few_rows,
    mla_decode,
    norm,
    quant,
    rope_cache,
    router,
    values,
)
from deepspan.backends.torch_triton.kernels.kv_b import KvB
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight
from deepspan.models.catalog import load_spec
from deepspan.scripts.kernel_cases import LATENT, PAGE, ROPE, Case, Setting, random_stack
from deepspan.scripts.kernel_formats import random_codes, random_rows, random_scales

HIDDEN, QUERY_LATENT, HEADS = 7168, 1536, 128
SPEC = load_spec("deepseek_v3")


class Layer(NamedTuple):
    """Weights of one layer but its experts, which layers share here."""

    down_projections: Fp8Weight  # q_a and kv_a
    q_b: Fp8Weight
    kv_b: KvB
    o: Fp8Weight
    router: Tensor
    bias: Tensor
    cache: Tensor


class Step(NamedTuple):
    """What a step's layers share."""

    norms: dict[int, Tensor]  # by width
    tables: rope_cache.Tables
    room: router.Scratch
    position: Tensor
    blocks: Tensor
    lengths: Tensor
    stack: experts.Stack


def run(layer: Layer, step: Step, residual: Tensor, branch: Tensor) -> Tensor:
    """One layer: 13 launches for one token, 14 for several. Returns the experts' partial results, or their sum."""
    tokens = len(residual)
    first = norm.add_norm_quantise(branch, residual, step.norms[HIDDEN], 1e-6)
    assert first.quantised is not None and first.residual is not None
    latents = few_rows.few_rows(first.quantised, layer.down_projections)
    query = norm.add_norm_quantise(latents[:, :QUERY_LATENT], None, step.norms[QUERY_LATENT], 1e-6).quantised
    assert query is not None
    q = few_rows.few_rows(query, layer.q_b).view(tokens, HEADS, 192)
    absorbed = absorb.absorb(
        q, layer.kv_b, latents[:, QUERY_LATENT:], step.norms[LATENT], 1e-6, step.position, step.position, step.tables,
        layer.cache,
    )  # fmt: skip
    context = PAGE * step.blocks.shape[1]
    parts = mla_decode.attend(absorbed, layer.cache, step.blocks, step.lengths, 0.04, LATENT, context)
    attended = few_rows.few_rows(values.values(parts, layer.kv_b, 128, quantise=True), layer.o)
    second = norm.add_norm_quantise(attended, first.residual, step.norms[HIDDEN], 1e-6, plain=True)
    assert second.quantised is not None and second.plain is not None
    choice = router.choose_experts(second.plain, layer.router, layer.bias, SPEC, step.room, shared=1)
    config = experts.choose(choice.ids, step.stack, quant.chip_of(choice.ids.device))
    experts_of = len(step.stack.down.codes)
    pairs = experts.group(choice.ids, experts_of, config)
    h = experts.gate_up(second.quantised, choice.ids, step.stack, pairs, config)
    return experts.down(quant.quantise(h), choice.ids, choice.weights, step.stack, pairs, config=config)


def chain(setting: Setting) -> Iterator[Case]:
    device = setting.device
    stack = random_stack(device, setting.experts)
    for tokens, context in ((1, 1024), (8, 1024)):
        blocks = tokens * context // PAGE
        layers = [_layer(device, blocks) for _ in range(4 if setting.copies_of else 1)]
        step = _step(device, tokens, blocks, stack)
        parts = 9 if tokens > 1 else 1
        residual, branch = random_rows(device, tokens, HIDDEN), torch.randn(tokens, parts, HIDDEN, device=device)
        hit = _experts_hit(step, layers, residual)
        dense = 2112 * 7168 + 24576 * 1536 + 32768 * 512 + 7168 * 16384 + 256 * 7168 * 2 + tokens * context * 1152
        moved = dense + int(hit * 3 * 2048 * 7168)
        runs = [partial(run, layer, step, residual, branch) for layer in layers]
        yield Case("layer", f"T{tokens} x {context}, {hit:.1f} experts", "chosen", moved, 0, runs)


def _layer(device: torch.device, blocks: int) -> Layer:
    def matrix(outputs: int, inputs: int) -> Fp8Weight:
        scales = random_scales(device, -(-outputs // 128), inputs // 128)
        return Fp8Weight(random_codes(device, outputs, inputs), scales)

    return Layer(
        matrix(2112, 7168), matrix(24576, 1536), KvB(matrix(32768, 512), HEADS), matrix(7168, 16384),
        random_rows(device, 256, HIDDEN), torch.rand(256, device=device) * 0.1,
        random_rows(device, blocks, PAGE, LATENT + ROPE),
    )  # fmt: skip


def _step(device: torch.device, tokens: int, blocks: int, stack: experts.Stack) -> Step:
    table = torch.randperm(blocks, device=device).int().view(tokens, -1)
    return Step(
        {width: torch.rand(width, device=device) for width in (HIDDEN, QUERY_LATENT, LATENT)},
        rope_cache.Tables(*torch.rand(2, 4096, ROPE // 2, device=device)),
        router.scratch(tokens, 256, device), torch.arange(tokens, device=device), table,
        torch.full((tokens,), PAGE * table.shape[1], dtype=torch.int32, device=device), stack,
    )  # fmt: skip


def _experts_hit(step: Step, layers: list[Layer], residual: Tensor) -> float:
    """The experts that a layer's tokens choose are not those of its timed run, but as many, on average."""
    hit = 0
    for layer in layers:
        x = random_rows(residual.device, *residual.shape)
        hit += len(router.choose_experts(x, layer.router, layer.bias, SPEC, step.room, shared=1).ids.unique())
    return hit / len(layers)
