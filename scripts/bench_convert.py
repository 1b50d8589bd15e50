"""How fast and how small conversions are, as ratios taken in one run: the kernel, a whole conversion, the plan of V3.

    python scripts/bench_convert.py [--experts 64] [--directory DIR] [--output benchmarks/convert.json]

The kernel runs on one core against what most tools do (torch: cast, repeat the scales, multiply, cast) and against
numpy's copies in C that read and write as much. The whole conversion is of one MoE layer of DeepSeek-V3's width with
random FP8 codes, from a cold cache, against what the same disk reads and writes in the same run; shares are medians.
``share_of_disk`` is the rate of writing against the slower of the disk's two rates, each the faster of through the page
cache and around it; ``share_of_cached_disk`` is that against the rates through the page cache; ``share_of_disk_time``
is the time in which the disk could read all input and then write all output, against the conversion's, in which both
happen at once. It needs 0.14 GB of disk an expert and 3 GB. Multiples of 128 experts align tensors in files as 256 do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepspan.convert import kernels
from deepspan.convert.executor import default_workers
from deepspan.convert.pages import empty_pages
from deepspan.convert.plan import Output, numbered_shards, plan_shard
from deepspan.convert.writer import ShardWriter
from deepspan.models.catalog import load_spec
from deepspan.models.hf_config import hf_config
from deepspan.models.params import StoredTensor, stored_tensors
from deepspan.models.quant import BLOCK, dequant_fp8_blocks
from deepspan.models.spec import ModelSpec

Codes = NDArray[np.uint8]
Job = Callable[[Codes], int]  # with a buffer: the bytes moved

_MATRIX = 2048, 7168  # an expert's gate of DeepSeek-V3
_SETS = 12  # rotated, so that no cache holds them
_CHUNK = 16 << 20
_DISK_BYTES = 1 << 30  # for the disk's own speeds
_SYNC_BYTES = 256 << 20
_CARRIERS = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}

# Run in a process of its own: prints its time, bytes and peak memory as JSON.
_CONVERT = """
import json, sys, time
from pathlib import Path
from deepspan.convert.executor import run_plan
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
kind, source, target, workers = sys.argv[1:]
started = time.perf_counter()
plan = KINDS[kind].plan(Path(source), Options())
planned = time.perf_counter() - started
before = time.process_time()
result = run_plan(plan, Path(target), int(workers)) if target else None
status = Path("/proc/self/status").read_text()
peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
print(json.dumps({
    "plan_s": planned, "seconds": result and result.seconds, "cpu_seconds": time.process_time() - before,
    "read_bytes": plan.read_bytes, "write_bytes": plan.write_bytes, "tensors": plan.tensor_count, "peak_bytes": peak,
    "largest_in": max(info.nbytes for info in plan.tensors.values()),
    "largest_out": max(output.nbytes for shard in plan.shards for output in shard.outputs),
    "phases": result and result.phases,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="of the layer; V3 has 256")
    parser.add_argument("--rounds", type=int, default=5, help="of each conversion")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    report: dict[str, Any] = {"date": date.today().isoformat(), "machine": _machine(), "kernel": _kernel_rates()}
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.directory))
    try:
        report["v3_plan"] = _v3_plan(folder / "v3")
        report["conversion"] = _conversions(folder, options.experts, options.workers, options.rounds)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(text + "\n")


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "avx512": kernels.HAS_PERMUTATION,
        "load_at_start": os.getloadavg()[0],  # of other programs: what is no ratio of neighbours needs a quiet machine
    }


# The kernel ---------------------------------------------------------------------------------------------------------


