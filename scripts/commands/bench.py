"""``deepspan bench``: how long decode and prefill take, beside what the machine's memory allows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ... import backends
from ...configs.schema import RunConfig
from ...models.costs import Precision, decode_bytes, prefill_flops
from ...models.errors import InputError
from ...models.sharding import Grid
from ..options import add_run
from ..runtime import Session, note, open_run, read_run
from ..timing import Timer

Row = dict[str, Any]


class Sizes(NamedTuple):
    """What is to be timed; ``prefills`` are prompts and the tokens of each."""

    batches: list[int]
    prefills: list[tuple[int, int]]
    context: int
    steps: int

    @property
    def max_batch(self) -> int:
        return max(*self.batches, *(sequences for sequences, _ in self.prefills), 1)

    @property
    def max_tokens(self) -> int:
        return max(self.context + self.steps, *(tokens for _, tokens in self.prefills), 1)

    def run(self, options: argparse.Namespace) -> RunConfig:
        """The run that the command line names, made for these sizes."""
        flags = {"engine.max_batch": self.max_batch, "engine.max_seq_len": self.max_tokens}
        return read_run(options.run_name, options.overrides, flags)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sizes(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """RUN, ``--set`` and what `sizes_of` reads."""
    add_run(parser)
    parser.add_argument("--batch", metavar="1,8,32", default="1,8,32", help="sequences that decode together")
    parser.add_argument("--context", metavar="N", type=int, default=1024, help="tokens before the first decode step")
    parser.add_argument("--steps", metavar="N", type=int, default=32, help="decode steps to time")
    parser.add_argument(
        "--prefill", metavar="1x1024,8x1024", default="1x1024,8x1024", help="prompts x tokens; none times decode only"
    )


def sizes_of(options: argparse.Namespace) -> Sizes:
    batches = [_count(part, "--batch") for part in options.batch.split(",")]
    prefills = [] if options.prefill == "none" else [_prompts(part) for part in options.prefill.split(",")]
    return Sizes(batches, prefills, _count(options.context, "--context"), _count(options.steps, "--steps"))


def run(options: argparse.Namespace) -> int:
    sizes = sizes_of(options)
    with open_run(sizes.run(options)) as session:
        budget = session.run.engine.max_batch_tokens
        replicas = session.run.parallel.dp
        timer = Timer(session.runner, session.spec.vocab_size, sizes.max_batch, sizes.max_tokens, budget, replicas)
        bandwidth = backends.load(session.run.backend).copy_bandwidth(session.run)
        note(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + write); random tokens, greedy, median step")
        _show(_decode_rows(session, timer, bandwidth, sizes), options.json)
        _show(_prefill_rows(session, timer, sizes.prefills), options.json)
    return 0


def _decode_rows(session: Session, timer: Timer, bandwidth: float, sizes: Sizes) -> Iterator[Row]:
    """Bytes are those that a rank reads, of pipeline stages one of each, as the bandwidth is a device's.

    ``experts_hit`` counts the distinct routed experts of a layer that a step uses, on all ranks together. A rank's
    bytes have its even part of them, or, where they are unknown, of what even routing would use.
    """
    spec, runner = session.spec, session.runner
    grid, precision = Grid(**session.run.parallel.model_dump()), Precision(session.holding, runner.kv_dtype)
    context = sizes.context
    for batch in sizes.batches:
        seconds = timer.decode(batch, context, sizes.steps)
        hit = timer.experts_hit()
        read = sum(decode_bytes(spec, grid, precision, batch, context, hit))
        yield {
            "batch": batch,
            "context": context,
            **({} if hit is None else {"experts_hit": hit}),
            "decode_ms": 1e3 * seconds,
            "decode_tokens_per_s": batch / seconds,
            "bytes_per_step": read,
            "bandwidth_share": read / seconds / bandwidth,
        }


def _prefill_rows(session: Session, timer: Timer, prefills: Sequence[tuple[int, int]]) -> Iterator[Row]:
    for sequences, tokens in prefills:
        seconds = timer.prefill(sequences, tokens)
        yield {
            "prefill": f"{sequences}x{tokens}",
            "prefill_ms": 1e3 * seconds,
            "prefill_tokens_per_s": sequences * tokens / seconds,
            "tflops": prefill_flops(session.spec, sequences, tokens) / seconds / 1e12,
        }


def _show(rows: Iterator[Row], as_json: bool) -> None:
    """Print each row when it is measured; as text, under a heading."""
    heading = False
    for row in rows:
        if as_json:
            print(json.dumps({key: _rounded(value) for key, value in row.items()}), flush=True)
            continue
        if not heading:
            print("  ".join(row))
            heading = True
        print("  ".join(f"{_text(value):>{len(key)}}" for key, value in row.items()), flush=True)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _count(text: str | int, option: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"{text!r} is not a count", option, "give 1 or more")
    return count


def _prompts(text: str) -> tuple[int, int]:
    sequences, _, tokens = text.partition("x")
    return _count(sequences, f"--prefill {text}"), _count(tokens, f"--prefill {text}")
