"""Time the decode kernels on this machine's GPU, beside the bytes they move: `python scripts/bench_kernels.py`.

Each row is the median over replays of a graph of back-to-back launches on cold weights, one JSON object a line, with
the share of the bandwidth that a device copy reached just before. `--sweep` tries other configurations than the
checked-in tables choose; `--check` compares every row with its eager twin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from deepspan.scripts.kernel_cases import (
    Case,
    Setting,
    attention,
    dense,
    fp8_cache,
    grouped,
    int4_weights,
    int8_weights,
    small,
)
from deepspan.scripts.kernel_chain import chain

GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "dense": dense, "experts": grouped, "attention": attention, "small": small, "layer": chain, "int8": int8_weights,
    "int4": int4_weights, "fp8_cache": fp8_cache,
}  # fmt: skip
LAUNCHES = 64  # at least, in a graph
REPLAYS = 11


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy by the processors (the copy engine is slower)."""
    source = torch.zeros(1 << 30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / median_us([lambda: torch.neg(source, out=target)] * 4)


def median_us(runs: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one run: the median over replays of a graph of all of them."""
    gpu = torch.get_device_module()
    for run in runs[:8]:
        run()
    gpu.synchronize()
    graph = gpu.CUDAGraph()
    with gpu.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(REPLAYS + 2):
        start, end = gpu.Event(enable_timing=True), gpu.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(runs))
    return sorted(times[2:])[REPLAYS // 2]


def measure(case: Case, bandwidth: float, check: bool) -> dict[str, object]:
    row: dict[str, object] = {"kernel": case.kernel, "shape": case.shape, "config": case.config}
    try:
        us = median_us(list(case.runs) * -(-LAUNCHES // len(case.runs)))
    except OutOfResources as fault:  # one of a sweep's configurations
        return row | {"failed": str(fault)}
    row |= {
        "us": round(us, 2), "bytes": case.moved, "tb_per_s": round(case.moved / us / 1e6, 3),
        "copy_share": round(case.moved / us * 1e6 / bandwidth, 3), "tflops": round(case.operations / us / 1e6, 1),
    }  # fmt: skip
    if check and case.error:
        row["error"] = float(f"{case.error():.2e}")
    return row


def compile_ahead(jobs: int, arguments: list[str]) -> None:
    """Fill Triton's cache with several processes, each of which launches its share of the cases once."""
    command = [sys.executable, __file__, *arguments]
    workers = [subprocess.Popen([*command, "--share", f"{k}/{jobs}"]) for k in range(jobs)]
    for worker in workers:
        if worker.wait():
            raise SystemExit("compiling ahead failed")


def launch_share(cases: list[Case], share: str) -> None:
    mine, of = map(int, share.split("/"))
    for case in cases[mine::of]:
        with suppress(OutOfResources):
            case.runs[0]()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the decode kernels beside the bytes that they move.")
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated; default: all")
    parser.add_argument("--sweep", action="store_true", help="time other configurations too")
    parser.add_argument("--check", action="store_true", help="compare with the eager twins")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead, each with data of its own")
    parser.add_argument("--output", type=Path, help="write all rows as one JSON array")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.jobs and not options.share:
        compile_ahead(options.jobs, ["--groups", options.groups, *(["--sweep"] if options.sweep else [])])
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise SystemExit("error: no GPU: torch.accelerator: run this on a machine with one")
    device = torch.device(accelerator.type, 0)
    torch.manual_seed(0)
    setting = Setting(device, options.sweep)
    if options.share:
        tiny = setting._replace(copies_of=0, experts=33)
        for group in options.groups.split(","):
            launch_share(list(GROUPS[group](tiny)), options.share)
        return
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, object]] = [{"kernel": "copy", "tb_per_s": round(bandwidth / 1e12, 3)}]
    for group in options.groups.split(","):
        for case in GROUPS[group](setting):
            rows.append({"group": group, **measure(case, bandwidth, options.check)})
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        options.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
