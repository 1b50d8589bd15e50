"""The forward pass on a GPU: as few launches as the kernels allow, none of which asks the host anything.

A block's sublayer returns what is to be added to the residual stream (its "branch"); the next norm adds it, in FP32,
and rounds the sum to BF16 once. Branches of experts come in parts, and each tensor-parallel rank has its share.

Shape letters: T tokens, O outputs, P parts, D hidden, L layers, C cache blocks, Z slots of one,
E cache entry.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.rope import rope_tables
from ....models.sharding import stage_layers
from ..kernels.combine import add_parts
from ..kernels.embed import embed
from ..kernels.logits import FEW_ROWS, logits
from ..kernels.norm import Normed
from ..kernels.rope_cache import Tables
from ..kernels.router import Choice, Held, Scratch, choose_experts, scratch
from ..layers import product_f32
from ..parallel import ALONE, Group
from .attention import Attention
from .inputs import Step
from .linear import Form, operand, ranks_total
from .loader import Loader
from .logits import Logits
from .source import DeviceTensors


class Stream(NamedTuple):
    """The residual stream, and a branch that has not been added to it yet; there is no residual before the first.

    What `linear.Norm` takes. ``ranks``: those whose branches are to be added; one has all of it.
    """

    branch: Tensor  # [T, D] or [T, P, D]
    residual_TD: Tensor | None = None
    ranks: Group = ALONE.tp

    def sum(self) -> Tensor:
        """BF16 [T, D], as the next norm takes it."""
        branch_TD = _one_part(ranks_total(self.branch, self.ranks))
        return branch_TD.bfloat16() if self.residual_TD is None else (self.residual_TD + branch_TD.float()).bfloat16()

    def rows(self, rows_O: Tensor) -> Stream:
        residual_OD = None if self.residual_TD is None else self.residual_TD[rows_O]
        return self._replace(branch=self.branch[rows_O], residual_TD=residual_OD)


class Model:
    """A pipeline stage's layers. The last stage has the head and, when the weights have one, the MTP layer.

    At most ``max_tokens`` run in a step, which writes ``cache_LCZE``, of this stage: what fits beside the weights.
    ``last_O``, int32 [max_tokens]: the outputs of the step before, for tokens that are given as its outputs.
    """

    cache_LCZE: Tensor

    def __init__(self, loader: Loader, max_positions: int, max_tokens: int):
        spec, source = loader.spec, loader.source
        self._spec = spec
        rope = Tables(*(torch.from_numpy(table).to(source.device) for table in rope_tables(spec, max_positions)))
        mesh = source.mesh
        room = scratch(max_tokens * mesh.dp.size, spec.n_routed_experts, source.device)
        self._device = source.device
        self._stages = mesh.pp
        self.is_last_stage = mesh.is_last_stage
        self.last_O = torch.zeros(max_tokens, dtype=torch.int32, device=source.device)
        self._embedding = Embedding(source, "model.embed_tokens.weight") if mesh.is_first_stage else None
        self._blocks = [Block(loader, layer, rope, room) for layer in stage_layers(spec, mesh.grid, mesh.pp.index)]
        self._head = Head(loader, "model.norm.weight", "lm_head.weight") if mesh.is_last_stage else None
        self._mtp = MTP(loader, rope, room) if mesh.is_last_stage and source.has_mtp else None

    def hidden(self, step: Step) -> Stream:
        """The stream after this stage's layers; the next stage is given its sum."""
        stream = self._first(step)
        for block, cache_CZE in zip(self._blocks, self.cache_LCZE, strict=False):
            stream = block(stream, step, cache_CZE)
        if not self.is_last_stage:
            self._stages.send_on(stream.sum())
        return stream

    def _first(self, step: Step) -> Stream:
        """What this stage begins with: the embedded tokens, or what the stage before sends."""
        if self._embedding is not None:
            return self._embedding(step.token_ids_T, self.last_O)
        shape = len(step.token_ids_T), self._spec.hidden_size
        return Stream(self._stages.receive(torch.empty(shape, dtype=torch.bfloat16, device=self._device)))

    def logits(self, stream: Stream) -> Logits:
        """Of all rows; asked of the last stage only."""
        assert self._head is not None, "the last stage has the head"
        return self._head(stream)

    def routed(self, step: Step) -> list[Tensor]:
        """The experts, int32 [T, K + shared], that each MoE layer chooses in a step, which is run for this."""
        layers = [block.mlp for block in self._blocks if isinstance(block.mlp, MoE)]
        for layer in layers:
            layer.choices = []
        self.hidden(step)
        found = [layer.choices[0] for layer in layers if layer.choices]
        for layer in layers:
            layer.choices = None
        return found

    def draft_logits(self, stream: Stream, next_ids_T: Tensor, rows_O: Tensor, step: Step) -> Logits:
        """For the token after the next of rows ``rows_O``; the MTP layer's cache gets all T."""
        assert self._head is not None and self._mtp is not None, "the last stage has the MTP layer, where there is one"
        normed = self._head.norm(*stream)
        hidden_TD = _plain(normed) if self._spec.mtp_hidden == "post_norm" else normed.residual
        assert hidden_TD is not None, "a norm returns the sum"
        following = self._mtp.embedding(next_ids_T, self.last_O)
        return self._mtp(hidden_TD, following, rows_O, step, self.cache_LCZE[len(self._blocks)])