def _kernel_rates() -> dict[str, float]:
    """Gigabytes of FP8 input a second on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rng = np.random.default_rng(0)
        codes = [_random_codes(rng) for _ in range(_SETS)]
        scales = rng.uniform(1e-4, 1e-3, (_MATRIX[0] // 128, _MATRIX[1] // 128)).astype(np.float32)
        target = np.ones(_MATRIX, np.uint16)
        rounded = [np.ones(_MATRIX, np.uint16) for _ in range(_SETS)]
        ways: dict[str, Callable[[int], Any]] = {
            "torch_cast_and_repeat": lambda i: _torch_cast(codes[i], scales),
            "numpy": lambda i: dequant_fp8_blocks(codes[i], scales, "bf16"),
            "numba_avx512": lambda i: kernels.fp8_to_bf16(codes[i], scales, BLOCK, (0, 0), permute=True),
            "numba_portable": lambda i: kernels.fp8_to_bf16(codes[i], scales, BLOCK, (0, 0), permute=False),
            "copy_of_the_output": lambda i: np.copyto(target, rounded[i]),
            "copy_that_widens": lambda i: np.copyto(target, codes[i]),
        }
        if not kernels.HAS_PERMUTATION:
            del ways["numba_avx512"]
        wanted = _torch_cast(codes[0], scales).view(torch.uint16).numpy()
        for name in ways:
            if name.startswith("num"):
                assert np.array_equal(ways[name](0), wanted), f"{name} differs from torch"
        return {name: math.prod(_MATRIX) / _best_time(way) / 1e9 for name, way in ways.items()}
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)


def _random_codes(rng: np.random.Generator) -> Codes:
    """Every code but the NaNs."""
    codes: Codes = rng.integers(0, 0x7F, _MATRIX, np.uint8)
    return codes | (rng.integers(0, 2, _MATRIX, np.uint8) << np.uint8(7))


def _torch_cast(codes: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """What the forks of fp8_cast_bf16.py do without a GPU."""
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32)
    spread = torch.from_numpy(scales).repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return (weight * spread).to(torch.bfloat16)


def _best_time(way: Callable[[int], object], rounds: int = 3) -> float:
    """Seconds a matrix, the best of some rounds over all sets."""
    way(0)
    times = []
    for _ in range(rounds):
        started = time.process_time()  # not the clock: a shared machine gives the core to others now and then
        for i in range(_SETS):
            way(i)
        times.append((time.process_time() - started) / _SETS)
    return min(times)


# A whole conversion -------------------------------------------------------------------------------------------------


def _conversions(folder: Path, experts: int, workers: int, rounds: int) -> dict[str, Any]:
    source = folder / "source"
    _write_checkpoint(source, _layer_spec(experts))
    report: dict[str, Any] = {"experts": experts, "workers": workers, "rounds": rounds}
    for kind in ("fp8-to-bf16", "hf-to-mindspore"):
        report[kind] = _measured(kind, source, folder, workers, rounds)
    return report


def _measured(kind: str, source: Path, folder: Path, workers: int, rounds: int) -> dict[str, Any]:
    """A conversion and its disk in turns, because a shared machine has slow minutes; the turn of the median share."""
    runs, disk = [], []
    for _ in range(rounds):
        disk.append(_disk_rates(source, folder, workers))
        _forget(source)
        runs.append(_run(kind, source, folder / "target", workers))
        shutil.rmtree(folder / "target")
    written = [run["write_bytes"] / run["seconds"] for run in runs]
    best = [tuple(map(max, *rates.values())) for rates in disk]
    shares = [rate / min(rates) for rate, rates in zip(written, best, strict=True)]
    cached_shares = [rate / min(rates["cached"]) for rate, rates in zip(written, disk, strict=True)]
    time_shares = [
        (run["read_bytes"] / read + run["write_bytes"] / write) / run["seconds"]
        for run, (read, write) in zip(runs, best, strict=True)
    ]
    typical = sorted(range(rounds), key=lambda i: shares[i])[rounds // 2]
    run = runs[typical]
    bound = workers * (run["largest_in"] + run["largest_out"]) + 200e6
    peak = max(run["peak_bytes"] for run in runs)
    assert peak <= bound, f"{kind} took {peak} bytes, more than {bound}"
    return {
        **run,
        "peak_bytes": peak,
        "peak_bound_bytes": bound,
        "written_gb_s": written[typical] / 1e9,
        "disk_gb_s": {way: {"read": r / 1e9, "write": w / 1e9} for way, (r, w) in disk[typical].items()},
        "share_of_disk": median(shares),
        "shares_of_disk": shares,
        "share_of_cached_disk": median(cached_shares),
        "shares_of_cached_disk": cached_shares,
        "share_of_disk_time": median(time_shares),
        "shares_of_disk_time": time_shares,
    }


def _disk_rates(source: Path, folder: Path, workers: int) -> dict[str, tuple[float, float]]:
    """Bytes a second that the disk reads, cold, and writes, through the page cache and around it."""
    return {
        name: (_read_rate(source, workers, way), _write_rate(folder / "speed", workers, way))
        for name, way in (("cached", 0), ("direct", os.O_DIRECT))
    }


def _layer_spec(experts: int) -> ModelSpec:
    """One MoE layer of V3's width, with a small vocabulary."""
    return replace(
        load_spec("deepseek_v3"), num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=experts,
        num_nextn_predict_layers=0, vocab_size=4096, n_group=1, topk_group=1,
    )  # fmt: skip


