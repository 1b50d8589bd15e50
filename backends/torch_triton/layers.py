"""What every block is made of: linear layers, norms, rotary embedding, SwiGLU.

Shape letters: T tokens, N outputs, K inputs, D hidden, H heads, R rope dim, P rotated pairs (R / 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.spec import ModelSpec
from .device import packs
from .weights import TensorSource


class Linear:
    """y = x W^T without a bias, for W [N, K].

    Where oneDNN can, W is kept in its blocked layout: about half the time of a row-major W at a few tokens, and rows
    of y that have the same bits for any T, so that a batch cannot change what a request computes.
    """

    def __init__(self, weight_NK: Tensor):
        self._packed = packs(weight_NK.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous()) if self._packed else weight_NK

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._packed:
            y_TN: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, None, "none", [], "")
            return y_TN
        return F.linear(x_TK, self._weight)


class RMSNorm:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in FP32 and rounded once."""

    def __init__(self, weight: Tensor, eps: float):
        self._weight = weight
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class SwiGLU:
    """down(silu(gate(x)) * up(x)), or this rank's part of that sum; gate and up are one matrix."""

    def __init__(self, source: TensorSource, prefix: str):
        self.gate_up = Linear(source.stack(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"))
        self.down = Linear(source.read(f"{prefix}.down_proj.weight"))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x_TD)))


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] along the last axis."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on the last axis of ``x``: adjacent pairs, as complex numbers, times ``turn`` [..., P] (complex64)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def adjacent_pairs(spec: ModelSpec, weight_NK: Tensor, block: int) -> Tensor:
    """Rows of a projection such that pairs to be rotated are adjacent.

    The rope rows are the last qk_rope_head_dim of every ``block`` rows. Checkpoints without rope_interleave keep the
    first numbers of all pairs, then the second; queries and keys that are reordered alike have the same products.
    """
    if spec.rope_interleave:
        return weight_NK
    plain = block - spec.qk_rope_head_dim
    halves = torch.arange(spec.qk_rope_head_dim).view(2, -1)
    order = torch.cat([torch.arange(plain), plain + halves.T.flatten()])
    return weight_NK.view(-1, block, weight_NK.shape[1])[:, order].flatten(0, 1)


def product_f32(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """BF16 times BF16 or FP32, as float32 [T, N]: logits, where a rounded result would make ties."""
    if x_TK.device.type == "cpu" or weight_NK.dtype == torch.float32:
        return x_TK.float() @ weight_NK.float().t()
    return torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)