class Embedding:
    """Rows of the table by token id. Each tensor-parallel rank has a range of them and gives zeros for the others."""

    def __init__(self, source: DeviceTensors, name: str):
        self._ranks = source.mesh.tp
        self._first = source.first_row(name)
        self._rows_ND = source.plain(name)

    def __call__(self, token_ids_T: Tensor, last_O: Tensor) -> Stream:
        """See `kernels.embed`."""
        return Stream(embed(token_ids_T, last_O, self._rows_ND, self._first), ranks=self._ranks)


class Head:
    """The final norm and the logits of the vocabulary, of which each tensor-parallel rank has a part."""

    def __init__(self, loader: Loader, norm: str, table: str):
        self.norm = loader.plain_norm(norm)
        self._table_ND = loader.source.plain(table)
        self._ranks = loader.source.mesh.tp

    def __call__(self, stream: Stream) -> Logits:
        x_TD = _plain(self.norm(*stream))
        product = logits if len(x_TD) <= FEW_ROWS and self._table_ND.dtype == x_TD.dtype else product_f32
        return Logits(product(x_TD, self._table_ND), self._ranks)


class Block:
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, loader: Loader, layer: int, rope: Tables, room: Scratch):
        self._ranks = loader.source.mesh.tp
        prefix, eps = f"model.layers.{layer}", loader.spec.rms_norm_eps
        is_moe = loader.spec.is_moe(layer)
        projections = loader.projections(f"{prefix}.self_attn")
        self._input_norm = loader.norm(f"{prefix}.input_layernorm.weight", eps, projections.qkv_a.form)
        self._attention = Attention(loader.spec, projections, rope)
        self.mlp = MoE(loader, f"{prefix}.mlp", room) if is_moe else SwiGLU(loader, f"{prefix}.mlp")
        self._mlp_norm = loader.norm(f"{prefix}.post_attention_layernorm.weight", eps, self.mlp.form, plain=is_moe)

    def __call__(self, stream: Stream, step: Step, cache_CZE: Tensor) -> Stream:
        normed = self._input_norm(*stream)
        branch_TD = self._attention(operand(normed), step, cache_CZE)
        normed = self._mlp_norm(branch_TD, normed.residual, self._ranks)
        return Stream(self.mlp(normed), normed.residual, self._ranks)


class SwiGLU:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, loader: Loader, prefix: str):
        self._hidden = loader.spec.hidden_size
        self._gate_up, self._down = loader.swiglu(prefix)
        self.form = self._gate_up.form

    def __call__(self, normed: Normed) -> Tensor:
        y_TN = self._down(self._gate_up.gated(operand(normed)))
        return y_TN[:, : self._hidden]


