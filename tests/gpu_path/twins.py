"""The eager twins in the kernels' places: the same numbers quantised at the same points, without a kernel.

Attention of prompts stays a kernel: its roundings would tip codes of what follows.
"""

import torch

from deepspan.backends.torch_triton.gpu import attention, linear, logits, model
from deepspan.backends.torch_triton.kernels import (
    absorb,
    entries,
    few_rows,
    mla_decode,
    norm,
    quant,
    rope_cache,
    router,
    values,
)
from deepspan.backends.torch_triton.kernels import experts as expert_kernels


def _product(x, weight, gated=False):
    return few_rows.few_rows_eager(x, weight, gated).bfloat16()


def _attend(q, cache, table, lengths, scale, latent, longest):
    return mla_decode.Attended(mla_decode.attend_eager(q, cache, table, lengths, scale, latent).bfloat16(), None)


def _choose(x, weight, bias, spec, room, shared):
    return router.choose_experts_eager(x, weight, bias, spec, shared)


def put_in_place(monkeypatch):
    monkeypatch.setattr(linear, "few_rows", _product)
    monkeypatch.setattr(linear, "quantise", quant.quantise_eager)
    monkeypatch.setattr(linear, "add_norm_quantise", norm.add_norm_quantise_eager)
    monkeypatch.setattr(linear, "quantise_rows", quant.quantise_rows_eager)
    monkeypatch.setattr(expert_kernels, "gate_up", _gate_up)
    monkeypatch.setattr(expert_kernels, "down", _down)
    monkeypatch.setattr(attention, "absorb", absorb.absorb_eager)
    monkeypatch.setattr(attention, "attend", _attend)
    monkeypatch.setattr(attention, "values", values.values_eager)
    monkeypatch.setattr(attention, "rope_cache", rope_cache.rope_cache_eager)
    monkeypatch.setattr(attention, "read_entries", entries.read_entries_eager)
    monkeypatch.setattr(model, "choose_experts", _choose)
    monkeypatch.setattr(logits, "best", _best)


def _gate_up(x, ids, stack, tiles, config):
    return expert_kernels.gate_up_eager(x, ids, stack).bfloat16()


def _down(h, ids, weights, stack, tiles, foreign, config, beside):
    assert not foreign and beside is None
    return expert_kernels.down_eager(h, ids, weights, stack).to(torch.float32)


def _best(logits, out, copies, ranks, names_OV=None):
    assert ranks is None and names_OV is None
    found = logits.argmax(dim=1).int()
    if out is not None:
        out.copy_(found)
    if copies is not None:
        copies.token_ids_WO[int(copies.turn)] = found
    return found
