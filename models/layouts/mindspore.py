"""MindSpore Transformers' "research" layouts of DeepSeek-V3: inference, and training in both of its forms.

Facts: names, shapes and file split of its convert_weight.py (branch r1.5.0; the inference half is the same to master).
w1 is gate, w2 is down, w3 is up. Rotary rows are stored even-then-odd, because the Ascend operator rotates halves. All
dimensions come from the spec, where the original has V3's written in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..params import Param, parameters
from ..spec import ModelSpec
from .placement import Placement, TargetTensor, deinterleaved, head_rows

GENERAL_FILE = "model.safetensors"
NAME_MAP_FILE = "param_name_map.json"

# Parameters that keep their shape and order: canonical name inside a layer -> MindSpore name inside a layer.
_RENAMED = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attention.q2l_proj.weight",
    "self_attn.q_a_layernorm.weight": "attention.lq_norm.weight",
    "self_attn.kv_a_layernorm.weight": "attention.lkv_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.shared_experts.gate_proj.weight": "feed_forward.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "feed_forward.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "feed_forward.shared_experts.w3.weight",
}
_GLOBAL = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
# The inference layout keeps the MTP extras' names but for the embedding; the second names are its MTP network's.
_MTP_EXTRAS = {
    "embed_tokens.weight": ("tok_embeddings.weight", "mtp_model.tok_embeddings.embedding_weight"),
    "enorm.weight": ("enorm.weight", "mtp_model.layer.enorm.weight"),
    "hnorm.weight": ("hnorm.weight", "mtp_model.layer.hnorm.weight"),
    "eh_proj.weight": ("eh_proj.weight", "mtp_model.layer.eh_proj.weight"),
    "shared_head.norm.weight": ("shared_head.norm.weight", "mtp_model.norm.weight"),
    "shared_head.head.weight": ("shared_head.head.weight", "mtp_model.head.weight"),
}
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class InferOptions:
    """Variants of the inference layout: fused parameters and the names of the MTP layer."""

    qkv_concat: bool = False
    ffn_concat: bool = False
    mtp_names: bool = False


def _rope_order(spec: ModelSpec) -> NDArray[np.int64]:
    """Rotary rows as halves: weights that a model rotates as halves already keep their order."""
    return deinterleaved(spec.qk_rope_head_dim) if spec.rope_interleave else np.arange(spec.qk_rope_head_dim)


class _Layer:
    """Names, shapes and row orders of one layer, shared by the three layouts."""

    def __init__(self, spec: ModelSpec, layer: int, table: dict[str, Param]):
        self.spec = spec
        self.layer = layer
        self.canonical = f"model.layers.{layer}."
        self._table = table

    def shape(self, suffix: str) -> tuple[int, ...]:
        return self._table[self.canonical + suffix].shape

    def __contains__(self, suffix: str) -> bool:
        return self.canonical + suffix in self._table

    def whole(self, suffix: str) -> Placement:
        return Placement(self.canonical + suffix)

    def rope_rows(self) -> NDArray[np.int64]:
        """Rotary rows of one head, even then odd, counted from the head's first row."""
        return self.spec.qk_nope_head_dim + _rope_order(self.spec)

    def query_rows(self) -> NDArray[np.int64]:
        inside = np.concatenate([np.arange(self.spec.qk_nope_head_dim), self.rope_rows()])
        return head_rows(self.spec.num_attention_heads, self.spec.qk_head_dim, inside)

    def latent_rows(self) -> NDArray[np.int64]:
        rope = self.spec.kv_lora_rank + _rope_order(self.spec)
        return np.concatenate([np.arange(self.spec.kv_lora_rank), rope])

    def kv_b_rows(self, value: bool) -> NDArray[np.int64]:
        nope, value_dim = self.spec.qk_nope_head_dim, self.spec.v_head_dim
        inside = np.arange(nope, nope + value_dim) if value else np.arange(nope)
        return head_rows(self.spec.num_attention_heads, nope + value_dim, inside)

    def query_name(self) -> str:
        return "self_attn.q_proj.weight" if self.spec.q_lora_rank is None else "self_attn.q_b_proj.weight"

    def expert(self, part: str, expert: int) -> str:
        return f"{self.canonical}mlp.experts.{expert}.{_EXPERT_PARTS[part]}.weight"


