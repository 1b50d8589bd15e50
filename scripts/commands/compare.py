"""``deepspan compare``: how far the logits of two backends or two checkpoints differ."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from ...models.errors import InputError
from ..closeness import measure
from ..logits_file import read_logits

DEFAULT_RTOL = 0.02  # two BF16 realisations of one model; FP32 ones agree to 1e-5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.npz", type=Path, help="the logits to measure by")
    parser.add_argument("b", metavar="B.npz", type=Path, help="the logits that are measured")
    parser.add_argument(
        "--rtol",
        metavar="R",
        type=float,
        default=DEFAULT_RTOL,
        help="largest relative norm of the difference that still ends with exit code 0 (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    if not options.rtol >= 0:
        raise InputError(f"rtol is {options.rtol}", "--rtol", "give a number of 0 or more")
    a, b = read_logits(options.a), read_logits(options.b)
    if a.token_ids is not None and b.token_ids is not None and not np.array_equal(a.token_ids, b.token_ids):
        raise InputError("the logits of different texts", f"{options.a} and {options.b}", "compare the same token ids")
    closeness = measure(a.logits, b.logits)
    within = closeness.within(options.rtol)
    if options.json:
        numbers = {name: _json_number(value) for name, value in dataclasses.asdict(closeness).items()}
        print(json.dumps({**numbers, "rtol": options.rtol, "within": within}))
        return 0 if within else 1
    print(f"tokens           {closeness.tokens}")
    print(f"relative norm    {closeness.relative_norm:.3g} ({'within' if within else 'above'} {options.rtol:g})")
    print(f"max difference   {closeness.max_difference:.3g}")
    print(f"top-1 agreement  {closeness.top1_agreement:.2%}")
    print(f"KL divergence    {closeness.mean_kl:.3g} nats a token, at most {closeness.max_kl:.3g}")
    return 0 if within else 1


def _json_number(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
