"""Which kernel of a decode step ends when: `python scripts/step_timeline.py v3_slice_fp8 --batch 1`.

A recorded step is replayed under PyTorch's profiler. With dependent launches kernels overlap: what a kernel adds to the
step is the time from the end of those ahead to its own end: the column that sums up to the step.

Of several GPUs, rank 0's: `torchrun --nproc-per-node 2 scripts/step_timeline.py v3_slice_fp8 --set parallel.tp=2
--set launch.launcher=torchrun --set launch.procs_per_node=2`. What ranks send each other is counted with its waits.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from deepspan.scripts.options import add_run
from deepspan.scripts.runtime import open_run, read_run
from deepspan.scripts.timing import Timer

_STEPS = 3  # of which the last one is shown: the profiler's own start delays the first


class Kernel(NamedTuple):
    """Microseconds."""

    start: float
    end: float
    name: str


def timeline(timer: Timer, batch: int, context: int) -> list[Kernel]:
    """The kernels and copies of one step of ``batch`` sequences, in the order of their starts."""
    timer.decode(batch, context, _STEPS)
    gpu = torch.get_device_module()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_STEPS):
            timer.repeat()
        gpu.synchronize()
    found = [
        Kernel(event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3, event.name())
        for event in profiler.profiler.kineto_results.events()
        if str(event.device_type()).endswith("CUDA")
    ]
    return sorted(found)[-len(found) // _STEPS :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Show which kernel of a decode step ends when.")
    add_run(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each")
    options = parser.parse_args()
    if torch.accelerator.current_accelerator() is None:
        raise SystemExit("error: no GPU: torch.accelerator: run this on a machine with one")
    tokens = options.context + 2 * _STEPS
    flags = {"engine.max_batch": options.batch, "engine.max_seq_len": tokens}
    with open_run(read_run(options.run_name, options.overrides, flags)) as session:
        budget = session.run.engine.max_batch_tokens
        timer = Timer(session.runner, session.spec.vocab_size, options.batch, tokens, budget)
        kernels = timeline(timer, options.batch, options.context)
    print("     end, µs      adds  kernel")
    before = kernels[0].start
    for kernel in kernels:
        print(f"{kernel.end - kernels[0].start:12.2f}  {max(0.0, kernel.end - before):8.2f}  {kernel.name[:80]}")
        before = max(before, kernel.end)


if __name__ == "__main__":
    main()
