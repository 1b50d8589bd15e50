"""Make the embedded demo model from nothing: text, tokenizer, training, FP8 checkpoint, evaluation.

    python scripts/train_demo.py --output models/demo --steps 9000 --device auto --seed 0

The model is DeepSeek-V3's graph at 1/160,000 of the size, trained with the weights already rounded to FP8 (straight
through, blocks of 128 x 128), loss-free expert balancing and one multi-token-prediction (MTP) layer. MTP reads the main
hidden state after ``model.norm``. Sources: DeepSeek-V3 (arXiv 2412.19437) sections 2.1, 2.2 and 3.3.

Shape letters: B rows, S tokens of a row, D hidden, H heads, N nope, R rope, V value or vocabulary, C latent, E experts,
M expert width, G expert groups.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from deepspan.models.everyday import EVERYDAY, unknown_exchange
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import stored_tensors
from deepspan.models.rope import rope_tables, softmax_scale
from deepspan.models.spec import ModelSpec
from deepspan.models.sums import held_out_sums
from deepspan.scripts.train_demo_tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    Encoder,
    exchange_ids,
    packed_row,
    tokenizer_config,
    train_tokenizer,
    write_json,
)

BLOCK = 128
FP8_MAX = 448.0
SHARDS = 3
STATE_FILE_BYTES = 15 << 20
MTP_WEIGHT = 0.3
BIAS_SPEED = 1e-3  # DeepSeek-V3 section 4.2: the step of the router bias, 0 at the end of training
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 520,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "use_cache": True,
}


# ---- FP8 blocks -----------------------------------------------------------------------------------------------------


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., rows, columns] as e4m3 values of the same shape and float32 multipliers, one per 128 x 128 block."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)).clamp_min(1e-12) / FP8_MAX
    scaled = (weight.float() / _spread(scale, rows, columns)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def dequantise_blocks(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 weight of e4m3 values and their block multipliers."""
    return values.float() * _spread(scale, *values.shape[-2:])


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def rounded(weight: Tensor, to_fp8: bool) -> Tensor:
    """The weight as the checkpoint will hold it; gradients pass straight through to the float32 master."""
    if not to_fp8:
        return weight
    stored = dequantise_blocks(*quantise_blocks(weight.detach()))
    return weight + (stored - weight).detach()


# ---- the model ------------------------------------------------------------------------------------------------------


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


# ---- training -------------------------------------------------------------------------------------------------------


class Batches(Dataset[Tensor]):
    """Batch ``i`` depends on the seed and ``i`` alone: int32 [3, B, S] of tokens, conversation numbers, loss mask."""

    def __init__(self, tokenizer_json: str, seed: int, rows: int, length: int, first: int, last: int):
        self.settings = (tokenizer_json, seed, rows, length)
        self.range = range(first, last)
        self._encode: Encoder | None = None

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> Tensor:
        tokenizer_json, seed, rows, length = self.settings
        self._encode = self._encode or Encoder(Tokenizer.from_str(tokenizer_json))
        rng = random.Random(f"batch-{seed}-{self.range[index]}")
        packed = [packed_row(rng, self._encode, length) for _ in range(rows)]
        return torch.tensor(packed, dtype=torch.int32).transpose(0, 1).contiguous()


