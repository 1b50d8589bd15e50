"""The parameter table: every tensor of a model with its canonical name, shape, logical axes and storage.

Names and layouts are Hugging Face's; linear weights are [out, in]. Byte counts, random weights, shard slices, loader
checks and converter plans are all derived from here. Row orders (deepseek.md 2.3 of the published V3 checkpoint):
``q_b_proj`` and ``q_proj`` are head-major with [nope | rope] inside a head, ``kv_b_proj`` head-major with [nope | v],
``kv_a_proj_with_mqa`` is [latent | shared rope key].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .spec import ModelSpec


@dataclass(frozen=True)
class Param:
    """One logical parameter.

    ``axes`` name what each dimension counts; a "heads", "ffn", "vocab" or "experts" axis may be split between ranks.
    ``quantised`` parameters may be stored in a low-bit format with scales; the rest are always plain ``dtype``.
    ``group`` is what the parameter belongs to: embedding, head, norm, attention, dense, router, expert, shared, mtp.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    group: str
    layer: int | None = None
    expert: int | None = None
    dtype: str = "BF16"
    quantised: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def parameters(spec: ModelSpec, mtp: bool = True) -> Iterator[Param]:
    """All parameters in checkpoint order; ``mtp=False`` leaves the multi-token-prediction layers out."""
    yield Param("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size), ("vocab", "hidden"), "embedding")
    for layer in range(spec.num_hidden_layers):
        yield from layer_parameters(spec, layer)
    yield Param("model.norm.weight", (spec.hidden_size,), ("hidden",), "norm")
    yield Param("lm_head.weight", (spec.vocab_size, spec.hidden_size), ("vocab", "hidden"), "head")
    if mtp:
        for layer in spec.mtp_layers():
            yield from mtp_parameters(spec, layer)


def layer_parameters(spec: ModelSpec, layer: int) -> Iterator[Param]:
    """One transformer block."""
    prefix = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Param(f"{prefix}{norm}.weight", (spec.hidden_size,), ("hidden",), "norm", layer)
    yield from _attention(spec, layer, f"{prefix}self_attn.")
    if spec.is_moe(layer):
        yield from _moe(spec, layer, f"{prefix}mlp.")
    else:
        yield from _ffn(spec, layer, f"{prefix}mlp.", spec.intermediate_size, "dense")


def mtp_parameters(spec: ModelSpec, layer: int) -> Iterator[Param]:
    """An MTP layer: a MoE block, its input projection and norms, and copies of the embedding and the head."""
    prefix, hidden = f"model.layers.{layer}.", spec.hidden_size
    yield Param(f"{prefix}embed_tokens.weight", (spec.vocab_size, hidden), ("vocab", "hidden"), "mtp", layer)
    yield Param(f"{prefix}enorm.weight", (hidden,), ("hidden",), "mtp", layer)
    yield Param(f"{prefix}hnorm.weight", (hidden,), ("hidden",), "mtp", layer)
    yield Param(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), ("hidden", "embedding_and_hidden"), "mtp", layer)
    yield from layer_parameters(spec, layer)
    yield Param(f"{prefix}shared_head.norm.weight", (hidden,), ("hidden",), "mtp", layer)
    yield Param(f"{prefix}shared_head.head.weight", (spec.vocab_size, hidden), ("vocab", "hidden"), "mtp", layer)


def _linear(
    name: str, out_in: tuple[int, int], axes: tuple[str, str], group: str, layer: int, expert: int | None = None
) -> Param:
    return Param(f"{name}.weight", out_in, axes, group, layer, expert, quantised=True)


def _attention(spec: ModelSpec, layer: int, prefix: str) -> Iterator[Param]:
    hidden, heads = spec.hidden_size, spec.num_attention_heads

    def linear(name: str, rows: int, columns: int, axes: tuple[str, str]) -> Param:
        return _linear(prefix + name, (rows, columns), axes, "attention", layer)

    if spec.q_lora_rank is None:
        yield linear("q_proj", heads * spec.qk_head_dim, hidden, ("heads", "hidden"))
    else:
        yield linear("q_a_proj", spec.q_lora_rank, hidden, ("q_lora", "hidden"))
        yield Param(f"{prefix}q_a_layernorm.weight", (spec.q_lora_rank,), ("q_lora",), "norm", layer)
        yield linear("q_b_proj", heads * spec.qk_head_dim, spec.q_lora_rank, ("heads", "q_lora"))
    yield linear("kv_a_proj_with_mqa", spec.latent_dim, hidden, ("latent", "hidden"))
    yield Param(f"{prefix}kv_a_layernorm.weight", (spec.kv_lora_rank,), ("kv_lora",), "norm", layer)
    rows = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    yield linear("kv_b_proj", rows, spec.kv_lora_rank, ("heads", "kv_lora"))
    yield linear("o_proj", hidden, heads * spec.v_head_dim, ("hidden", "heads"))
    if spec.index_topk:
        yield from _indexer(spec, layer, f"{prefix}indexer.")


