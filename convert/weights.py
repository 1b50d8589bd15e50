"""CheckpointWeights: what backends load from. Any stored format in, logical [out, in] weights out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..models.dtypes import FLOATS, to_f32
from ..models.errors import InputError
from ..models.quant import BLOCK, StoredInt4, result_dtype
from ..models.spec import ModelSpec
from .checkpoint import Checkpoint, listed
from .formats import FORMATS, Parts, Range, Window, ascend_weight_scales, check_parts
from .inventory import Inventory, take_inventory
from .quant_config import QuantConfig
from .storage import Stored

_OF_INPUTS = {"input_scale", "input_offset", "input_zero_point", "quant_bias"}


class CheckpointWeights:
    """The parameters of ``spec`` as ``checkpoint`` stores them.

    Construction checks everything that headers can show: each parameter is there once, in a known format, with the
    right shape, and every tensor belongs to one; anything else raises InputError. The two legal absences are
    `Inventory`'s: ``has_mtp`` and ``shared`` tell of them. Reading is thread-safe.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec):
        self._checkpoint = checkpoint
        inventory = take_inventory(checkpoint.tensors, spec, quant_config(checkpoint, spec))
        _check_complete(inventory, checkpoint, spec)
        self.has_mtp = inventory.has_mtp
        self.shared = inventory.shared
        self._params = inventory.params
        self._stored = inventory.stored

    def names(self) -> list[str]:
        """The canonical names that can be read, in checkpoint order."""
        return list(self._params)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._params[name].shape

    def format(self, name: str) -> str:
        """How the parameter is stored; `storage.Stored.format` lists the values."""
        return self.stored(name).format

    def group_size(self, name: str) -> int | None:
        """Input channels that share a scale in a weight that is stored in a 4-bit format, else None."""
        return self.stored(name).group_size

    def stored(self, name: str) -> Stored:
        """Format, block or group size and tensors of a parameter."""
        return self._stored[self.shared.get(name, name)]

    def bytes_as(self, dtype: str) -> int:
        """Memory of all parameters held as "f32" or "bf16"; tables that are shared count once."""
        size = sum(param.size for name, param in self._params.items() if name not in self.shared)
        return size * result_dtype(dtype).itemsize

    def read(self, name: str, dtype: str, rows: Range | None = None, cols: Range | None = None) -> NDArray:
        """The weight, or its window of (start, stop) ``rows`` and ``cols``.

        "f32" gives float32, "bf16" uint16 bit patterns, dequantised in FP32 and rounded once. Only the bytes that the
        window needs are read, up to a page, a scale block or an INT4 word around it.
        """
        stored = self.stored(name)
        window = Window.of(stored.param, rows, cols)
        return FORMATS[stored.format].dequantise(stored, self._read_parts(stored, window), window, dtype)

    def parts(self, name: str, rows: Range | None = None, cols: Range | None = None) -> Parts:
        """The stored tensors of a parameter, for backends that compute in its format.

        Codes are raw carriers, scales are FP32. With a window these are the parts that cover it: scales of the blocks
        that it touches, INT4 words widened to multiples of eight rows and columns, INT4 scales of all groups.
        """
        stored = self.stored(name)
        return self._read_parts(stored, Window.of(stored.param, rows, cols))

    def fp8_blocks(
        self, name: str, rows: Range | None = None, cols: Range | None = None
    ) -> tuple[NDArray, NDArray] | None:
        """Codes (e4m3fn) and multipliers of 128 x 128 blocks of a weight that is stored so, or of a slice of it.

        None when it is stored otherwise, or the slice cuts a block.
        """
        return self._blocks("fp8_block", name, rows, cols)

    def int8_blocks(
        self, name: str, rows: Range | None = None, cols: Range | None = None
    ) -> tuple[NDArray, NDArray] | None:
        """As `fp8_blocks`, with signed codes."""
        found = self._blocks("int8_block", name, rows, cols)
        return None if found is None else (found[0].view(np.int8), found[1])

    def _blocks(
        self, name_of_format: str, name: str, rows: Range | None, cols: Range | None
    ) -> tuple[NDArray, NDArray] | None:
        stored = self.stored(name)
        if stored.format != name_of_format or stored.block != BLOCK:
            return None
        windows = zip((rows, cols), stored.param.shape, BLOCK, strict=True)
        if any(cut and (cut[0] % block or (cut[1] % block and cut[1] != size)) for cut, size, block in windows):
            return None
        parts = self.parts(name, rows, cols)
        return parts["weight"], parts["weight_scale_inv"]

    def int4(self, name: str, rows: Range | None = None, cols: Range | None = None) -> StoredInt4 | None:
        """The stored words of a weight in a 4-bit format, or of a slice of it, else None."""
        stored = self.stored(name)
        if stored.group_size is None:
            return None
        window = Window.of(stored.param, rows, cols)
        (row, row_end), (column, column_end) = window.rows, window.cols
        shape, skip = (row_end - row, column_end - column), (row % 8, column % 8)
        parts = self._read_parts(stored, window)
        return StoredInt4(stored.format, parts, stored.group_size, stored.zeros_minus_one, shape, skip, column)

    def int8_channels(
        self, name: str, rows: Range | None = None, cols: Range | None = None
    ) -> tuple[NDArray, NDArray] | None:
        """Signed codes and multipliers [out] of a weight that is stored as INT8 without offsets, else None."""
        stored = self.stored(name)
        if stored.format not in ("int8_channel", "ascend_static"):
            return None
        parts = self.parts(name, rows, cols)
        if "weight_offset" in parts and parts["weight_offset"].any():
            return None
        scales = parts["weight_scale"] if stored.format == "int8_channel" else ascend_weight_scales(parts)
        return parts["weight"].view(np.int8), scales.reshape(-1)

    def static_input(self, name: str, rows: Range | None = None) -> tuple[float, int, NDArray | None] | None:
        """Scale, offset and bias [out] of inputs whose mapping to INT8 the checkpoint fixes, else None.

        ``x_q = clip(round(x / scale + offset), -128, 127)``; the bias is added to the sums of products of codes. It is
        None where the format keeps none, and then -offset times the sums of the codes.
        """
        stored = self.stored(name)
        if "input_scale" not in stored.tensors:
            return None
        numbers = {}
        for part in stored.tensors.keys() & _OF_INPUTS:
            info = stored.tensors[part]
            array = self._checkpoint.read(info.name, rows if part == "quant_bias" else None)
            numbers[part] = (to_f32(array, info.dtype) if info.dtype in FLOATS else array).reshape(-1)
        offset = numbers.get("input_offset", numbers.get("input_zero_point"))
        return float(numbers["input_scale"][0]), 0 if offset is None else int(offset[0]), numbers.get("quant_bias")

    def _read_parts(self, stored: Stored, window: Window) -> Parts:
        parts = {}
        for part, (rows, cols) in FORMATS[stored.format].ranges(stored, window).items():
            info = stored.tensors[part]
            array = self._checkpoint.read(info.name, rows, cols)
            is_scale = part != "weight" and info.dtype in FLOATS
            parts[part] = to_f32(array, info.dtype) if is_scale else array
        check_parts(stored, parts)
        return parts