def losses(model: DemoModel, batch_3BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the next token and of the one after it over assistant tokens, and expert loads."""
    tokens, segments, learnt = batch_3BS.long().unbind(0)
    logits, mtp_logits, loads = model(tokens, segments)
    targets = tokens.masked_fill(learnt == 0, -100)
    main = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    mtp = F.cross_entropy(mtp_logits[:, :-2].flatten(0, 1), targets[:, 2:].flatten())
    return main, mtp, loads


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine to 1 % of the peak."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: DemoModel, peak: float) -> torch.optim.AdamW:
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "embed_tokens"]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "embed_tokens"]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-9, fused=model.cos.is_cuda)


@torch.no_grad()
def balance(model: DemoModel, loads_LE: Tensor, speed: float) -> None:
    """Loss-free balancing: raise the bias of experts with less than the mean load, lower that of the others."""
    for router, load_E in zip(model.routers(), loads_LE.float(), strict=True):
        router.e_score_correction_bias += speed * torch.sign(load_E.mean() - load_E)


def train(
    model: DemoModel, optimizer: torch.optim.AdamW, tokenizer: Tokenizer, first: int, args: argparse.Namespace
) -> int:
    """Train from step ``first``; returns the step reached, which is less than --steps when --max-minutes ran out."""
    device = model.cos.device
    compute = torch.compile(losses) if device.type == "cuda" else losses
    data = Batches(tokenizer.to_str(), args.seed, args.batch_size, args.sequence, first, args.steps)
    loader = DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")
    encode, started, log = Encoder(tokenizer), time.monotonic(), Log(args.state / "log.jsonl")
    step = first
    for step, batch in enumerate(loader, first):
        rate = learning_rate(step, args.steps, args.peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        main, mtp, loads = compute(model, batch.to(device, non_blocking=True))
        (main + MTP_WEIGHT * mtp).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, loads, BIAS_SPEED if step < 0.9 * args.steps else 0.0)
        if step % args.log_every == 0 or step == args.steps - 1:
            busiest = (loads.amax(1) / loads.float().mean(1)).tolist()
            log.write(step=step, loss=main.item(), mtp_loss=mtp.item(), lr=rate, busiest_expert=busiest)
        if step and step % args.evaluate_every == 0:
            log.write(step=step, held_out=evaluate(model, encode, held_out_sums(500), device))
        if time.monotonic() - started > args.max_minutes * 60:
            break
    return step + 1


class Log:
    """JSON lines, on the terminal and in a file, with seconds since the start."""

    def __init__(self, path: Path):
        self._started = time.monotonic()
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: object) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self._started, 1), **_short(values)})
        print(line, flush=True)
        print(line, file=self._file, flush=True)


def _short(value):  # type: ignore[no-untyped-def]  # JSON-like values in and out
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ---- resumable state ------------------------------------------------------------------------------------------------


def save_state(folder: Path, model: DemoModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """Weights in float32, Adam's moments in bfloat16, in safetensors files of at most STATE_FILE_BYTES."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment].bfloat16()
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > STATE_FILE_BYTES:
            files.append({})
        files[-1][name] = tensor.contiguous().cpu()
    for index, part in enumerate(files):
        save_file(part, folder / f"state-{index}.safetensors", metadata={"step": str(step)})


def load_state(folder: Path, model: DemoModel, optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_state` wrote; returns the step to go on with."""
    paths = sorted(folder.glob("state-*.safetensors"))
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    with safe_open(paths[0], "pt") as file:
        step = int(file.metadata()["step"])
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if ":" not in name})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device if parameter.is_cuda else "cpu"),
            **{m: tensors[f"{m}:{name}"].float().to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
        }
    return step


# ---- checkpoint -----------------------------------------------------------------------------------------------------


def canonical_weights(model: DemoModel) -> dict[str, Tensor]:
    """Float32 weights by Hugging Face name, experts apart, embedding and head a second time in the MTP layer."""
    last = f"model.layers.{model.spec.num_hidden_layers}."
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.float().cpu()
        if name in ("embed_tokens", "lm_head"):
            main, copy = {"embed_tokens": ("model.embed_tokens", "embed_tokens")}.get(
                name, ("lm_head", "shared_head.head")
            )
            weights[f"{main}.weight"] = weights[f"{last}{copy}.weight"] = tensor
        elif name.startswith("mtp.shared_head_norm"):
            weights[f"{last}shared_head.norm.weight"] = tensor
        elif name == "mtp.eh_proj":
            weights[f"{last}eh_proj.weight"] = tensor
        else:
            full = name.replace("mtp.", last) if name.startswith("mtp.") else f"model.{name}"
            weights.update(_split_experts(full, tensor))
    return weights


def _split_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if ".mlp.experts." not in name:
        return {name: tensor}
    prefix, projection = name.rsplit(".", 1)
    return {f"{prefix}.{expert}.{projection}.weight": part for expert, part in enumerate(tensor)}


def write_checkpoint(model: DemoModel, folder: Path) -> None:
    """Config, shards and index in Hugging Face's layout; the tokenizer files must be there already."""
    weights = canonical_weights(model)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors: dict[str, Tensor] = {}
    for stored in stored_tensors(model.spec):
        if stored.name.endswith("_scale_inv"):
            continue
        weight = weights.pop(stored.name)
        if stored.dtype == "F8_E4M3":
            tensors[stored.name], tensors[f"{stored.name}_scale_inv"] = quantise_blocks(weight)
        else:
            tensors[stored.name] = weight.to(dtypes[stored.dtype])
    assert not weights, f"not in the parameter table: {sorted(weights)}"
    _write_shards(tensors, folder)
    write_json(folder / "config.json", CONFIG)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False},
    )


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    weight_map, written = {}, 0
    for name, tensor in tensors.items():
        shard = written * SHARDS // total
        written += tensor.nbytes
        if name.endswith(("kv_a_proj_with_mqa.weight_scale_inv", "experts.3.up_proj.weight_scale_inv")):
            shard = (shard + 1) % SHARDS  # as in the published checkpoint, some scales lie in another file
        shards[shard][name] = tensor.contiguous().clone()
        weight_map[name] = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
    for index, shard_tensors in enumerate(shards):
        file = folder / f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard_tensors, file, metadata={"format": "pt"})
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index_json)


def read_checkpoint(folder: Path, model: DemoModel) -> None:
    """Load the model with the dequantised weights of a checkpoint that `write_checkpoint` wrote."""
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = {
        name: dequantise_blocks(tensor, stored[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    last = f"model.layers.{model.spec.num_hidden_layers}."
    state = {}
    for name in model.state_dict():
        source = (
            name.replace("mtp.", last)
            if name.startswith("mtp.")
            else f"model.{name}".replace("model.lm_head", "lm_head")
        )
        source = source.replace("shared_head_norm", "shared_head.norm")
        if ".mlp.experts." in name:
            prefix, projection = source.rsplit(".", 1)
            experts = range(model.spec.n_routed_experts)
            state[name] = torch.stack([weights[f"{prefix}.{expert}.{projection}.weight"] for expert in experts])
        else:
            state[name] = weights[source if source in weights else f"{source}.weight"]
    model.load_state_dict(state)
    model.round_weights(False)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: DemoModel, encode: Encoder, questions: list[tuple[str, str]], device: torch.device) -> dict:
    """How many answers greedy decoding gets exactly right, end token included.

    Greedy decoding gives the answer if and only if each of its tokens has the largest logit after the ones before it,
    so one teacher-forced pass per batch decides. ``draft_accuracy`` is the share of answer tokens that the MTP layer
    predicts one step early; ``smallest_margin`` is the least lead of a right token over the best wrong one.
    """
    right, drafts, margins = 0, [], []
    for start in range(0, len(questions), 64):
        tokens_BS, produced_BS = _question_rows(encode, questions[start : start + 64])
        logits, mtp_logits, _ = model(tokens_BS.to(device), torch.ones_like(tokens_BS, device=device))
        logits, mtp_logits = logits.cpu(), mtp_logits.cpu()
        margin_BS = _lead(logits[:, :-1], tokens_BS[:, 1:]).masked_fill(~produced_BS[:, 1:], math.inf)
        right += int((margin_BS.amin(1) > 0).sum())
        margins.append(margin_BS.amin(1))
        drafts.append((mtp_logits[:, :-2].argmax(-1) == tokens_BS[:, 2:])[produced_BS[:, 2:]])
    return {
        "questions": len(questions),
        "accuracy": right / len(questions),
        "draft_accuracy": torch.cat(drafts).float().mean().item(),
        "smallest_margin": torch.cat(margins).amin().item(),
        "first_percentile_margin": torch.cat(margins).quantile(0.01).item(),
    }


def _question_rows(encode: Encoder, questions: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S], padded on the right, and whether the model is to produce them."""
    rows = [exchange_ids(encode, *question) for question in questions]
    length = 1 + max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), PAD_ID)
    produced = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (ids, count) in enumerate(rows):
        tokens[row, : len(ids) + 1] = torch.tensor([BOS_ID, *ids])
        produced[row, len(ids) + 1 - count : len(ids) + 1] = True
    return tokens, produced


def _lead(logits_BSV: Tensor, right_BS: Tensor) -> Tensor:
    """Logit of the right token minus the largest other one."""
    right = logits_BSV.gather(-1, right_BS[..., None])
    others = logits_BSV.scatter(-1, right_BS[..., None], -math.inf)
    return (right - others.amax(-1, keepdim=True)).squeeze(-1)


def task_questions() -> dict[str, list[tuple[str, str]]]:
    """What the finished checkpoint is asked."""
    rng = random.Random("unknown-evaluation")
    return {
        "held_out_sums": held_out_sums(2000),
        "everyday": [(prompt, answer) for prompts, answer in EVERYDAY for prompt in prompts],
        "unknown": [unknown_exchange(rng) for _ in range(500)],
    }


def evaluate_checkpoint(folder: Path, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Accuracy from the FP8 checkpoint's dequantised weights, in FP32 and in BF16 arithmetic."""
    encode = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    spec = spec_from_hf(CONFIG, "CONFIG")
    for dtype in (torch.float32, torch.bfloat16):
        model = DemoModel(spec, spec.max_position_embeddings, dtype).to(device)
        read_checkpoint(folder, model)
        for task, questions in task_questions().items():
            yield f"{task}, {str(dtype).removeprefix('torch.')}", evaluate(model, encode, questions, device)


# ---- command --------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from --state; --steps may be larger than before")
    parser.add_argument("--state", type=Path, default=Path("output/train_demo"), help="log and resumable state")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop training early, with a checkpoint")
    parser.add_argument("--batch-size", type=int, default=256, help="rows a step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens a row")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="data processes")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--evaluate-every", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for folder in (args.output, args.state):
        folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.output / "tokenizer.json", args.seed)
    write_json(args.output / "tokenizer_config.json", tokenizer_config())
    spec = spec_from_hf(CONFIG, "CONFIG")
    assert tokenizer.get_vocab_size() < spec.vocab_size
    model = DemoModel(spec, spec.max_position_embeddings, torch.bfloat16 if cuda else torch.float32).to(device)
    optimizer = make_optimizer(model, args.peak_lr)
    first = load_state(args.state, model, optimizer) if args.resume else 0
    reached = train(model, optimizer, tokenizer, first, args)
    save_state(args.state, model, optimizer, reached)
    write_checkpoint(model, args.output)
    for name, result in evaluate_checkpoint(args.output, device):
        print(name, json.dumps(_short(result)), flush=True)


if __name__ == "__main__":
    main()
