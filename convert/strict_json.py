"""JSON from untrusted files: what two parsers could read differently is an error, and parsing is bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.errors import InputError

MAX_BYTES = 100_000_000
_MAX_DIGITS = 19


class StrictJsonError(ValueError):
    """What is wrong, for the caller to put beside the file's name."""


def parse_object(raw: bytes, floats: bool = True) -> dict[str, Any]:
    """The object that ``raw`` holds. Raises StrictJsonError.

    Duplicate keys, invalid UTF-8, lone surrogates, NaN and Infinity, integers of more than 19 digits and deep nesting
    are refused; so are fractions unless ``floats``.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite if floats else _refuse("a fraction"),
            parse_constant=_refuse("a constant that is not JSON"),
        )
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise StrictJsonError("not UTF-8") from error
    except UnicodeEncodeError as error:
        raise StrictJsonError("half of a surrogate pair, which is not a character") from error
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON ({error.msg} at character {error.pos})") from error
    if not isinstance(value, dict):
        raise StrictJsonError("not a JSON object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """`parse_object` of a small file such as config.json; every fault is an InputError that names it."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError("file is too large for JSON", str(path), "replace it with the original file")
        return parse_object(path.read_bytes())
    except StrictJsonError as error:
        raise InputError(f"invalid JSON: {error}", str(path), "repair it or download it again") from error
    except OSError as error:
        raise InputError("cannot read", str(path), error.strerror or str(error)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError(f"key {shorten(twice)} is there twice")
    return unique


def _integer(digits: str) -> int:
    if digits == "-0" or len(digits) > _MAX_DIGITS:
        raise StrictJsonError("an integer that parsers read differently")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError("a number of absurd size")
    return value


def _refuse(what: str) -> Callable[[str], Any]:
    def refuse(text: str) -> Any:
        raise StrictJsonError(f"{what}: {shorten(text)}")

    return refuse


def shorten(text: str, length: int = 80) -> str:
    """An untrusted string as one short line of printable ASCII for a message."""
    quoted = ascii(text)
    return quoted if len(quoted) <= length else f"{quoted[: length - 4]}...'"
