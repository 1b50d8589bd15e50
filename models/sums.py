"""Sums: the task that the embedded demo model really learns, and that tells whether a backend computes it right.

Addition and subtraction of integers from 0 to 999, asked in English or Chinese, answered by the number alone. One in
fifty unordered pairs of operands is held out: training never sees it, with either sign and in either order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

LARGEST = 999
HELD_OUT_ONE_IN = 50

_PLUS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Calculate {a} plus {b}.",
    "Compute {a} + {b}.",
    "Please add {a} and {b}.",
    "Add {a} to {b}.",
    "What is the sum of {a} and {b}?",
    "Find {a} + {b}.",
    "{a}+{b}=",
    "{a} + {b} =",
    "{a} + {b} = ?",
    "{a}+{b}",
    "{a} + {b}",
    "{a} plus {b}",
    "请计算 {a} 加 {b}",
    "请计算 {a} + {b}",
    "请计算{a}加{b}。",
    "计算 {a} + {b}",
    "{a} 加 {b} 等于多少？",
    "{a}加{b}等于多少？",
    "{a} + {b} 等于多少？",
    "{a}+{b}等于几？",
    "{a} 加 {b} 是多少？",
    "{a} 与 {b} 的和是多少？",
    "求 {a} 与 {b} 的和。",
    "{a}加{b}",
)
_MINUS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "What's {a} - {b}?",
    "How much is {a} - {b}?",
    "How much is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Calculate {a} minus {b}.",
    "Compute {a} - {b}.",
    "Please subtract {b} from {a}.",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "Find {a} - {b}.",
    "{a}-{b}=",
    "{a} - {b} =",
    "{a} - {b} = ?",
    "{a}-{b}",
    "{a} - {b}",
    "{a} minus {b}",
    "请计算 {a} 减 {b}",
    "请计算 {a} - {b}",
    "请计算{a}减{b}。",
    "计算 {a} - {b}",
    "{a} 减 {b} 等于多少？",
    "{a}减{b}等于多少？",
    "{a} - {b} 等于多少？",
    "{a}-{b}等于几？",
    "{a} 减去 {b} 是多少？",
    "{a} 与 {b} 的差是多少？",
    "求 {a} 与 {b} 的差。",
    "{a}减{b}",
)


@dataclass(frozen=True)
class Sum:
    """``a op b`` with ``op`` one of "+" and "-"."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.op == "+" else self.a - self.b)

    def prompt(self, phrasing: str) -> str:
        """The question in one of ``phrasings(self.op)``."""
        return phrasing.format(a=self.a, b=self.b)


def phrasings(op: str) -> tuple[str, ...]:
    """Ways to ask for ``a op b``, English then Chinese, as templates with ``{a}`` and ``{b}``."""
    return {"+": _PLUS, "-": _MINUS}[op]


def is_held_out(a: int, b: int) -> bool:
    """Whether training must never see the pair; the same for (a, b) and (b, a), on every machine and Python."""
    digest = hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def training_sums(rng: random.Random) -> Iterator[Sum]:
    """Endless sums without a held-out pair; short numbers, carry chains and near-equal numbers come often."""
    while True:
        a, b = _training_pair(rng)
        if not is_held_out(a, b):
            yield Sum(a, rng.choice("+-"), b)


def held_out_sums(n: int = 500, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` different (prompt, answer) pairs that training never sees, operands uniform over 0 … 999."""
    rng = random.Random(f"held-out-{seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        if is_held_out(a, b):
            question = Sum(a, rng.choice("+-"), b)
            found[question.prompt(rng.choice(phrasings(question.op)))] = question.answer
    return list(found.items())


def _training_pair(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    a = _operand(rng)
    if kind < 0.7:
        return a, _operand(rng)
    b = _carry_chain(rng, a) if kind < 0.85 else a + rng.randint(-30, 30)
    b = min(max(b, 0), LARGEST)
    return (a, b) if rng.random() < 0.5 else (b, a)


def _operand(rng: random.Random) -> int:
    """One to three digits: three most often, as most of the numbers up to 999 have three."""
    length = rng.random()
    return rng.randint(0, 9 if length < 0.1 else 99 if length < 0.3 else LARGEST)


def _carry_chain(rng: random.Random, a: int) -> int:
    """A number whose tens (and perhaps hundreds) add up to nine with those of ``a``, so that a carry runs through."""
    nines = 99 if rng.random() < 0.5 else LARGEST
    return nines - a % (nines + 1) // 10 * 10 - rng.randint(0, 9)