def inference_targets(spec: ModelSpec, mtp: bool = True, options: InferOptions | None = None) -> Iterator[TargetTensor]:
    """The inference layout: one general file, one file a layer, one a stacked expert matrix."""
    options = options or InferOptions()
    table = {param.name: param for param in parameters(spec, mtp)}
    yield from _global_targets(table, GENERAL_FILE, norm_dtype="BF16")
    layers = spec.num_hidden_layers + (spec.num_nextn_predict_layers if mtp else 0)
    for index in range(layers):
        layer = _Layer(spec, index, table)
        is_mtp = index >= spec.num_hidden_layers
        prefix = "mtp_model.layer.decode_layer." if is_mtp and options.mtp_names else layer.canonical
        file = f"model_layer_{index}"
        if is_mtp:
            for suffix, (kept, renamed) in _MTP_EXTRAS.items():
                name = renamed if options.mtp_names else layer.canonical + kept
                yield _one(name, f"{file}.safetensors", layer, layer.whole(suffix))
        for target in (*_inference_attention(layer, options), *_inference_ffn(layer, options, file)):
            yield TargetTensor(
                prefix + target.name,
                target.file or f"{file}.safetensors",
                target.shape,
                target.dtype,
                target.placements,
            )


def _one(name: str, file: str, layer: _Layer, placement: Placement, dtype: str = "BF16") -> TargetTensor:
    source_shape = layer.shape(placement.source.removeprefix(layer.canonical))
    return TargetTensor(name, file, placement.piece_shape(source_shape), dtype, (placement,))


def _stacked_rows(name: str, layer: _Layer, placements: tuple[Placement, ...]) -> TargetTensor:
    """Placements under each other."""
    row, placed, columns = 0, [], 0
    for placement in placements:
        rows, columns = placement.piece_shape(layer.shape(placement.source.removeprefix(layer.canonical)))
        placed.append(Placement(placement.source, placement.rows, offset=(row, 0)))
        row += rows
    return TargetTensor(name, "", (row, columns), "BF16", tuple(placed))


def _global_targets(table: dict[str, Param], file: str, norm_dtype: str) -> Iterator[TargetTensor]:
    for canonical, name in _GLOBAL.items():
        dtype = norm_dtype if canonical == "model.norm.weight" else "BF16"
        yield TargetTensor(name, file, table[canonical].shape, dtype, (Placement(canonical),))


def _renamed(layer: _Layer, left_out: tuple[str, ...] = (), norm_dtype: str = "BF16") -> Iterator[TargetTensor]:
    for suffix, name in _RENAMED.items():
        if suffix in layer and suffix not in left_out:
            yield _one(name, "", layer, layer.whole(suffix), norm_dtype if "norm" in name else "BF16")


def _kv_b(layer: _Layer) -> Iterator[TargetTensor]:
    for name, value in (("k_nope", False), ("v", True)):
        placement = Placement(f"{layer.canonical}self_attn.kv_b_proj.weight", layer.kv_b_rows(value))
        yield _one(f"attention.lkv2kv_{name}.weight", "", layer, placement)


def _inference_attention(layer: _Layer, options: InferOptions) -> Iterator[TargetTensor]:
    fuse = options.qkv_concat and layer.spec.q_lora_rank is not None
    fused_ffn = ("mlp.gate_proj.weight", "mlp.up_proj.weight") if options.ffn_concat else ()
    shared = tuple(suffix.replace("mlp.", "mlp.shared_experts.") for suffix in fused_ffn)
    latent = Placement(f"{layer.canonical}self_attn.kv_a_proj_with_mqa.weight", layer.latent_rows())
    yield from _renamed(layer, (*fused_ffn, *shared, *(("self_attn.q_a_proj.weight",) if fuse else ())))
    query = Placement(layer.canonical + layer.query_name(), layer.query_rows())
    direct = layer.spec.q_lora_rank is None
    yield _one("attention.q_proj.weight" if direct else "attention.l2q_proj.weight", "", layer, query)
    if fuse:
        yield _stacked_rows("attention.qkv2l.weight", layer, (layer.whole("self_attn.q_a_proj.weight"), latent))
    else:
        yield _one("attention.kv2l.weight", "", layer, latent)
    yield from _kv_b(layer)


def _inference_ffn(layer: _Layer, options: InferOptions, file: str) -> Iterator[TargetTensor]:
    moe = layer.spec.is_moe(layer.layer)
    for part in ("", "shared_experts."):
        gate, up = f"mlp.{part}gate_proj.weight", f"mlp.{part}up_proj.weight"
        if options.ffn_concat and gate in layer:
            name = f"feed_forward.{part}w_gate_hidden.weight"
            yield _stacked_rows(name, layer, (layer.whole(gate), layer.whole(up)))
    if not moe:
        return
    routed = "feed_forward.routed_experts."
    yield _one(f"{routed}router.dense.weight", "", layer, layer.whole("mlp.gate.weight"))
    if layer.spec.has_router_bias:
        bias = layer.whole("mlp.gate.e_score_correction_bias")
        yield _one(f"{routed}router.e_score_correction_bias", "", layer, bias, "F32")
    if options.ffn_concat:
        yield _experts(
            layer, ("w1", "w3"), f"{routed}ffn.w_gate_hidden.weight", f"{file}_routed_experts_w1.safetensors"
        )
        yield _experts(layer, ("w2",), f"{routed}ffn.w2.weight", f"{file}_routed_experts_w2.safetensors")
        return
    for part in _EXPERT_PARTS:
        yield _experts(layer, (part,), f"{routed}ffn.{part}.weight", f"{file}_routed_experts_{part}.safetensors")


