"""``--allow RULE=NAME``: exceptions from strictness, each asked for by name and kept in the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ..models.errors import InputError
from ..models.quant import block_grid
from ..models.spec import nearest
from .checkpoint import Checkpoint
from .safetensors import TensorInfo
from .storage import BLOCK_SCALES, FP8_FORMATS

RULES = {
    "drop": "leave out a tensor that belongs to no parameter",
    "unscaled": "take an FP8 weight without multipliers as it is, as if they were all 1",
    "round": "round an F32 or F16 tensor to the BF16 of the model",
}


class Allowances:
    """The rules that the user gave; a name may hold wildcards (``*``)."""

    def __init__(self, given: Iterable[str] = ()):
        self._rules = [_parse(text) for text in given]
        self._used: set[tuple[str, str]] = set()

    def __call__(self, rule: str, name: str) -> bool:
        """Whether ``rule`` is allowed for the tensor ``name``."""
        found = {given for given in self._rules if given[0] == rule and fnmatchcase(name, given[1])}
        self._used |= found
        return bool(found)

    def check_used(self) -> None:
        """Raise InputError for a rule that nothing needed: its name is misspelt, or it hides nothing any more."""
        if unused := [f"{rule}={name}" for rule, name in self._rules if (rule, name) not in self._used]:
            raise InputError(f"no tensor needs {unused[0]}", "--allow", "correct the name, or leave it out")


def _parse(text: str) -> tuple[str, str]:
    rule, equals, name = text.partition("=")
    if not equals or not name:
        raise InputError(f"{text!r} is not RULE=NAME", "--allow", f"rules are {', '.join(RULES)}")
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}", "--allow", nearest(rule, RULES))
    return rule, name


class AllowedCheckpoint(Checkpoint):
    """A checkpoint seen with the exceptions made: tensors left out, multipliers of 1 invented."""

    dropped: Mapping[str, str] = MappingProxyType({})
    _ones: Mapping[str, TensorInfo] = MappingProxyType({})

    def make_exceptions(self, allows: Allowances, block: tuple[int, int]) -> None:
        """``dropped`` then maps each tensor left out to its rule; ``block`` is that of the FP8 weights."""
        self.dropped = {name: "drop" for name in self.tensors if allows("drop", name)} | dict(self.ignored)
        kept = {name: info for name, info in self.tensors.items() if name not in self.dropped}
        self._ones = {
            ones.name: ones
            for info in kept.values()
            if (ones := _missing_scale(info, kept, block)) and allows("unscaled", info.name)
        }
        self.tensors = MappingProxyType({**kept, **self._ones})

    def read(self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None) -> NDArray:
        if name not in self._ones:
            return super().read(name, rows, cols)
        whole = self._ones[name].shape
        ranges = [given or (0, size) for given, size in zip((rows, cols), whole, strict=True)]
        return np.ones([stop - start for start, stop in ranges], np.float32)


def _missing_scale(info: TensorInfo, tensors: Mapping[str, TensorInfo], block: tuple[int, int]) -> TensorInfo | None:
    """The multipliers that an FP8 weight should have and does not."""
    if info.dtype not in FP8_FORMATS or len(info.shape) != 2:
        return None
    module = info.name.removesuffix("weight")
    if any(f"{module}{part}" in tensors for part in BLOCK_SCALES):
        return None
    return TensorInfo(f"{info.name}_scale_inv", "F32", block_grid(info.shape, block), info.path, 0, 0)
