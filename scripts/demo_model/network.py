"""The network that is trained: DeepSeek-V3's graph, computed densely, with weights rounded to FP8 in the forward pass.

MTP reads the main hidden state after ``model.norm``. Sources: DeepSeek-V3 (arXiv 2412.19437) sections 2.1 and 2.2.

Shape letters: B rows, S tokens of a row, D hidden, H heads, N nope, R rope, V value or vocabulary, C latent, E experts,
M expert width, G expert groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.rope import rope_tables, softmax_scale
from ...models.spec import ModelSpec
from .fp8 import rounded


class Linear(nn.Module):
    """Bias-free linear layer whose weight is stored in FP8; computes in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * gain * inputs**-0.5)
        self.round_weights = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rounded(self.weight, self.round_weights).to(x.dtype))


class Norm(nn.Module):
    """RMSNorm with float32 statistics."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed).to(x.dtype)


def rotate(x_BSHR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """RoPE on interleaved pairs (x0, x1), (x2, x3), ...; P = R / 2."""
    even, odd = x_BSHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_SP[:, None], sin_SP[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_BSHR.dtype)


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, spec: ModelSpec, gain: float):
        super().__init__()
        heads, hidden = spec.num_attention_heads, spec.hidden_size
        assert spec.q_lora_rank is not None
        self.spec = spec
        self.scale = softmax_scale(spec)
        self.q_a_proj = Linear(hidden, spec.q_lora_rank)
        self.q_a_layernorm = Norm(spec.q_lora_rank, spec.latent_norm_eps)
        self.q_b_proj = Linear(spec.q_lora_rank, heads * spec.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, spec.latent_dim)
        self.kv_a_layernorm = Norm(spec.kv_lora_rank, spec.latent_norm_eps)
        self.kv_b_proj = Linear(spec.kv_lora_rank, heads * (spec.qk_nope_head_dim + spec.v_head_dim))
        self.o_proj = Linear(heads * spec.v_head_dim, hidden, gain)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor, visible_B1SS: Tensor) -> Tensor:
        spec, heads = self.spec, self.spec.num_attention_heads
        q_BSHX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD))).unflatten(-1, (heads, -1))
        q_nope, q_rope = q_BSHX.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], -1)
        latent_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split([spec.kv_lora_rank, spec.qk_rope_head_dim], -1)
        kv_BSHX = self.kv_b_proj(self.kv_a_layernorm(latent_BSC)).unflatten(-1, (heads, -1))
        k_nope, v_BSHV = kv_BSHX.split([spec.qk_nope_head_dim, spec.v_head_dim], -1)
        k_rope = rotate(k_rope_BSR[:, :, None], cos, sin).expand(-1, -1, heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, cos, sin)], -1).transpose(1, 2)
        k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)
        scores_BHSS = (q @ k.transpose(-1, -2)).float() * self.scale
        weights = scores_BHSS.masked_fill(~visible_B1SS, -math.inf).softmax(-1).to(q.dtype)
        return self.o_proj((weights @ v_BSHV.transpose(1, 2)).transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int, gain: float):
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores, choice limited to the best groups and steered by a bias that no gradient reaches."""

    e_score_correction_bias: Tensor

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.randn(spec.n_routed_experts, spec.hidden_size) * spec.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(spec.n_routed_experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Combination weights [B, S, E] in float32, zero for experts that were not chosen."""
        spec = self.spec
        scores_BSE = F.linear(x_BSD.float(), self.weight.bfloat16().float()).sigmoid()
        chosen = self._choose(scores_BSE.detach() + self.e_score_correction_bias)
        kept = torch.zeros_like(scores_BSE).scatter(-1, chosen, scores_BSE.gather(-1, chosen))
        return kept / (kept.sum(-1, keepdim=True) + 1e-20) * spec.routed_scaling_factor

    def _choose(self, biased_BSE: Tensor) -> Tensor:
        groups_BSGX = biased_BSE.unflatten(-1, (self.spec.n_group, -1))
        group_scores = groups_BSGX.topk(2).values.sum(-1)
        kept = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(self.spec.topk_group).indices, 1.0)
        limited = groups_BSGX.masked_fill(kept[..., None] == 0, -math.inf).flatten(-2)
        return limited.topk(self.spec.num_experts_per_tok).indices


class Experts(nn.Module):
    """All routed experts computed for every token as three dense products: right for a model that is launch-bound."""

    def __init__(self, spec: ModelSpec, gain: float):
        super().__init__()
        experts, hidden, width = spec.n_routed_experts, spec.hidden_size, spec.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5 * gain)
        self.round_weights = True

    def forward(self, x_BSD: Tensor, weights_BSE: Tensor) -> Tensor:
        gate, up, down = (rounded(w, self.round_weights).to(x_BSD.dtype) for w in self.parameters())
        inner = F.silu(F.linear(x_BSD, gate.flatten(0, 1))) * F.linear(x_BSD, up.flatten(0, 1))
        inner_BSEM = inner.unflatten(-1, (len(gate), -1)) * weights_BSE[..., None].to(inner.dtype)
        return F.linear(inner_BSEM.flatten(-2), down.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, spec: ModelSpec, gain: float):
        super().__init__()
        self.gate = Router(spec)
        self.experts = Experts(spec, gain)
        self.shared_experts = SwiGLU(spec.hidden_size, spec.shared_intermediate_size, gain)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, S, D], and how many tokens chose each expert [E]."""
        weights_BSE = self.gate(x_BSD)
        load_E = (weights_BSE > 0).sum((0, 1))
        return self.experts(x_BSD, weights_BSE) + self.shared_experts(x_BSD), load_E


class Block(nn.Module):
    def __init__(self, spec: ModelSpec, layer: int):
        super().__init__()
        gain = (2 * spec.num_hidden_layers) ** -0.5
        self.input_layernorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, gain)
        self.post_attention_layernorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MoE(spec, gain) if spec.is_moe(layer) else SwiGLU(spec.hidden_size, spec.intermediate_size, gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible)
        y = self.mlp(self.post_attention_layernorm(x))
        y, load_E = y if isinstance(y, tuple) else (y, None)
        return x + y, load_E