class MoE:
    choices: list[Tensor] | None = None  # where there is one, what the router chose goes there

    def __init__(self, loader: Loader, prefix: str, room: Scratch):
        spec, source = loader.spec, loader.source
        self._spec = spec
        self._room = room
        self._gate_ED = source.plain(f"{prefix}.gate.weight")
        bias = f"{prefix}.gate.e_score_correction_bias"
        self._bias_E = source.plain(bias, torch.float32) if spec.has_router_bias else None
        self._experts = loader.experts(prefix)
        self._beside = SwiGLU(loader, f"{prefix}.shared_experts") if loader.shared_beside(prefix) else None
        is_alike = self._beside is None or self._beside.form == self._experts.form
        self.form = self._experts.form if is_alike else Form()
        self._held, self._shared = loader.experts_held, self._experts.shared
        self._is_part = loader.has_foreign
        self._replicas = source.mesh.dp

    def __call__(self, normed: Normed) -> Tensor:
        """[T, D], or parts [T, P, D] to be added."""
        beside_TD = None if self._beside is None else self._beside(normed)
        x_TD, replicas = _plain(normed), self._replicas
        if replicas.size == 1:
            return self._experts(operand(normed), self._choose(x_TD), beside_TD)
        y_TD = self._of_replicas(x_TD)
        return y_TD if beside_TD is None else y_TD.float().add_(beside_TD)

    def _of_replicas(self, x_TD: Tensor) -> Tensor:
        """BF16 [T, D] of replicas, whose tokens meet at the stack's experts."""
        replicas, counts = self._replicas, [len(x_TD)] * self._replicas.size
        x_SD = replicas.below(x_TD, counts)
        y = self._experts(x_SD, self._choose(x_SD))
        return replicas.own_total(add_parts(y) if y.dim() == 3 else y.bfloat16(), counts)

    def _choose(self, x_SD: Tensor) -> Choice:
        route = partial(choose_experts, x_SD, self._gate_ED, self._bias_E, self._spec, self._room, self._shared)
        if self.choices is not None:
            self.choices.append(route().ids)
        if not self._is_part:
            return route()
        own = len(x_SD) // self._replicas.size
        tokens = range(self._replicas.index * own, (self._replicas.index + 1) * own)
        return route(held=Held(self._held.start, len(self._held), tokens))


class MTP:
    """Predicts the token after the next from a hidden state and the next token (DeepSeek-V3 section 2.2)."""

    def __init__(self, loader: Loader, rope: Tables, room: Scratch):
        spec, source = loader.spec, loader.source
        prefix = f"model.layers.{spec.num_hidden_layers}"
        self.embedding = Embedding(source, f"{prefix}.embed_tokens.weight")
        self._embedding_norm = loader.plain_norm(f"{prefix}.enorm.weight")
        self._hidden_norm = loader.plain_norm(f"{prefix}.hnorm.weight")
        self._projection = source.plain(f"{prefix}.eh_proj.weight")
        self._block = Block(loader, spec.num_hidden_layers, rope, room)
        self._head = Head(loader, f"{prefix}.shared_head.norm.weight", f"{prefix}.shared_head.head.weight")

    def __call__(self, hidden_TD: Tensor, following: Stream, rows_O: Tensor, step: Step, cache_CZE: Tensor) -> Logits:
        """``following``: the embedded next tokens."""
        normed = self._embedding_norm(*following), self._hidden_norm(hidden_TD)
        joined = torch.cat([_plain(part) for part in normed], dim=1)
        stream = self._block(Stream(F.linear(joined, self._projection)), step, cache_CZE)
        return self._head(stream.rows(rows_O))


def _one_part(branch: Tensor) -> Tensor:
    """[T, D] of a branch that may be in parts."""
    if branch.dim() == 2:
        return branch
    return branch[:, 0] if branch.shape[1] == 1 else branch.sum(1, dtype=torch.float32)


def _plain(normed: Normed) -> Tensor:
    assert normed.plain is not None, "this norm was made with its BF16 result"
    return normed.plain
