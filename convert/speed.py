"""The ``speed`` extra: numba, which compiles `kernels`, `quantise_kernels` and `fast_checksums`."""

from __future__ import annotations

from importlib.util import find_spec

HAS_KERNELS = find_spec("numba") is not None
