"""Checkpoints in every stored format with the values that they mean, written from the formats' definitions.

Nothing here comes from the code under test: codes are drawn at random and what they mean is spelled out element by
element, so that a wrong layout cannot agree with itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deepspan.models.params import Param, parameters
from deepspan.models.spec import ModelSpec
from tests.specs import make

AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # output column within eight that nibble p of a word holds
GROUP = 32

# Every linear is a multiple of eight both ways, for INT4; blocks of 128 are partial along both axes, groups of 32 along
# the inputs of some. The router and the norms are odd.
SPEC = make(
    vocab_size=88, hidden_size=136, intermediate_size=264, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, q_lora_rank=40, kv_lora_rank=32, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14,
    n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3,
)  # fmt: skip


@dataclass
class Encoded:
    """One weight: stored tensors by the last part of their name, and its FP32 values."""

    tensors: dict[str, torch.Tensor]
    values: np.ndarray


Encoder = Callable[[tuple[int, int], np.random.Generator], Encoded]


@dataclass
class Format:
    """``name`` is `CheckpointWeights.format`'s; ``config`` is config.json's quantization_config."""

    name: str
    encode: Encoder
    config: dict = field(default_factory=dict)


def _floats(shape: tuple[int, ...], rng: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)


def _scales(shape: tuple[int, ...], rng: np.random.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Positive; E8M0 holds powers of two."""
    if dtype == torch.float8_e8m0fnu:
        return torch.exp2(torch.from_numpy(rng.integers(-8, 3, shape)).float()).to(dtype)
    return torch.from_numpy(rng.uniform(1e-3, 0.5, shape).astype(np.float32)).to(dtype)


def plain(dtype: torch.dtype) -> Encoder:
    def encode(shape: tuple[int, ...], rng: np.random.Generator) -> Encoded:
        weight = _floats(shape, rng, dtype)
        return Encoded({"weight": weight}, weight.float().numpy())

    return encode


def _by_block(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> np.ndarray:
    rows, columns = (torch.arange(size) // unit for size, unit in zip(values.shape, block, strict=True))
    return (values * scales.float()[rows][:, columns]).numpy()


def blocks(code: torch.dtype, scale: torch.dtype, part: str = "weight_scale_inv", block=(128, 128), ue8m0=False):
    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        if code == torch.int8:
            weight = torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))
        else:
            weight = _floats(shape, rng, code)
        grid = tuple(-(-size // unit) for size, unit in zip(shape, block, strict=True))
        scales = _scales(grid, rng, scale)
        if ue8m0:
            scales = torch.exp2(torch.log2(scales).ceil())
        return Encoded({"weight": weight, part: scales}, _by_block(weight.float(), scales, block))

    return encode


def channels(scale: torch.dtype, flat: bool = False, offset: bool = False, unused: tuple[str, ...] = ()) -> Encoder:
    """INT8 with a scale a row. ``unused`` are activation scales, which weights do not depend on."""

    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        weight = torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))
        scales = _scales((shape[0], 1), rng, scale)
        tensors = {"weight": weight, "weight_scale": scales.reshape(-1) if flat else scales}
        shift = 0.0
        if offset:
            tensors["weight_offset"] = torch.from_numpy(rng.integers(-3, 4, (shape[0], 1))).to(scale)
            shift = tensors["weight_offset"].float()
        tensors |= {name: torch.ones(1) for name in unused}
        return Encoded(tensors, ((weight.float() - shift) * scales.float()).numpy())

    return encode


def ascend_static(keeps_scale: bool = False, fp16_model: bool = False) -> Encoder:
    """Ascend's W8A8: deq_scale is the activation's scale times the weight's, which older files also hold."""

    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        dynamic = channels(torch.float32, offset=False)(shape, rng)
        scales = dynamic.tensors.pop("weight_scale")
        input_scale = torch.tensor([2.0**-5])  # a power of two: the quotient is exact
        tensors = dynamic.tensors | {
            "input_scale": input_scale,
            "input_offset": torch.tensor([3.0]),
            "deq_scale": (input_scale * scales).reshape(-1),
            "quant_bias": torch.from_numpy(rng.integers(-99, 99, shape[0]).astype(np.int32)),
        }
        if fp16_model:  # the FP32 pattern in the low half of 64 bits
            tensors["deq_scale"] = tensors["deq_scale"].view(torch.int32).long()
        if keeps_scale:
            tensors |= {"weight_scale": scales, "weight_offset": torch.zeros_like(scales)}
        return Encoded(tensors, dynamic.values)

    return encode


