"""MindSpore's decode steps beside torch_triton's on a CPU: the embedded model, one process, interleaved repetitions.

    OMP_NUM_THREADS=1 python scripts/bench_mindspore.py [--batch 1 8] [--context 64] [--output FILE]

Both run the same weights in FP32. A repetition of one backend follows a repetition of the other, so that what else the
machine does meets both; graphs are compiled before. One thread each: two OpenMP pools in one process fight for cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
from contextlib import ExitStack
from pathlib import Path

import mindspore
import torch

from deepspan.backends.memory import describe_host
from deepspan.scripts.runtime import open_run, read_run
from deepspan.scripts.timing import Timer

RUNS = {"torch_triton": "demo_torch_cpu", "mindspore_ascend": "demo_mindspore_cpu"}
REPETITIONS, STEPS = 7, 20


def open_timers(opened: ExitStack, batch: int, context: int) -> dict[str, Timer]:
    tokens = context + REPETITIONS + STEPS
    timers = {}
    for name, run in RUNS.items():
        sizes = [f"engine.max_batch={batch}", f"engine.max_seq_len={tokens}"]
        session = opened.enter_context(open_run(read_run(run, sizes)))
        timers[name] = Timer(session.runner, session.spec.vocab_size, batch, tokens, tokens_per_step=8192)
    return timers


def measure(batch: int, context: int) -> dict[str, object]:
    """Milliseconds a step of each backend, the best repetition's median, and their quotient."""
    with ExitStack() as opened:
        timers = open_timers(opened, batch, context)
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(1 + REPETITIONS):  # the first compiles and warms up
            for name, timer in timers.items():
                seconds[name].append(timer.decode(batch, context, STEPS))
    best = {name: min(found[1:]) * 1e3 for name, found in seconds.items()}
    ratio = best["mindspore_ascend"] / best["torch_triton"]
    rounded = {f"{name}_ms": round(value, 2) for name, value in best.items()}
    return {"batch": batch, "context": context, **rounded, "ratio": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for batch in options.batch:
        rows.append(measure(batch, options.context))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        report = {
            "command": "OMP_NUM_THREADS=1 python scripts/bench_mindspore.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{torch.get_num_threads()} threads, {describe_host()}",
            "versions": {"torch": torch.__version__, "mindspore": mindspore.__version__},
            "decode": rows,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
