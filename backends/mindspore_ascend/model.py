"""The network: trunk (embedding and blocks) with head, and the multi-token-prediction (MTP) layer.

Both exist as two graphs each, one for prompts and one for single tokens, which share their parameters.
Every length is symbolic, so each graph is compiled once for all batches.

Shape letters: T tokens, O outputs, D hidden, V vocabulary, R rope dim, P positions.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ...models.rope import rope_tables
from ...models.spec import ModelSpec
from .attention import Attention
from .layers import Embedding, FeedForward, Linear
from .moe import MoE
from .ops import OpSet
from .parallel import JoinColumns, SumOverRanks
from .weights import Piece, RankWeights


class Block(nn.Cell):
    """Attention and feed-forward, each after the norm of the residual stream that it is then added to.

    Takes and gives (what is still to be added, the stream), so that each addition is one operator with the next norm.
    """

    def __init__(self, source: RankWeights, op_set: OpSet, layer: int, blocks: int, block_size: int):
        super().__init__(auto_prefix=False)
        spec, name = source.spec, f"model.layers.{layer}"
        self.first_norm, self.add_norm = op_set.RmsNorm(spec.rms_norm_eps), op_set.AddRmsNorm(spec.rms_norm_eps)
        self.attention_norm = source.vector(f"{name}.attention_norm.weight", f"{name}.input_layernorm.weight")
        self.ffn_norm = source.vector(f"{name}.ffn_norm.weight", f"{name}.post_attention_layernorm.weight")
        self.attention = Attention(source, op_set, f"{name}.attention", f"{name}.self_attn", blocks, block_size)
        self.is_moe = spec.is_moe(layer)
        feed_forward = MoE if self.is_moe else FeedForward
        self.feed_forward = feed_forward(source, op_set, f"{name}.feed_forward", f"{name}.mlp")
        self.total = SumOverRanks(source.mesh.tp)

    def construct(
        self, new_TD: Tensor, x_TD: Tensor | None, turn: tuple, slots_T: Tensor, spread_P: Tensor | None, view: tuple,
        prefill: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if x_TD is None:
            x_TD = new_TD
            normed_TD = self.first_norm(x_TD, self.attention_norm)
        else:
            normed_TD, x_TD = self.add_norm(new_TD, x_TD, self.attention_norm)
        new_TD = self.attention(normed_TD, turn, slots_T, view, prefill)
        normed_TD, x_TD = self.add_norm(new_TD, x_TD, self.ffn_norm)
        new_TD = self.feed_forward(normed_TD, spread_P, prefill) if self.is_moe else self.feed_forward(normed_TD)
        return self.total(new_TD), x_TD


class Turns(nn.Cell):
    """What every layer's rotation takes for the given positions, from FP32 cosines and sines."""

    def __init__(self, spec: ModelSpec, op_set: OpSet, positions: int):
        super().__init__(auto_prefix=False)
        cos_PR, sin_PR = rope_tables(spec, positions)
        self.cos_PR, self.sin_PR = (Tensor(np.concatenate([table, table], 1)) for table in (cos_PR, sin_PR))

        self.turn = op_set.Turn(spec.qk_nope_head_dim, spec.qk_rope_head_dim)

    def construct(self, positions_T: Tensor) -> tuple[Tensor, ...]:
        return self.turn(ops.gather(self.cos_PR, positions_T, 0), ops.gather(self.sin_PR, positions_T, 0))


class Layers(nn.Cell):
    """What both trunks share: embedding, rope tables and blocks."""

    def __init__(self, source: RankWeights, op_set: OpSet, positions: int, blocks: int, block_size: int):
        super().__init__(auto_prefix=False)
        self.embedding = Embedding(source, "model.tok_embeddings.embedding_weight", "model.embed_tokens.weight")
        self.turns = Turns(source.spec, op_set, positions)
        self.blocks = nn.CellList(
            [Block(source, op_set, layer, blocks, block_size) for layer in range(source.spec.num_hidden_layers)],
            auto_prefix=False,
        )


class Trunk(nn.Cell):
    """Hidden states [T, D] before the final norm.

    ``view`` is what attention looks at: for prompts (slots of all
    visible tokens [S], row ends of queries [B] and of keys [B]), for single tokens (block tables [T, M], visible slots
    [T]).
    """

    def __init__(self, layers: Layers, prefill: bool):
        super().__init__(auto_prefix=False)
        self.layers = layers
        self.prefill = prefill

    def construct(
        self, token_ids_T: Tensor, positions_T: Tensor, slots_T: Tensor, spread_P: Tensor | None, *view: Tensor
    ) -> Tensor:
        turn = self.layers.turns(positions_T)
        new_TD, x_TD = self.layers.embedding(token_ids_T), None
        for block in self.layers.blocks:
            new_TD, x_TD = block(new_TD, x_TD, turn, slots_T, spread_P, view, self.prefill)
        return x_TD + new_TD