def _write_checkpoint(directory: Path, spec: ModelSpec) -> None:
    """Random codes and scales, synced; the project's own writer makes the files."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 0x7F, _CHUNK + (1 << 20), np.uint8)

    def output(tensor: StoredTensor) -> Output:
        width = math.prod(tensor.shape[1:])

        def make(start: int, stop: int) -> np.ndarray:
            size = (stop - start) * width
            if tensor.dtype != "F8_E4M3":
                return np.full(size, 0x3C23 if tensor.dtype == "BF16" else 1e-3, _CARRIERS[tensor.dtype])
            shift = zlib.crc32(f"{tensor.name} {start}".encode()) % (len(pool) - size)
            return pool[shift : shift + size]

        return Output(tensor.name, tensor.dtype, tensor.shape, (), make, tensor.shape[0])

    for name, outputs in numbered_shards(map(output, stored_tensors(spec)), 1 << 30).items():
        shard = plan_shard(name, outputs, {"format": "pt"})
        writer = ShardWriter(directory, shard, "bench")
        for each in shard.outputs:
            for start, stop in each.pieces():
                writer.write(each, start, each.make(start, stop))
        writer.publish()
    (directory / "config.json").write_text(json.dumps(hf_config(spec)))


def _run(kind: str, source: Path, target: Path | str, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _CONVERT, kind, str(source), str(target), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def _forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_rate(directory: Path, workers: int, way: int) -> float:
    """Of the first `_DISK_BYTES` of the files, in chunks; ``way`` is a flag of open."""
    _forget(directory)
    left, jobs = _DISK_BYTES, []
    for path in sorted(directory.glob("*.safetensors")):
        for start in range(0, min(left, path.stat().st_size), _CHUNK):
            jobs.append(partial(_read_chunk, path, way, start))
            left -= _CHUNK
    return _parallel_rate(workers, iter(jobs))


def _read_chunk(path: Path, way: int, start: int, buffer: Codes) -> int:
    descriptor = os.open(path, os.O_RDONLY | way)
    try:
        return os.preadv(descriptor, [buffer.data], start)
    finally:
        os.close(descriptor)


def _write_rate(path: Path, workers: int, way: int) -> float:
    """Bytes a second that reach the disk, synced every 256 MB."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | way)
    try:
        os.posix_fallocate(descriptor, 0, _DISK_BYTES)
        return _parallel_rate(
            workers, (partial(_write_chunk, descriptor, start) for start in range(0, _DISK_BYTES, _CHUNK))
        )
    finally:
        os.close(descriptor)
        path.unlink()


def _write_chunk(descriptor: int, start: int, buffer: Codes) -> int:
    size = os.pwrite(descriptor, buffer.data, start)
    if (start + _CHUNK) % _SYNC_BYTES == 0:
        os.fdatasync(descriptor)
    return size


def _parallel_rate(workers: int, jobs: Iterator[Job]) -> float:
    lock, total = threading.Lock(), [0]

    def work() -> None:
        buffer = empty_pages((_CHUNK,), np.uint8)
        buffer[:] = 1
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            size = job(buffer)
            with lock:
                total[0] += size

    threads = [threading.Thread(target=work) for _ in range(workers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total[0] / (time.perf_counter() - started)


# The plan of V3 -----------------------------------------------------------------------------------------------------


def _v3_plan(directory: Path) -> dict[str, Any]:
    """163 files with true headers and no data, planned from."""
    directory.mkdir()
    spec = load_spec("deepseek_v3")
    outputs = [Output(t.name, t.dtype, t.shape, (), _never, t.shape[0]) for t in stored_tensors(spec)]
    shards = numbered_shards(outputs, 4_302_000_000)
    for name, content in shards.items():
        shard = plan_shard(name, content, {"format": "pt"})
        with (directory / name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    (directory / "config.json").write_text(json.dumps(hf_config(spec)))
    plans = {kind: _run(kind, directory, "", 1) for kind in ("fp8-to-bf16", "hf-to-mindspore")}
    shutil.rmtree(directory)
    return {"files": len(shards), "tensors": len(outputs), **plans}


def _never(start: int, stop: int) -> np.ndarray:
    raise AssertionError("a plan reads no data")


if __name__ == "__main__":
    main()
