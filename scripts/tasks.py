"""Tasks that tell whether a model still answers as it should: questions with known answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..models.everyday import EVERYDAY
from ..models.sums import held_out_sums

SUMS = 500
_INTEGER = re.compile(r"[-−]?\d+")


@dataclass(frozen=True)
class Task:
    """``questions()`` gives (prompt, answer) pairs; ``is_right(text, answer)`` judges what the model said."""

    summary: str
    questions: Callable[[], list[tuple[str, str]]]
    is_right: Callable[[str, str], bool]


def _sums() -> list[tuple[str, str]]:
    return held_out_sums(SUMS)


def _last_number_is(text: str, answer: str) -> bool:
    """Larger models write a sentence around the number, or the whole sum before it."""
    numbers = _INTEGER.findall(text)
    return bool(numbers) and numbers[-1].replace("−", "-") == answer


def _everyday() -> list[tuple[str, str]]:
    return [(prompt, answer) for prompts, answer in EVERYDAY for prompt in prompts]


def _is_exactly(text: str, answer: str) -> bool:
    return text.strip() == answer


TASKS = {
    "sums": Task(
        "addition and subtraction up to 999, pairs that the demo model never saw; the last number counts",
        _sums,
        _last_number_is,
    ),
    "everyday": Task("the demo model's everyday prompts, answered word for word", _everyday, _is_exactly),
}