class Project(nn.Cell):
    """Norm and output projection. The matrix is held in FP32: a product of BF16 would round the logits to BF16."""

    def __init__(self, source: RankWeights, op_set: OpSet, norm: tuple[str, str], head: tuple[str, str]):
        super().__init__(auto_prefix=False)
        self.norm = op_set.RmsNorm(source.spec.rms_norm_eps)
        self.norm_weight = source.vector(*norm)
        self.matrix = Linear(source.matrix(head[0], Piece(head[1]), dtype=ms.float32))
        self.join = JoinColumns(op_set, source.mesh.tp)

    def construct(self, x_OD: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 logits [O, V] and their first maxima [O]."""
        normed_OD = self.norm(x_OD, self.norm_weight)
        logits_OV = self.join(self.matrix(normed_OD.astype(ms.float32)))
        return logits_OV, ops.argmax(logits_OV, -1).astype(ms.int32)


class Head(nn.Cell):
    """Logits and greedy tokens of rows ``rows_O`` of the trunk's result: the rest never meets the head."""

    def __init__(self, source: RankWeights, op_set: OpSet):
        super().__init__(auto_prefix=False)
        norm = "model.norm_out.weight", "model.norm.weight"
        self.project = Project(source, op_set, norm, ("lm_head.weight", "lm_head.weight"))

    def construct(self, hidden_TD: Tensor, rows_O: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(ops.gather(hidden_TD, rows_O, 0))


class Forward(nn.Cell):
    """Trunk and head as one graph: hidden states [T, D], and logits and greedy tokens of rows ``rows_O``."""

    def __init__(self, trunk: Trunk, head: Head):
        super().__init__(auto_prefix=False)
        self.trunk = trunk
        self.head = head

    def construct(self, rows_O: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``inputs`` are the trunk's."""
        hidden_TD = self.trunk(*inputs)
        logits_OV, greedy_O = self.head(hidden_TD, rows_O)
        return hidden_TD, logits_OV, greedy_O


class MTP(nn.Cell):
    """Predicts the token after the next from a hidden state and the next token (DeepSeek-V3 section 2.2)."""

    def __init__(self, source: RankWeights, op_set: OpSet, head: Head, blocks: int, block_size: int):
        super().__init__(auto_prefix=False)
        spec = source.spec
        canonical, name = f"model.layers.{spec.num_hidden_layers}", "mtp_model"
        self.after_norm = spec.mtp_hidden == "post_norm"
        self.main_norm, self.main_norm_weight = head.project.norm, head.project.norm_weight
        self.embedding = Embedding(
            source, f"{name}.tok_embeddings.embedding_weight", f"{canonical}.embed_tokens.weight"
        )
        self.norm = op_set.RmsNorm(spec.rms_norm_eps)
        self.embedding_norm = source.vector(f"{name}.layer.enorm.weight", f"{canonical}.enorm.weight")
        self.hidden_norm = source.vector(f"{name}.layer.hnorm.weight", f"{canonical}.hnorm.weight")
        self.fuse = Linear(source.matrix(f"{name}.layer.eh_proj.weight", Piece(f"{canonical}.eh_proj.weight")))
        self.block = Block(source, op_set, spec.num_hidden_layers, blocks, block_size)
        norm = f"{name}.norm.weight", f"{canonical}.shared_head.norm.weight"
        self.project = Project(source, op_set, norm, (f"{name}.head.weight", f"{canonical}.shared_head.head.weight"))

    def construct(
        self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, turn: tuple, slots_T: Tensor,
        spread_P: Tensor | None, view: tuple, prefill: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if self.after_norm:
            hidden_TD = self.main_norm(hidden_TD, self.main_norm_weight)
        embedding_TD = self.norm(self.embedding(next_ids_T), self.embedding_norm)
        joined = ops.concat((embedding_TD, self.norm(hidden_TD, self.hidden_norm)), -1)
        new_TD, x_TD = self.block(self.fuse(joined), None, turn, slots_T, spread_P, view, prefill)
        return self.project(ops.gather(x_TD + new_TD, rows_O, 0))


class Draft(nn.Cell):
    """The MTP layer for one phase: logits and greedy tokens for the token after the next of rows ``rows_O``."""

    def __init__(self, turns: Turns, mtp: MTP, prefill: bool):
        super().__init__(auto_prefix=False)
        self.turns = turns
        self.mtp = mtp
        self.prefill = prefill

    def construct(
        self, hidden_TD: Tensor, next_ids_T: Tensor, rows_O: Tensor, positions_T: Tensor, slots_T: Tensor,
        spread_P: Tensor | None, *view: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        turn = self.turns(positions_T)
        return self.mtp(hidden_TD, next_ids_T, rows_O, turn, slots_T, spread_P, view, self.prefill)
