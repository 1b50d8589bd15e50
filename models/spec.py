"""ModelSpec: everything that distinguishes one member of the DeepSeek-V3 family from another.

The family is one pre-norm block (MLA attention, then a dense SwiGLU or a mixture of experts) with the switches below.
Field names are the family's usual ones; reading ``config.json`` with all its spellings is `hf_config.spec_from_hf`.
Sources: DeepSeek-V2 (arXiv 2405.04434, section 2), DeepSeek-V3 (arXiv 2412.19437, section 2), Kimi-K2's config.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError

_LISTED = 20  # names in a message
FAMILIES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")
SCORING = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class Yarn:
    """YaRN rope scaling (arXiv 2309.00071): context grows by ``factor`` over ``original_max_position_embeddings``."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            _check_positive(f"yarn.{name}", getattr(self, name))


@dataclass(frozen=True)
class Fp8Blocks:
    """Linear weights stored as F8_E4M3 with one F32 multiplier per block (`weight_scale_inv`)."""

    block: tuple[int, int] = (128, 128)
    scale_fmt: str | None = None  # "ue8m0": multipliers are powers of two

    def __post_init__(self) -> None:
        if len(self.block) != 2 or not all(isinstance(size, int) and size > 0 for size in self.block):
            _fail("fp8.block", self.block, "[rows, columns]")


@dataclass(frozen=True)
class ModelSpec:
    """One model of the family. Validated at construction; wrong combinations raise InputError naming the field."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None
    # Mixture of experts; n_routed_experts = 0 is a dense model.
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # Multi-token prediction: extra blocks stored as layers num_hidden_layers and up.
    num_nextn_predict_layers: int = 0
    mtp_hidden: str = "post_norm"  # which main hidden state feeds the MTP block: after or before model.norm
    # Positions and norms.
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # q_a and kv_a norms: fixed in the original code whatever rms_norm_eps says
    # Tokens.
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    # Storage.
    fp8: Fp8Blocks | None = None
    # DeepSeek Sparse Attention (V3.2); index_topk = 0 means dense attention.
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            _fail("family", self.family, f"one of {', '.join(FAMILIES)}")
        for name in _POSITIVE:
            _check_positive(name, getattr(self, name))
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                _fail(name, getattr(self, name), "zero or more")
        self._check_attention()
        if self.n_routed_experts:
            self._check_experts()
        elif self.num_nextn_predict_layers or any(map(self.is_moe, range(self.num_hidden_layers))):
            _fail("n_routed_experts", 0, "the number of experts, because some layers are mixtures of experts")

    def _check_attention(self) -> None:
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            _fail("q_lora_rank", self.q_lora_rank, "a positive rank, or null for a direct q_proj")
        if self.qk_rope_head_dim % 2:
            _fail("qk_rope_head_dim", self.qk_rope_head_dim, "an even number, because RoPE rotates pairs")
        if self.mtp_hidden not in ("post_norm", "pre_norm"):
            _fail("mtp_hidden", self.mtp_hidden, "post_norm or pre_norm")
        if self.index_topk and not (self.index_n_heads and self.index_head_dim and self.q_lora_rank):
            _fail("index_topk", self.index_topk, "index_n_heads, index_head_dim and q_lora_rank beside it")

    def _check_experts(self) -> None:
        if self.scoring_func not in SCORING:
            _fail("scoring_func", self.scoring_func, " or ".join(SCORING))
        if self.topk_method not in TOPK_METHODS:
            _fail("topk_method", self.topk_method, f"one of {', '.join(TOPK_METHODS)}")
        if (self.topk_method == "noaux_tc") != (self.scoring_func == "sigmoid"):
            _fail("topk_method", self.topk_method, "noaux_tc with sigmoid scores, greedy methods with softmax scores")
        _check_positive("moe_intermediate_size", self.moe_intermediate_size)
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            _fail("num_experts_per_tok", self.num_experts_per_tok, f"1 to n_routed_experts = {self.n_routed_experts}")
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            _fail("n_group", self.n_group, f"a divisor of n_routed_experts = {self.n_routed_experts}")
        if not 0 < self.topk_group <= self.n_group:
            _fail("topk_group", self.topk_group, f"1 to n_group = {self.n_group}")
        per_group = self.n_routed_experts // self.n_group
        if self.topk_group * per_group < self.num_experts_per_tok:
            _fail("topk_group", self.topk_group, f"enough groups for {self.num_experts_per_tok} experts per token")
        if self.topk_method == "noaux_tc" and self.n_group > 1 and per_group < 2:
            _fail("n_group", self.n_group, "at least two experts a group: a group is scored by its best two")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the normed latent and the rotated rope key (576 for V3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_router_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def scales_normalised_weights(self) -> bool:
        """V2's original code skips routed_scaling_factor when it normalises; V3's multiplies in both cases."""
        return self.family != "deepseek_v2"

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` is a mixture of experts; MTP layers (num_hidden_layers and up) always are."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def mtp_layers(self) -> range:
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def replace(self, changes: Mapping[str, Any]) -> ModelSpec:
        """A validated copy with ``changes`` applied; unknown fields raise and name the nearest one."""
        return spec_from_dict({**dataclasses.asdict(self), **changes}, "model.overrides")


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_freq", "rope_theta", "max_position_embeddings",
    "rms_norm_eps", "latent_norm_eps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace",
    "num_nextn_predict_layers", "index_n_heads", "index_head_dim", "index_topk",
)  # fmt: skip


def _fail(field: str, value: object, wanted: str) -> None:
    raise InputError(f"{field} is {value!r}", "model spec", f"give {wanted}")


def _check_positive(field: str, value: float) -> None:
    if not 0 < value < math.inf:
        _fail(field, value, "a positive number")


def nearest(key: str, known: Iterable[str]) -> str:
    """``did you mean X?`` for a misspelt name, or what there is to choose from when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"choose from {', '.join(known[:_LISTED])}{more}"


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise InputError(f"unknown key {key!r}", where, nearest(key, fields))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"missing key {name!r}", where, "add it")
    for name, value in values.items():
        _check_type(name, value, fields[name].type, where)
    return kind(**values)


def _check_type(name: str, value: Any, annotation: Any, where: str) -> None:
    """Scalars must have the annotated type; YAML's ints are accepted for floats, nothing else is converted."""
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    base, _, optional = str(annotation).partition(" | ")
    if base not in allowed or (value is None and optional):
        return
    if not isinstance(value, allowed[base]) or (isinstance(value, bool) and base != "bool"):
        raise InputError(f"{name} is {value!r}", where, f"give a value of type {annotation}")


def spec_from_dict(values: Mapping[str, Any], where: str) -> ModelSpec:
    """Build a spec from plain data (a YAML of ``configs/model``); ``where`` names the source in errors."""
    values = _with_tuple(values, "eos_token_ids", where)
    for name, kind in (("yarn", Yarn), ("fp8", Fp8Blocks)):
        section = values.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise InputError(f"{name} is {section!r}", where, "give a section of keys, or null")
        values[name] = _build(kind, _with_tuple(section, "block", f"{where}: {name}"), f"{where}: {name}")
    spec: ModelSpec = _build(ModelSpec, values, where)
    return spec


def _with_tuple(values: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """A copy in which the list ``name``, if there is one, is a tuple."""
    if name not in values:
        return dict(values)
    if not isinstance(values[name], (list, tuple)):
        raise InputError(f"{name} is {values[name]!r}", where, "give a list of integers")
    return {**values, name: tuple(values[name])}
