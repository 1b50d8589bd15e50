"""Run by msrun: this rank's tokens through the experts of all ranks, against the weighted sum over experts in numpy."""

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.communication import get_group_size, get_rank, init

from deepspan.backends.mindspore_ascend.mesh import make_mesh
from deepspan.backends.mindspore_ascend.ops import composite
from deepspan.models.catalog import load_spec
from deepspan.models.sharding import Grid

ROWS, WIDTH, OUT, EXPERTS, KEPT = 5, 12, 9, 6, 3


class Through(nn.Cell):
    """Tokens to their experts, one product there, and back."""

    def __init__(self, group, spec, weight_EDF, scale_EF):
        super().__init__(auto_prefix=False)
        self.int8 = scale_EF is not None
        self.dispatch = composite.Dispatch(group, spec, self.int8)
        self.product = composite.QuantGroupedMatmul(ms.float32) if self.int8 else composite.GroupedMatmul()
        self.weights = (weight_EDF, scale_EF) if self.int8 else (weight_EDF,)
        self.combine = composite.Combine(group, spec)

    def construct(self, x_TD, index_TK, weight_TK):
        rows, counts_E, ticket = self.dispatch(x_TD, index_TK, weight_TK)
        return self.combine(self.product(*rows, *self.weights, counts_E), ticket), counts_E


def main():
    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    init()
    ranks, rank = get_group_size(), get_rank()
    group = make_mesh(Grid(dp=ranks, ep=ranks), rank).ep
    spec = load_spec("demo").replace(
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": KEPT, "n_group": 1, "topk_group": 1}
    )
    rng = np.random.default_rng(11)  # the same on every rank
    x_RTD = rng.normal(size=(ranks, ROWS, WIDTH)).astype(np.float32)
    index_RTK = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (ranks, ROWS, 1)), axis=-1)[..., :KEPT]
    weight_RTK = rng.random((ranks, ROWS, KEPT)).astype(np.float32)
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    for int8 in (False, True):
        codes_EDF = rng.integers(-127, 128, (EXPERTS, WIDTH, OUT)).astype(np.int8)
        scale_EF = rng.random((EXPERTS, OUT)).astype(np.float32) / 100
        matrix_EDF = codes_EDF * scale_EF[:, None]
        held = (codes_EDF[own], scale_EF[own]) if int8 else (matrix_EDF[own], None)
        cell = Through(group, spec, *(None if part is None else ms.Tensor(part) for part in held))
        y_TF, counts_E = cell(*(ms.Tensor(part[rank]) for part in (x_RTD, index_RTK, weight_RTK)))
        chosen_TKDF = matrix_EDF[index_RTK[rank]]
        wanted_TF = np.einsum("td,tkdf,tk->tf", x_RTD[rank], chosen_TKDF, weight_RTK[rank])
        exact = 0.02 if int8 else 1e-5  # of the largest value: activations have seven bits there
        np.testing.assert_allclose(y_TF.asnumpy(), wanted_TF, atol=exact * np.abs(wanted_TF).max())
        np.testing.assert_array_equal(counts_E.asnumpy(), np.bincount(index_RTK.reshape(-1), minlength=EXPERTS)[own])
    print(f"rank {rank} has the sums")


if __name__ == "__main__":
    main()