class MtpBlock(Block):
    """The block that reads [next token's embedding | main hidden state] and predicts the token after the next."""

    def __init__(self, spec: ModelSpec, layer: int):
        super().__init__(spec, layer)
        self.enorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.hnorm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.eh_proj = nn.Parameter(
            torch.randn(spec.hidden_size, 2 * spec.hidden_size) * (2 * spec.hidden_size) ** -0.5
        )
        self.shared_head_norm = Norm(spec.hidden_size, spec.rms_norm_eps)

    def join(self, next_embedding: Tensor, hidden: Tensor) -> Tensor:
        joined = torch.cat([self.enorm(next_embedding), self.hnorm(hidden)], -1)
        return F.linear(joined, self.eh_proj.to(hidden.dtype))


class DemoModel(nn.Module):
    """Parameters are float32 masters; activations have ``compute_dtype``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: ModelSpec, positions: int, compute_dtype: torch.dtype):
        super().__init__()
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Parameter(torch.randn(spec.vocab_size, spec.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_hidden_layers))
        self.norm = Norm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = nn.Parameter(torch.randn(spec.vocab_size, spec.hidden_size) * 0.5 * spec.hidden_size**-0.5)
        self.mtp = MtpBlock(spec, spec.num_hidden_layers)
        for name, table in zip(("cos", "sin"), rope_tables(spec, positions), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def forward(self, tokens_BS: Tensor, segments_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, S, V] of the next token and of the one after it, and expert loads [MoE layers, E]."""
        length = tokens_BS.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens_BS.device).tril()
        visible = (causal & (segments_BS[:, :, None] == segments_BS[:, None, :]))[:, None]
        embedded = F.embedding(tokens_BS, self.embed_tokens).to(self.compute_dtype)
        x, loads = embedded, []
        for layer in self.layers:
            x, load_E = layer(x, cos, sin, visible)
            loads += [] if load_E is None else [load_E]
        hidden = self.norm(x)
        x, load_E = self.mtp(self.mtp.join(embedded.roll(-1, 1), hidden), cos, sin, visible)
        return self._logits(hidden), self._logits(self.mtp.shared_head_norm(x)), torch.stack([*loads, load_E])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 product with the head as the checkpoint holds it."""
        return F.linear(hidden.float(), self.lm_head.bfloat16().float())

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def round_weights(self, on: bool) -> None:
        """Off for weights that were read from an FP8 checkpoint: they are rounded already."""
        for module in self.modules():
            if isinstance(module, (Linear, Experts)):
                module.round_weights = on