def _indexer(spec: ModelSpec, layer: int, prefix: str) -> Iterator[Param]:
    """DeepSeek Sparse Attention's lightning indexer (V3.2): replicated, not split between ranks."""
    assert spec.q_lora_rank is not None, "ModelSpec refuses an indexer without q_lora_rank"
    heads, dim, hidden = spec.index_n_heads, spec.index_head_dim, spec.hidden_size
    yield _linear(f"{prefix}wq_b", (heads * dim, spec.q_lora_rank), ("index_heads", "q_lora"), "attention", layer)
    yield _linear(f"{prefix}wk", (dim, hidden), ("index_key", "hidden"), "attention", layer)
    for part in ("weight", "bias"):
        yield Param(f"{prefix}k_norm.{part}", (dim,), ("index_key",), "norm", layer, dtype="F32")
    yield Param(f"{prefix}weights_proj.weight", (heads, hidden), ("index_heads", "hidden"), "attention", layer)


def _ffn(
    spec: ModelSpec, layer: int, prefix: str, width: int, group: str, expert: int | None = None
) -> Iterator[Param]:
    hidden = spec.hidden_size
    yield _linear(f"{prefix}gate_proj", (width, hidden), ("ffn", "hidden"), group, layer, expert)
    yield _linear(f"{prefix}up_proj", (width, hidden), ("ffn", "hidden"), group, layer, expert)
    yield _linear(f"{prefix}down_proj", (hidden, width), ("hidden", "ffn"), group, layer, expert)


def _moe(spec: ModelSpec, layer: int, prefix: str) -> Iterator[Param]:
    experts = spec.n_routed_experts
    yield Param(f"{prefix}gate.weight", (experts, spec.hidden_size), ("experts", "hidden"), "router", layer)
    if spec.has_router_bias:
        yield Param(f"{prefix}gate.e_score_correction_bias", (experts,), ("experts",), "router", layer, dtype="F32")
    for expert in range(experts):
        yield from _ffn(spec, layer, f"{prefix}experts.{expert}.", spec.moe_intermediate_size, "expert", expert)
    if spec.n_shared_experts:
        yield from _ffn(spec, layer, f"{prefix}shared_experts.", spec.shared_intermediate_size, "shared")


def total_parameters(spec: ModelSpec) -> int:
    """Parameters of the main model, embedding and head included, MTP left out."""
    return sum(param.size for param in parameters(spec, mtp=False))


def mtp_parameter_count(spec: ModelSpec) -> int:
    """Parameters of the MTP layers as stored, their copies of embedding and head included."""
    return sum(param.size for layer in spec.mtp_layers() for param in mtp_parameters(spec, layer))


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through, embedding and head counted in full."""
    return sum(
        param.size
        for param in parameters(spec, mtp=False)
        if param.expert is None or param.expert < spec.num_experts_per_tok
    )


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes of latent cache in BF16 per token over all main layers (70,272 for V3)."""
    return 2 * spec.num_hidden_layers * spec.latent_dim


def stored_tensors(spec: ModelSpec) -> Iterator[StoredTensor]:
    """The tensors of the published checkpoint: FP8 weights with their multipliers where the spec says so."""
    for param in parameters(spec):
        if spec.fp8 is None or not param.quantised:
            yield StoredTensor(param.name, param.dtype, param.shape)
            continue
        rows, columns = (-(-size // block) for size, block in zip(param.shape, spec.fp8.block, strict=True))
        yield StoredTensor(param.name, "F8_E4M3", param.shape)
        yield StoredTensor(f"{param.name}_scale_inv", "F32", (rows, columns))