def _words(nibbles: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values of 0..15 along the last axis as one int32: value ``order[p]`` in bits 4p to 4p + 3."""
    eights = np.pad(nibbles, [(0, 0), (0, -nibbles.shape[1] % 8)]).astype(np.int64).reshape(nibbles.shape[0], -1, 8)
    words = sum(eights[:, :, column] << (4 * p) for p, column in enumerate(order))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def _int4(shape: tuple[int, int], rng: np.random.Generator, shuffled=False, group=GROUP) -> tuple[np.ndarray, ...]:
    """Codes [N, K], zero points [N, G], the group of each channel."""
    groups = -(-shape[1] // group)
    group_of = np.arange(shape[1]) // group
    if shuffled:
        group_of = rng.permutation(group_of)
    return rng.integers(0, 16, shape), rng.integers(0, 16, (shape[0], groups)), group_of


def _affine(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (codes - zeros).astype(np.float32) * scales


def gptq(version: int, shuffled: bool = False, g_idx: bool = True) -> Encoder:
    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        codes, zeros, group_of = _int4(shape, rng, shuffled)
        scales = _scales((zeros.shape[1], shape[0]), rng, torch.float16)
        stored_zeros = (zeros - 1) % 16 if version == 1 else zeros
        tensors = {
            "qweight": _words(codes).T.contiguous(),
            "qzeros": _words(stored_zeros.T),
            "scales": scales,
        }
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        return Encoded(tensors, _affine(codes, zeros[:, group_of], scales.float().numpy().T[:, group_of]))

    return encode


def awq(group: int = GROUP) -> Encoder:
    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        codes, zeros, group_of = _int4(shape, rng, group=group)
        scales = _scales((zeros.shape[1], shape[0]), rng, torch.float16)
        tensors = {"qweight": _words(codes.T, AWQ_NIBBLES), "qzeros": _words(zeros.T, AWQ_NIBBLES), "scales": scales}
        return Encoded(tensors, _affine(codes, zeros[:, group_of], scales.float().numpy().T[:, group_of]))

    return encode


def packed(symmetric: bool, scale: torch.dtype = torch.bfloat16, shuffled: bool = False, group=GROUP) -> Encoder:
    """compressed-tensors' pack-quantized: codes and zero points are signed values plus eight."""

    def encode(shape: tuple[int, int], rng: np.random.Generator) -> Encoded:
        codes, zeros, group_of = _int4(shape, rng, shuffled, group)
        zeros = np.full_like(zeros, 8) if symmetric else zeros
        scales = _scales(zeros.shape, rng, scale)
        tensors = {"weight_packed": _words(codes), "weight_scale": scales, "weight_shape": torch.tensor(shape)}
        if not symmetric:
            tensors["weight_zero_point"] = _words(zeros.T).T.contiguous()
        if shuffled:
            tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        return Encoded(tensors, _affine(codes, zeros[:, group_of], scales.float().numpy()[:, group_of]))

    return encode


def ct_config(form: str, bits: int, symmetric=True, group_size: int | None = None, activations=None) -> dict:
    strategy = "channel" if group_size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
E4M3, FNUZ, E8M0 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e8m0fnu

FORMATS: dict[str, Format] = {
    "bf16": Format("bf16", plain(torch.bfloat16)),
    "f16": Format("f16", plain(torch.float16)),
    "f32": Format("f32", plain(torch.float32)),
    "fp8": Format("fp8_block", blocks(E4M3, torch.float32), FP8),
    "fp8, ue8m0 values": Format(
        "fp8_block", blocks(E4M3, torch.float32, ue8m0=True), FP8 | {"scale_fmt": "ue8m0"}
    ),
    "fp8, E8M0 scales": Format("fp8_block", blocks(E4M3, E8M0), FP8),
    "fp8, BF16 scales": Format("fp8_block", blocks(E4M3, torch.bfloat16), FP8),
    "fp8, .scale": Format("fp8_block", blocks(E4M3, E8M0, part="scale"), FP8),
    "fp8, weight_scale": Format(
        "fp8_block", blocks(E4M3, torch.bfloat16, part="weight_scale"), {"quant_method": "compressed-tensors"}
    ),
    "fp8, small blocks": Format(
        "fp8_block", blocks(E4M3, torch.float32, block=(48, 20)), FP8 | {"weight_block_size": [48, 20]}
    ),
    "fp8, undeclared": Format("fp8_block", blocks(E4M3, torch.float32)),
    "fnuz": Format("fp8_block_fnuz", blocks(FNUZ, torch.float32), FP8),
    "int8 blocks": Format(
        "int8_block",
        blocks(torch.int8, torch.float32),
        {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]},
    ),
    "int8 channels, F32": Format("int8_channel", channels(torch.float32), {"quant_method": "w8a8_int8"}),
    "int8 channels, flat": Format("int8_channel", channels(torch.float32, flat=True)),
    "int-quantized": Format(
        "int8_channel", channels(torch.bfloat16), ct_config("int-quantized", 8, activations=TOKEN)
    ),
    "int-quantized, static": Format(
        "int8_channel",
        channels(torch.bfloat16, unused=("input_scale",)),
        ct_config("int-quantized", 8, activations=TOKEN | {"strategy": "tensor", "dynamic": False}),
    ),
    "ascend dynamic": Format("int8_channel", channels(torch.float32, offset=True)),
    "ascend static": Format("ascend_static", ascend_static()),
    "ascend static of an FP16 model": Format("ascend_static", ascend_static(fp16_model=True)),
    "ascend static, with weight_scale": Format("int8_channel", ascend_static(keeps_scale=True)),
    "gptq v1": Format("gptq", gptq(1), GPTQ),
    "gptq v2": Format("gptq", gptq(2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq, desc_act": Format("gptq", gptq(1, shuffled=True), GPTQ | {"desc_act": True, "checkpoint_format": "gptq"}),
    "gptq, no g_idx": Format("gptq", gptq(1, g_idx=False), GPTQ),
    "gptq from auto-round": Format(
        "gptq", gptq(1), GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    ),
    "awq": Format("awq", awq(), AWQ),
    "pack-quantized": Format("ct_int4", packed(symmetric=True), ct_config("pack-quantized", 4, group_size=GROUP)),
    "pack-quantized, zero points": Format(
        "ct_int4", packed(symmetric=False), ct_config("pack-quantized", 4, symmetric=False, group_size=GROUP)
    ),
    "pack-quantized, F32 scales, g_idx": Format(
        "ct_int4",
        packed(symmetric=True, scale=torch.float32, shuffled=True),
        ct_config("pack-quantized", 4, group_size=GROUP),
    ),
}  # fmt: skip


def encode_model(spec: ModelSpec, form: Format, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """All tensors of a model whose linear weights are in ``form``, and the FP32 value of every parameter."""
    rng = np.random.default_rng(seed)
    tensors, values = {}, {}
    for param in parameters(spec):
        encoded = _encoder(param, form)(param.shape, rng)
        prefix = param.name.removesuffix("weight") if param.quantised else ""
        tensors |= {prefix + part if prefix else param.name: tensor for part, tensor in encoded.tensors.items()}
        values[param.name] = encoded.values
    return tensors, values


def _encoder(param: Param, form: Format) -> Encoder:
    if param.quantised:
        return form.encode
    return plain(torch.float32 if param.dtype == "F32" else torch.bfloat16)


def hf_config(spec: ModelSpec) -> dict:
    """config.json of a spec of the V3 family with YaRN."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "first_k_dense_replace", "moe_layer_freq",
        "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor",
        "num_nextn_predict_layers", "max_position_embeddings", "rope_theta", "rms_norm_eps", "bos_token_id",
    )  # fmt: skip
    yarn = spec.yarn
    assert yarn is not None
    rope = {key: getattr(yarn, key) for key in ("factor", "original_max_position_embeddings", "mscale_all_dim")}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        **{key: getattr(spec, key) for key in same},
        "rope_scaling": {"type": "yarn", **rope},
        "eos_token_id": list(spec.eos_token_ids),
    }


def write(
    directory: Path, tensors: dict[str, torch.Tensor], quantization_config: dict | None = None, spec: ModelSpec = SPEC
) -> Path:
    """Two shards, dealt tensor by tensor: many scales are in another file than their weight."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    shards = {f"model-{n + 1:05}-of-00002.safetensors": names[n::2] for n in range(2)}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = hf_config(spec)
    if quantization_config:
        config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config))
    return directory
