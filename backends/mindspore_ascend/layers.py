"""Linear layers, the embedding and the feed-forward layer; every matrix is [out, in].

Shape letters: T tokens, D hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .ops import OpSet
from .parallel import SumOverRanks
from .weights import InputMapping, Piece, RankWeights


class Linear(nn.Cell):
    """x W^T."""

    def __init__(self, weight: Parameter):
        super().__init__(auto_prefix=False)
        self.weight = weight
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class QuantLinear(nn.Cell):
    """x W^T with INT8 weights, and activations quantised token by token as they come."""

    def __init__(self, op_set: OpSet, weight: Parameter, scale: Parameter, dtype: ms.Type):
        super().__init__(auto_prefix=False)
        self.weight, self.scale = weight, scale
        self.quantise = op_set.DynamicQuant()
        self.product = op_set.QuantMatmul(dtype)

    def construct(self, x: Tensor) -> Tensor:
        codes, scale = self.quantise(x)
        return self.product(codes, scale, self.weight, self.scale)


class StaticQuantLinear(nn.Cell):
    """x W^T with INT8 weights, and activations mapped to INT8 by the checkpoint's own scale and offset."""

    def __init__(
        self, op_set: OpSet, weight: Parameter, scale: Parameter, bias: Parameter, mapping: InputMapping, dtype: ms.Type
    ):
        super().__init__(auto_prefix=False)
        self.weight, self.scale, self.bias = weight, scale, bias
        self.quantise = op_set.StaticQuant(weight.shape[1], mapping.scale, mapping.offset)
        self.product = op_set.StaticQuantMatmul(dtype)

    def construct(self, x: Tensor) -> Tensor:
        return self.product(self.quantise(x), self.weight, self.scale, self.bias)


class Beside(nn.Cell):
    """Linear layers of the same input, their outputs beside each other."""

    def __init__(self, layers: list[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.layers = nn.CellList(layers, auto_prefix=False)

    def construct(self, x: Tensor) -> Tensor:
        outputs: tuple[Tensor, ...] = ()
        for layer in self.layers:
            outputs += (layer(x),)
        return ops.concat(outputs, -1)


def make_linear(source: RankWeights, op_set: OpSet, name: str, *pieces: Piece) -> nn.Cell:
    """A linear layer as the run holds them: plain or W8A8. ``name`` is that of the module.

    Pieces are one product, unless the checkpoint maps their inputs to INT8 in different ways.
    """
    if not source.int8:
        return Linear(source.matrix(f"{name}.weight", *pieces))
    mappings = [source.input_mapping(piece) for piece in pieces]
    if len(set(mappings)) > 1:
        return Beside([make_linear(source, op_set, f"{name}.{i}", piece) for i, piece in enumerate(pieces)])
    if mappings[0] is None:
        return QuantLinear(op_set, *source.codes(name, *pieces), source.dtype)
    return StaticQuantLinear(op_set, *source.static_codes(name, *pieces), mappings[0], source.dtype)


class Embedding(nn.Cell):
    """Rows of a table whose vocabulary is split between the ranks."""

    def __init__(self, source: RankWeights, name: str, canonical: str):
        super().__init__(auto_prefix=False)
        self.table = source.matrix(name, Piece(canonical))
        self.split = source.mesh.tp.size > 1
        self.first = source.first_token
        self.rows = self.table.shape[0]
        self.total = SumOverRanks(source.mesh.tp)

    def construct(self, token_ids_T: Tensor) -> Tensor:
        if not self.split:
            return ops.gather(self.table, token_ids_T, 0)
        row_T = token_ids_T - self.first
        mine_T = ops.logical_and(row_T >= 0, row_T < self.rows)
        x_TD = ops.gather(self.table, row_T * mine_T.astype(ms.int32), 0)
        return self.total(x_TD * mine_T.astype(x_TD.dtype).expand_dims(1))


class FeedForward(nn.Cell):
    """SwiGLU. The result is this rank's share of the sum over ranks, which the caller takes."""

    def __init__(self, source: RankWeights, op_set: OpSet, name: str, canonical: str):
        super().__init__(auto_prefix=False)
        gate_up = (Piece(f"{canonical}.gate_proj.weight"), Piece(f"{canonical}.up_proj.weight"))
        self.gate_up = make_linear(source, op_set, f"{name}.w_gate_hidden", *gate_up)
        self.activate = op_set.SwiGLU()
        self.down = make_linear(source, op_set, f"{name}.w2", Piece(f"{canonical}.down_proj.weight"))

    def construct(self, x_TD: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x_TD)))