def _experts(
    layer: _Layer, parts: tuple[str, ...], name: str, file: str, swap: bool = True, dtype: str = "BF16"
) -> TargetTensor:
    """All experts stacked on a leading axis; swapped to [in, out], several parts beside each other on the last axis."""
    out, inside = layer.shape(f"mlp.experts.0.{_EXPERT_PARTS[parts[0]]}.weight")
    assert swap or len(parts) == 1, "only swapped experts are fused"
    placements = tuple(
        Placement(layer.expert(part, expert), transpose=swap, index=expert, offset=(0, slot * out))
        for expert in range(layer.spec.n_routed_experts)
        for slot, part in enumerate(parts)
    )
    matrix = (inside, out * len(parts)) if swap else (out, inside)
    return TargetTensor(name, file, (layer.spec.n_routed_experts, *matrix), dtype, placements)


def training_targets(spec: ModelSpec, mtp: bool = True, grouped: bool = True) -> Iterator[TargetTensor]:
    """The training layout, one file a layer; ``grouped`` is its grouped-matmul form (the original's default).

    Norms are stored in F32, as is the ungrouped router. The MTP layer's copies of embedding and head are left out: the
    training network shares the main ones.
    """
    table = {param.name: param for param in parameters(spec, mtp)}
    count = spec.num_hidden_layers + (spec.num_nextn_predict_layers if mtp else 0)
    files = [f"ms-model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
    for target in _global_targets(table, "", norm_dtype="F32"):
        file = files[0] if "embeddings" in target.name else files[-1]
        yield TargetTensor(target.name, file, target.shape, target.dtype, target.placements)
    for index in range(count):
        layer = _Layer(spec, index, table)
        for target in (*_training_attention(layer), *_training_ffn(layer, grouped)):
            name = layer.canonical + target.name
            yield TargetTensor(name, files[index], target.shape, target.dtype, target.placements)
        if index >= spec.num_hidden_layers:
            yield from _training_mtp(layer, index - spec.num_hidden_layers, files[index])


def _training_attention(layer: _Layer) -> Iterator[TargetTensor]:
    spec = layer.spec
    yield from _renamed(layer, norm_dtype="F32")
    query, prefix = layer.canonical + layer.query_name(), "q" if spec.q_lora_rank is None else "l2q"
    for name, inside in (("nope", np.arange(spec.qk_nope_head_dim)), ("pe", layer.rope_rows())):
        rows = head_rows(spec.num_attention_heads, spec.qk_head_dim, inside)
        yield _one(f"attention.{prefix}_{name}_proj.weight", "", layer, Placement(query, rows))
    latent, rank = f"{layer.canonical}self_attn.kv_a_proj_with_mqa.weight", spec.kv_lora_rank
    yield _one("attention.kv2l_latent_kv.weight", "", layer, Placement(latent, np.arange(rank)))
    rope = rank + _rope_order(spec)
    yield _one("attention.kv2l_k_pe.weight", "", layer, Placement(latent, rope))
    yield from _kv_b(layer)


def _training_ffn(layer: _Layer, grouped: bool) -> Iterator[TargetTensor]:
    if not layer.spec.is_moe(layer.layer):
        return
    routed = "feed_forward.routed_experts."
    router, bias = (
        ("router_dense.weight", "topk_bias") if grouped else ("router.dense.weight", "router.router.topk_bias")
    )
    dtype = "BF16" if grouped else "F32"
    yield _one(routed + router, "", layer, layer.whole("mlp.gate.weight"), dtype)
    if layer.spec.has_router_bias:
        yield _one(routed + bias, "", layer, layer.whole("mlp.gate.e_score_correction_bias"), "F32")
    if grouped:
        yield _experts(layer, ("w1", "w3"), f"{routed}ffn.w1", "")
        yield _experts(layer, ("w2",), f"{routed}ffn.w2", "")
        return
    for part in _EXPERT_PARTS:
        yield _experts(layer, (part,), f"{routed}ffn.{part}.weight", "", swap=False)


def _training_mtp(layer: _Layer, depth: int, file: str) -> Iterator[TargetTensor]:
    fuser = f"model.mtp_hidden_fusers.{depth}."
    for suffix, name, dtype in (
        ("enorm.weight", f"{fuser}norm_emb.weight", "F32"),
        ("hnorm.weight", f"{fuser}norm.weight", "F32"),
        ("eh_proj.weight", f"{fuser}dense.weight", "BF16"),
        ("shared_head.norm.weight", f"model.mtp_norms.{depth}.weight", "F32"),
    ):
        yield _one(name, file, layer, layer.whole(suffix), dtype)