def _check_complete(inventory: Inventory, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    if inventory.faults:
        raise inventory.faults[0]
    if inventory.missing:
        where = str(checkpoint.directory)
        raise InputError(
            f"missing: {listed(inventory.missing)}", where, "get the complete checkpoint of this config.json"
        )
    if extra := inventory.extra:
        todo = "get the config.json that belongs to the checkpoint, or remove the tensors"
        if all(name.startswith(f"model.layers.{spec.num_hidden_layers}.") for name in extra):
            todo = "set num_nextn_predict_layers to the number of MTP layers, which these tensors look like"
        raise InputError(f"no parameter for: {listed(extra)}", str(checkpoint.tensors[extra[0]].path), todo)


def quant_config(checkpoint: Checkpoint, spec: ModelSpec) -> QuantConfig:
    """The checkpoint's own declaration; a directory without config.json is read by the spec's."""
    path = checkpoint.directory / "config.json"
    if not path.exists():
        return QuantConfig({"weight_block_size": list(spec.fp8.block)} if spec.fp8 else {}, "model spec")
    values = checkpoint.config.get("quantization_config") or {}
    if not isinstance(values, Mapping):
        raise InputError("quantization_config is not an object", str(path), "repair it, or remove it when nothing is")
    return QuantConfig(values, str(path))
