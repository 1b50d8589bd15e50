"""Compile every kernel, in every configuration that its launcher chooses, for one chip. Needs no GPU.

`python tests/kernels/compile_for.py sm_90` runs the launchers on tensors without memory, of the sizes of DeepSeek-V3
671B, and compiles what they would have launched. Prints one JSON object: the variants of each kernel.
"""

import collections
import itertools
import json
import sys
from collections.abc import Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from deepspan.backends.torch_triton.cache import FP8_CACHE
from deepspan.backends.torch_triton.kernels import (
    absorb,
    best,
    chips,
    combine,
    decoded,
    embed,
    entries,
    experts,
    few_rows,
    gate,
    gather,
    grouped,
    grouped_hopper,
    int8,
    logits,
    mla_decode,
    norm,
    pairs,
    peers,
    prompt_attention,
    quant,
    rope_cache,
    router,
    values,
)
from deepspan.backends.torch_triton.kernels.kv_b import KvB
from deepspan.backends.torch_triton.kernels.weights import Fp8Weight, Int4Weight, Int8Weight, Weight
from deepspan.models.catalog import load_spec

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8",
}  # fmt: skip
ROWS = (1, 8, 64)


def target_of(chip: chips.Chip) -> GPUTarget:
    name = chip.name
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


class Launches:
    """Takes the place of `JITFunction.run`: remembers what would be compiled, as Triton specialises it."""

    def __init__(self, chip: chips.Chip):
        self.chip = chip
        self.variants: dict[str, tuple] = {}

    def record(self, kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        options = {name: value for name, value in kwargs.items() if name not in names}
        signature, constants, attributes = {}, {}, {}
        for i, param in enumerate(kernel.params):
            value = values[param.name]
            signature[param.name] = "constexpr"
            special = type(value) is int and not param.do_not_specialize
            if param.is_constexpr or value is None or (special and value == 1):
                constants[(i,)] = value
                continue
            signature[param.name] = _type(value)
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = repr((kernel.fn.__qualname__, kernel.fn.__module__, signature, constants, attributes, options))
        self.variants.setdefault(key, (kernel, signature, constants, attributes, options))

    def compile(self) -> dict[str, int]:
        count: dict[str, int] = collections.Counter()
        for kernel, signature, constants, attributes, options in self.variants.values():
            source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
            binary = triton.compile(source, target=target_of(self.chip), options=options)
            name = f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.fn.__qualname__}"
            assert binary.metadata.shared <= self.chip.shared_memory, f"{name}: {binary.metadata.shared} bytes shared"
            count[name] += 1
        return count


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights(chip: chips.Chip, *shape: int, rare: bool = True) -> Iterator[Weight]:
    """A matrix or a stack in every form that a kernel tells apart; without the rare ones, every one with own tiles."""
    *stack, outputs, inputs = shape
    blocks = empty(*stack, -(-outputs // 128), -(-inputs // 128), dtype=torch.float32)
    yield Fp8Weight(empty(*shape, dtype=chip.fp8), blocks)
    yield Int8Weight(empty(*shape, dtype=torch.int8), empty(*shape[:-1], dtype=torch.float32))
    codes = empty(*stack, inputs // 128, outputs, 32, dtype=torch.int16)
    yield Int4Weight(codes, empty(*stack, inputs // 128, outputs, dtype=torch.int32), inputs)
    if not rare:
        return
    yield Int8Weight(empty(*shape, dtype=torch.int8), blocks)
    for group in (32, 64):
        yield Int4Weight(codes, empty(*stack, inputs // group, outputs, dtype=torch.int32), inputs)
    order = empty(*stack, inputs, dtype=torch.int32)
    yield Int4Weight(codes, empty(*stack, inputs // 128, outputs, dtype=torch.int32), inputs, order)


def activations(chip: chips.Chip, weight: Weight, rows: int, channels: int):
    """As ``weight`` takes them; BF16 and, where the chip multiplies them, codes for FP8."""
    if isinstance(weight, Int8Weight):
        yield int8.quantise_rows(empty(rows, channels))
        return
    yield empty(rows, channels)
    if chip.fp8_units and isinstance(weight, Fp8Weight):
        yield quant.quantise(empty(rows, channels))


def launch_quant(chip: chips.Chip) -> None:
    for tokens, channels in ((1, 7168), (2, 1536), (128, 7168)):
        for branch in (empty(tokens, channels), empty(tokens, 9, channels, dtype=torch.float32)):
            for form in (None, "int8", "fp8")[: 2 + chip.fp8_units]:
                residual = empty(tokens, channels)
                norm.add_norm_quantise(branch, residual, empty(channels), 1e-6, form is None, form)
    if chip.fp8_units:
        for tokens in (600, 6000):
            quant.quantise(empty(tokens, 4096), gated=True)
    for channels in (2048, 18432):
        int8.quantise_rows(empty(600, 2 * channels), gated=True)


def launch_few_rows(chip: chips.Chip) -> None:
    for rows in ROWS:
        for outputs, inputs in ((24576, 1536), (2112, 7168), (7168, 16384), (7168, 2048)):
            for weight in weights(chip, outputs, inputs, rare=(rows, inputs) == (8, 16384)):
                for x in activations(chip, weight, rows, inputs):
                    few_rows.few_rows(x, weight)
        for weight in weights(chip, 36864, 7168, rare=False):
            for x in activations(chip, weight, rows, 7168):
                few_rows.few_rows(x, weight, gated=True)


def launch_experts(chip: chips.Chip) -> None:
    for tokens in (1, 16, 256):
        shapes = (257, 4096, 7168), (257, 7168, 2048)
        stacks = zip(*(weights(chip, *shape, rare=tokens == 16) for shape in shapes), strict=True)
        ids, factors = empty(tokens, 9, dtype=torch.int32), empty(tokens, 9, dtype=torch.float32)
        for stack in itertools.starmap(experts.Stack, stacks):
            config = experts.choose(ids, stack, chip)
            pairs = experts.group(ids, 257, config)
            for x in activations(chip, stack.gate_up, tokens, 7168):
                experts.gate_up(x, ids, stack, pairs)
            for h in activations(chip, stack.down, 9 * tokens, 2048):
                experts.down(h, ids, factors, stack, pairs)
            if tokens == 1:
                launch_part_of_experts(chip, stack, ids, factors)


def launch_part_of_experts(chip: chips.Chip, stack: experts.Stack, ids: torch.Tensor, factors: torch.Tensor) -> None:
    """One token, with a shared expert beside the stack's."""
    config = experts.choose(ids, stack, chip, 1 / 8)
    pairs = experts.group(ids, 257, config)
    for x in activations(chip, stack.gate_up, 1, 7168):
        experts.gate_up(x, ids, stack, pairs, config)
    for h in activations(chip, stack.down, 9, 2048):
        experts.down(h, ids, factors, stack, pairs, True, config, empty(1, 7168))


def launch_router(chip: chips.Chip) -> None:
    for name in ("deepseek_v3", "deepseek_v2_lite"):
        spec = load_spec(name)
        bias = empty(spec.n_routed_experts, dtype=torch.float32) if spec.topk_method == "noaux_tc" else None
        for tokens in (1, 64, 600):
            room = router.scratch(tokens, spec.n_routed_experts, torch.device("meta"))
            weight = empty(spec.n_routed_experts, spec.hidden_size)
            for held in (None, router.Held(32, 32, range(tokens))):
                x = empty(tokens, spec.hidden_size)
                router.choose_experts(x, weight, bias, spec, room, shared=1, held=held)


def caches():
    """One in BF16, one in FP8."""
    return empty(1000, 64, 576), empty(1000, 64, 656, dtype=FP8_CACHE)


def launch_mla(chip: chips.Chip) -> None:
    small_pages = empty(1000, 16, 576)  # which `mla_hopper` does not take
    for cache in (*caches(), small_pages):
        for heads, queries in ((16, 1), (16, 2), (128, 1))[2 * (cache is small_pages) :]:
            for parts in (1, 8) if cache.dtype == torch.bfloat16 or heads == 128 else (8,):
                launch_attend(cache, 8, heads, queries, longest=4096, parts=parts)
        for heads in (16, 128) if cache.dtype == torch.bfloat16 else ():
            launch_attend(cache, 1, heads, 1, longest=1056)
        entries.read_entries(cache, empty(5000, dtype=torch.int64), 512, 64)


def launch_attend(cache: torch.Tensor, sequences: int, heads: int, queries: int, **options: int) -> None:
    attended = mla_decode.attend(
        empty(sequences * queries, heads, 576), cache, empty(sequences, 99, dtype=torch.int32),
        empty(sequences, dtype=torch.int32), 0.1, 512, **options,
    )  # fmt: skip
    mla_decode.merged(attended)


def launch_around_attention(chip: chips.Chip) -> None:
    tables = rope_cache.Tables(empty(4096, 32, dtype=torch.float32), empty(4096, 32, dtype=torch.float32))
    for (heads, tokens), cache in itertools.product(((128, 1), (128, 128), (16, 8), (128, 600)), caches()):
        q, kv = empty(tokens, heads, 192), empty(tokens, 576)
        at = empty(tokens, dtype=torch.int32), empty(tokens, dtype=torch.int32)
        rope_cache.rope_cache(kv, empty(512), 1e-6, q[:, :, 128:], q[:, :, 128:], *at, tables, cache)
        for matrix in (empty(heads * 256, 512), next(weights(chip, heads * 256, 512))):
            absorb.absorb(q, KvB(matrix, heads), kv, empty(512), 1e-6, *at, tables, cache)


def launch_values(chip: chips.Chip) -> None:
    for heads, tokens, parts in itertools.product((16, 128), (1, 2, 4, 8), (1, 18, 66)):
        part = empty(tokens, heads, parts, 512, dtype=torch.float32)
        attended = mla_decode.Attended(part, empty(tokens, heads, parts, dtype=torch.float32))
        if parts == 1:
            attended = mla_decode.Attended(empty(tokens, heads, 512), None)
        if tokens * parts > 66:
            continue
        for matrix in (empty(heads * 256, 512), next(weights(chip, heads * 256, 512))):
            for quantise in (False, True)[: 1 + chip.fp8_units]:
                values.values(attended, KvB(matrix, heads), 128, quantise)
    at = empty(2, dtype=torch.int32), empty(2, dtype=torch.int32)
    tables = rope_cache.Tables(empty(4096, 8, dtype=torch.float32), empty(4096, 8, dtype=torch.float32))
    for latent in (64, 384):  # heads across scale blocks; latents that are no power of two
        attended, cache = mla_decode.Attended(empty(2, 8, latent), None), empty(1000, 64, latent + 16)
        for matrix in (empty(8 * 88, latent), next(weights(chip, 8 * 88, latent))):
            values.values(attended, KvB(matrix, 8), 56)
            absorb.absorb(
                empty(2, 8, 48), KvB(matrix, 8), empty(2, latent + 16), empty(latent), 1e-6, *at, tables, cache
            )


def launch_prompts(chip: chips.Chip) -> None:
    kv, rope, tiles = empty(5000, 128, 256), empty(5000, 576)[:, 512:], empty(16, 4, dtype=torch.int32)
    for config in (None, prompt_attention.plain(chip)):
        prompt_attention.prompt_attention(empty(1000, 128, 192), kv, rope, tiles, empty(1000, 128, 128), 0.1, config)
    sorted_pairs = pairs.sort_pairs(empty(600, 9, dtype=torch.int32), 257, 64)
    foreign_pairs = pairs.sort_pairs(empty(600, 9, dtype=torch.int32), 257, 64, foreign=True)
    for weight in weights(chip, 257, 4096, 7168, rare=False):
        for x in activations(chip, weight, 600, 7168):
            pairs.gather(x, foreign_pairs, 9)
    for gated in (False, True):
        gate.gate(empty(5400, 4096), foreign_pairs.own_1 if gated else None)
        int8.quantise_rows(empty(5400, 4096), gated, foreign_pairs.own_1)
        if chip.fp8_units:
            quant.quantise(empty(5400, 4096), False, gated, foreign_pairs.own_1)
    for weight in weights(chip, 257, 4096, 7168):
        for x in activations(chip, weight, 600, 7168):
            grouped.grouped(pairs.gather(x, sorted_pairs, 9), weight, sorted_pairs)
    for weight in weights(chip, 257, 7168, 2048, rare=False):
        for h in activations(chip, weight, 5400, 2048):
            grouped.grouped(h, weight, sorted_pairs, empty(600, 9, dtype=torch.float32))
    for weight in filter(lambda weight: grouped_hopper.takes(weight, chip), weights(chip, 257, 7168, 2048)):
        h = quant.quantise(empty(5400, 2048))
        for factors in (None, empty(600, 9, dtype=torch.float32)):
            grouped.grouped(h, weight, sorted_pairs, factors, config=grouped.HOPPER)
        grouped.grouped(h, weight, sorted_pairs, config=grouped.HOPPER, gated=True)
    for weight in weights(chip, 7168, 2048):
        if isinstance(weight, Int4Weight):
            decoded.decoded(weight)
        elif isinstance(weight, Int8Weight):
            for x in activations(chip, weight, 600, 2048):
                grouped.one_matrix(x, weight)


def launch_tokens(chip: chips.Chip) -> None:
    best.best(empty(8, 129280, dtype=torch.float32))
    copies = best.Copies(empty(2, 8, dtype=torch.int32), empty(1, dtype=torch.int32))
    best.best(empty(8, 129280, dtype=torch.float32), empty(8, dtype=torch.int32), copies)
    for rows, ranks in itertools.product((1, 64), (1, 2, 8)):
        logits.logits(empty(rows, 7168), empty(129280 // ranks, 7168))
    embed.embed(empty(8, dtype=torch.int32), empty(8, dtype=torch.int32), empty(129280, 7168))


def launch_between_ranks(chip: chips.Chip) -> None:
    for count, dtype in ((1, torch.float32), (9, torch.float32), (9, torch.bfloat16)):
        combine.add_parts(empty(8, count, 7168, dtype=dtype))
    ids, places = empty(600, 9, dtype=torch.int32), empty(5400, dtype=torch.int32)
    combine.add_parts(empty(600, 9, 7168), ids, 33)
    for limits in ((), (ids, 33)):
        combine.add_sorted(empty(5400, 7168), places, empty(600, 9, dtype=torch.float32), *limits)
    for ranks in (2, 4, 8):
        counts = empty(2, dtype=torch.int32)
        group = peers.Peers(1, empty(ranks, dtype=torch.int64), counts, empty(1, dtype=torch.uint8))
        gather.beside(empty(4, 129280 // ranks, dtype=torch.float32), group)
        best.best(empty(4, 129280 // ranks, dtype=torch.float32), ranks=group)
        best.best(empty(4, ranks, dtype=torch.float32), names_OV=empty(4, ranks, dtype=torch.int32))
        for tokens, form in itertools.product((1, 18, 128), (None, "int8", "fp8")[: 2 + chip.fp8_units]):
            for branch in (empty(tokens, 7168), empty(tokens, 9, 7168, dtype=torch.float32)):
                norm.add_norm_quantise(
                    branch, empty(tokens, 7168), empty(7168), 1e-6, form is None, form, ranks=group
                )  # fmt: skip


def main(name: str) -> None:
    chip = chips.chip_named(name)
    launches = Launches(chip)
    modules = (
        quant, norm, int8, few_rows, experts, grouped, router, mla_decode, prompt_attention, absorb, rope_cache,
        entries, best, logits, embed, pairs, combine, decoded, gate, gather, values,
    )  # fmt: skip
    for module in modules:
        module.chip_of = lambda device: chip
    for module in (few_rows, best, experts):
        module.counters = lambda device: empty(1 << 14, dtype=torch.int32)
    router.product_f32 = lambda x, weight: empty(len(x), len(weight), dtype=torch.float32)
    JITFunction.run = lambda kernel, *args, **kwargs: launches.record(kernel, *args, **kwargs)
    launchers = (
        launch_quant, launch_few_rows, launch_experts, launch_router, launch_mla, launch_around_attention,
        launch_values, launch_prompts, launch_tokens, launch_between_ranks,
    )  # fmt: skip
    for launch in launchers:
        launch(chip)
    print(json.dumps(launches.compile()))


if __name__ == "__main__":
    main(sys.argv[1])
