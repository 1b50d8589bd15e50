"""What the cache holds of a token in a layer: its normed latent and its rotated rope key.

In FP8 an entry is bytes, in FlashMLA's order: the latent's e4m3fn codes, an FP32 scale for each 128 of them, the rope
key in BF16; 656 for V3. Codes are e4m3fn on every chip. Scales are powers of two: a code times its scale is then a BF16
number, so whoever reads an entry reads the same values.

Shape letters: C latent (kv_lora_rank), R rope dim, X = C + R values of an entry, E what an entry takes in the cache's
dtype (X values, or bytes), G groups of 128 latent values. "..." is any number of dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.costs import CACHE_GROUP, cache_bytes
from ...models.errors import InputError
from ...models.spec import ModelSpec
from .device import DTYPES

FP8_CACHE = torch.uint8  # the dtype that says so
_MAX = 448.0
_FLOOR = 1e-4  # the least absmax of a group: zeros must not give 0 / 0


def empty_cache(
    spec: ModelSpec, kv_dtype: str, layers: int, blocks: int, block_size: int, device: torch.device | None = None
) -> Tensor:
    """Zeros [layers, blocks, block_size, E]."""
    width, dtype = spec.latent_dim, DTYPES.get(kv_dtype, FP8_CACHE)
    if dtype == FP8_CACHE:
        width = cache_bytes(spec, kv_dtype)
    return torch.zeros(layers, blocks, block_size, width, dtype=dtype, device=device)


def check_cache(spec: ModelSpec, kv_dtype: str) -> None:
    """Refuse latents after which scales would not be aligned."""
    if kv_dtype == "fp8" and spec.kv_lora_rank % 4:
        what = f"kv_lora_rank {spec.kv_lora_rank} is not a multiple of 4"
        raise InputError(what, "engine.kv_dtype: fp8", "set it to auto or bf16")


def to_entries(values_X: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """[..., X] as a cache of ``dtype`` holds it, [..., E]."""
    if dtype != FP8_CACHE:
        return values_X.to(dtype)
    latent_C, rope_R = values_X[..., :latent].float(), values_X[..., latent:].bfloat16()
    latent_GX = F.pad(latent_C, (0, -latent % CACHE_GROUP)).unflatten(-1, (-1, CACHE_GROUP))
    mantissa_G, exponent_G = torch.frexp(latent_GX.abs().amax(-1).clamp(min=_FLOOR) / _MAX)
    scale_G = torch.ldexp(torch.ones_like(mantissa_G), exponent_G - (mantissa_G == 0.5).int())
    codes_C = (latent_GX / scale_G[..., None]).flatten(-2)[..., :latent].to(torch.float8_e4m3fn)
    parts = codes_C, scale_G, rope_R.contiguous()
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def from_entries(entries_E: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """The values [..., X] of entries [..., E], in ``dtype``."""
    if entries_E.dtype != FP8_CACHE:
        return entries_E.to(dtype)
    rope_start = latent + 4 * -(-latent // CACHE_GROUP)
    codes_C = entries_E[..., :latent].view(torch.float8_e4m3fn)
    scale_G = entries_E[..., latent:rope_start].contiguous().view(torch.float32)
    rope_R = entries_E[..., rope_start:].contiguous().view(torch.bfloat16)
    scale_C = scale_G.repeat_interleave(CACHE_GROUP, -1)[..., :latent]
    return torch.cat([codes_C.to(dtype) * scale_C.to(dtype), rope_R.to(dtype)], -1)
