"""CheckpointWeights with the compiled kernels where the ``speed`` extra is installed; the same bits either way."""

from __future__ import annotations

from importlib.util import find_spec

from numpy.typing import NDArray

from .formats import Range
from .weights import CheckpointWeights

HAS_KERNELS = find_spec("numba") is not None


class FastWeights(CheckpointWeights):
    """Reads FP8 blocks as BF16 at the speed of memory; everything else as CheckpointWeights does."""

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        stored = self.stored(name)
        if not HAS_KERNELS or stored.format != "fp8_block" or dtype != "bf16":
            return super().read(name, dtype, rows, cols)
        from . import kernels  # numba takes a second to import

        assert stored.block is not None
        parts = self.parts(name, rows, cols)
        origin = (rows or (0, 0))[0], (cols or (0, 0))[0]
        return kernels.fp8_to_bf16(parts["weight"], parts["weight_scale_inv"], stored.block, origin)
