"""``quantization_config`` of config.json: what the tensors alone do not say. How a weight is stored, they do say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ..models.errors import InputError
from ..models.quant import BLOCK

# Names of INT4 layouts: quant_method, or auto-round's packing_format, to the method whose layout it is.
_LAYOUTS = {"gptq": "gptq", "awq": "awq", "auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


@dataclass(frozen=True)
class QuantConfig:
    """The declared numbers; every one raises InputError when it is needed and not declared, or not supported.

    ``where`` names the file in errors.
    """

    values: Mapping[str, Any]
    where: str

    @property
    def block(self) -> tuple[int, int]:
        """weight_block_size of FP8 and INT8 blocks, 128 x 128 unless declared."""
        block = self.values.get("weight_block_size")
        if block is None:
            return BLOCK
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            self._fail(f"weight_block_size is {block!r}", "give [rows, columns]")
        return block[0], block[1]

    def int4_layout(self, has_g_idx: bool) -> str:
        """gptq or awq for tensors named qweight, which both use; g_idx belongs to gptq."""
        method = self.values.get("quant_method")
        declared = _LAYOUTS.get(str(self.values.get("packing_format", method)))
        if declared is None:
            self._fail(f"quant_method is {method!r} and the checkpoint has qweight tensors", "declare gptq or awq")
        if has_g_idx and declared == "awq":
            self._fail("quant_method is awq and the checkpoint has g_idx tensors, which are gptq's", "correct one")
        if declared == "awq" and str(self.values.get("version", "gemm")).lower() != "gemm":
            self._fail(f"awq version is {self.values['version']!r}", "use the gemm version")
        self._check_bits(self.values.get("bits", self.values.get("w_bit")))
        return declared

    @property
    def zeros_minus_one(self) -> bool:
        """Whether GPTQ's qzeros hold the zero point minus one: files of the first version, and undeclared ones."""
        declared = self.values.get("checkpoint_format") or "gptq"
        if declared not in ("gptq", "gptq_v2"):
            self._fail(f"checkpoint_format is {declared!r}", "use gptq or gptq_v2")
        return bool(declared == "gptq")

    def group_size(self, channels: int) -> int:
        """Input channels that share a scale in GPTQ and AWQ files; -1 is all of them."""
        return self._group(self.values.get("group_size", self.values.get("q_group_size")), channels)

    def packed_group(self, channels: int, has_zeros: bool) -> int:
        """The same for compressed-tensors' config_groups, which must agree on their 4-bit weights."""
        schemes = self._packed_schemes()
        sizes = [scheme.get("group_size") for scheme in schemes]
        if any(size != sizes[0] for size in sizes):
            self._fail(f"4-bit config_groups have group sizes {sizes}", "use a single group size")
        if any(bool(scheme.get("symmetric", True)) is has_zeros for scheme in schemes):
            state = "has" if has_zeros else "lacks"
            self._fail(f"symmetric is {has_zeros} and the checkpoint {state} zero points", "correct one")
        whole = sizes[0] is None and all(scheme.get("strategy") == "channel" for scheme in schemes)
        return channels if whole else self._group(sizes[0], channels)

    def _packed_schemes(self) -> list[Mapping[str, Any]]:
        declared = self.values.get("config_groups")
        groups = declared.values() if isinstance(declared, Mapping) else []
        schemes = [group.get("weights") for group in groups if isinstance(group, Mapping)]
        found = [scheme for scheme in schemes if isinstance(scheme, Mapping) and scheme.get("num_bits") == 4]
        if not found:
            self._fail("weights are packed and no config_groups entry has num_bits 4", "declare the group")
        return found

    def _group(self, size: Any, channels: int) -> int:
        if type(size) is not int or size == 0 or size < -1:
            self._fail(f"group_size is {size!r} and the checkpoint has INT4 weights", "declare the group size")
        return channels if size == -1 else int(size)

    def _check_bits(self, bits: Any) -> None:
        if bits != 4:
            self._fail(f"bits is {bits!r}", "only 4-bit weights can be read from this layout")

    def _fail(self, what: str, todo: str) -> NoReturn:
        raise InputError(what, f"{self.where}: quantization_config", todo)
