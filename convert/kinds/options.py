"""What a user can choose about a conversion, and the kinds that it is a choice for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

COMMON = ("drop_mtp", "allow")


@dataclass(frozen=True)
class Options:
    """Every choice that decides bytes; a field at its default was not chosen.

    ``ranks`` is the number of tensor-parallel files, ``dtype`` the precision of plain weights, ``config`` the
    config.json, or the name, of the model for a source that has none, ``shard_bytes`` the size limit of output files.
    ``format`` is what `quantize` writes, ``ignore`` names or patterns of modules that it leaves alone,
    ``calibration`` a file of input scales.
    """

    drop_mtp: bool = False
    allow: tuple[str, ...] = ()
    shard_bytes: int | None = None
    layout: str | None = None
    qkv_concat: bool = False
    ffn_concat: bool = False
    mtp_names: bool = False
    ranks: int | None = None
    dtype: str | None = None
    config: str | None = None
    format: str | None = None
    ignore: tuple[str, ...] = ()
    calibration: Path | None = None

    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values; files left out, whose content counts."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != defaults[name] and not isinstance(value, Path)
        }
