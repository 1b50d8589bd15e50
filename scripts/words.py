"""Numbers with their nouns, for reports and messages."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """``1 file``, ``2,000 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
