"""``deepspan convert``: a checkpoint in another layout or number format."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sized
from pathlib import Path

from ...convert import disk_speed
from ...convert.allowances import RULES
from ...convert.destination import check_directory, existing_parent, free_space
from ...convert.executor import Progress as Moment
from ...convert.executor import Result, default_workers, run_plan
from ...convert.kinds import KINDS, Kind
from ...convert.kinds.options import Options
from ...convert.manifest import begin_record
from ...convert.plan import Plan
from ...models.errors import InputError
from ...models.spec import nearest
from ..options import path
from ..progress import Progress
from ..runtime import note
from ..words import count

_BASE_BYTES = 200e6  # the interpreter, its libraries, the plan and its hashes
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30}
# Field of Options -> (flag, what argparse should know)
_CHOICES: dict[str, tuple[str, dict[str, object]]] = {
    "drop_mtp": ("--drop-mtp", {"action": "store_true", "help": "leave the multi-token-prediction layers out"}),
    "allow": (
        "--allow",
        {
            "action": "extend",
            "nargs": "+",
            "metavar": "RULE=NAME",
            "help": "; ".join(f"{rule}: {text}" for rule, text in RULES.items()) + "; NAME may hold *",
        },
    ),
    "shard_bytes": ("--shard-size", {"metavar": "SIZE", "help": "largest output file, as 5GB"}),
    "layout": ("--layout", {"metavar": "NAME", "help": "infer (default), train or train-grouped"}),
    "qkv_concat": ("--qkv-concat", {"action": "store_true", "help": "fuse q_a and kv_a, as qkv_concat in the YAML"}),
    "ffn_concat": ("--ffn-concat", {"action": "store_true", "help": "fuse gate and up, as ffn_concat in the YAML"}),
    "mtp_names": ("--mtp-names", {"action": "store_true", "help": "names of the MTP network: mtp_model.*"}),
    "ranks": ("--mp", {"metavar": "N", "type": int, "help": "number of tensor-parallel rank files"}),
    "dtype": (
        "--dtype",
        {"metavar": "NAME", "help": "of the weights: bf16, fp16, fp32; for hf-to-demo auto, fp8, bf16"},
    ),
    "config": ("--config", {"metavar": "FILE", "help": "config.json, or name, of the model of a SRC that has none"}),
    "format": ("--format", {"metavar": "NAME", "help": "w8a8-ct, w8a8-ascend, w8a8-mindspore or fp8"}),
    "ignore": (
        "--ignore",
        {"action": "extend", "nargs": "+", "metavar": "NAME", "help": "modules to leave unquantised; may hold *"},
    ),
    "calibration": ("--calibration", {"metavar": "FILE", "type": Path, "help": "scales of static activations"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{name}: {kind.summary}" for name, kind in KINDS.items())
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument("source", metavar="SRC", type=path, help="the checkpoint's directory")
    parser.add_argument("destination", metavar="DST", type=path, help="a new directory, or one to resume")
    for field, (flag, settings) in _CHOICES.items():
        parser.add_argument(flag, dest=field, **settings)  # type: ignore[arg-type]
    parser.add_argument("--workers", metavar="N", type=int, help="threads (default: the cores and two more)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue a conversion that was interrupted (default)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def run(options: argparse.Namespace) -> int:
    if options.kind not in KINDS:
        raise InputError(f"unknown kind {options.kind!r}", "convert", nearest(options.kind, KINDS))
    if options.workers is not None and options.workers < 1:
        raise InputError(f"workers is {options.workers}", "--workers", "give 1 or more")
    workers = options.workers or default_workers()
    kind = KINDS[options.kind]
    plan = kind.plan(options.source, _chosen(options, kind))
    try:
        for text in plan.notes:
            note(text)
        if options.dry_run:
            check_directory(plan, options.destination, begin_record(plan), options.resume, options.overwrite)
            print("\n".join(_plan_lines(plan, options.destination, workers)))
            return 0
        with Progress("converting, MB", plan.write_bytes // 10**6) as progress:
            result = run_plan(
                plan,
                options.destination,
                workers,
                resume=options.resume,
                overwrite=options.overwrite,
                report=_reporter(progress),
            )
        print("\n".join(_result_lines(plan, result, options.destination)))
        return 0
    finally:
        plan.close()


def _chosen(options: argparse.Namespace, kind: Kind) -> Options:
    """The options of the kind; those of other kinds are errors."""
    chosen = {field: value for field in _CHOICES if (value := getattr(options, field))}
    if wrong := [field for field in chosen if field not in kind.options]:
        kinds = ", ".join(name for name, other in KINDS.items() if wrong[0] in other.options)
        raise InputError(f"{_CHOICES[wrong[0]][0]} is not for {options.kind}", "convert", f"it belongs to {kinds}")
    if "shard_bytes" in chosen:
        chosen["shard_bytes"] = parse_size(chosen["shard_bytes"])
    for field in ("allow", "ignore"):
        if field in chosen:
            chosen[field] = tuple(chosen[field])
    return Options(**chosen)


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500 MB``, ``4GiB`` or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise InputError(f"{text!r} is no size", "--shard-size", "give a number with MB or GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _reporter(progress: Progress) -> Callable[[Moment], None]:
    def report(moment: Moment) -> None:
        if not moment.done_bytes:
            return
        speed = moment.done_bytes / moment.seconds
        left = (moment.total_bytes - moment.done_bytes) / speed
        detail = f"{speed / 1e9:.2f} GB/s written, {_duration(left)} left, bound by {moment.bound_by}"
        progress.show(moment.done_bytes // 10**6, detail)

    return report


def _plan_lines(plan: Plan, destination: Path, workers: int) -> list[str]:
    free = free_space(destination)
    peak = workers * plan.piece_memory + _BASE_BYTES
    return [
        f"kind         {plan.kind} {' '.join(f'{key}={value}' for key, value in plan.options.items())}".rstrip(),
        f"read         {plan.read_bytes:,} bytes of {len(plan.tensors)} tensors in {_files(plan.source.headers)}",
        f"write        {plan.write_bytes:,} bytes of {plan.tensor_count} tensors in {_files(plan.shards)}",
        f"copied       {', '.join(plan.small_files)}",
        f"dropped      {_dropped(plan)}",
        f"free         {free.bytes:,} bytes on the disk of {destination}",
        f"peak memory  {peak / 1e9:.2f} GB with {workers} workers",
        f"time         {_estimate(plan, destination)}",
    ]


def _files(files: Sized) -> str:
    return count(len(files), "file")


def _dropped(plan: Plan) -> str:
    if not plan.dropped:
        return "nothing"
    rules = sorted(set(plan.dropped.values()))
    return ", ".join(f"{count(sum(rule == r for r in plan.dropped.values()), 'tensor')} by {rule}" for rule in rules)


def _estimate(plan: Plan, destination: Path) -> str:
    files = [header.path for header in plan.source.headers.values()]
    parent = existing_parent(destination)
    reading = disk_speed.read_speed(files)
    writing = disk_speed.write_speed(parent)
    if writing is None:
        return f"at least {_duration(plan.read_bytes / reading)} (reads {reading / 1e9:.2f} GB/s; writing not measured)"
    one_disk = files[0].stat().st_dev == parent.stat().st_dev
    seconds = disk_speed.estimated_seconds(plan.read_bytes, reading, plan.write_bytes, writing, one_disk)
    speeds = f"measured: reads {reading / 1e9:.2f} GB/s, writes {writing / 1e9:.2f} GB/s"
    return f"about {_duration(seconds)} ({speeds}, on {'one disk' if one_disk else 'two disks'})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _result_lines(plan: Plan, result: Result, destination: Path) -> list[str]:
    if not result.written_bytes:
        return [f"complete     {destination} holds this conversion already; nothing was written"]
    spent = sum(result.phases.values())
    shares = ", ".join(f"{phase} {seconds / spent:.0%}" for phase, seconds in result.phases.items())
    written = f"{result.written_bytes / 1e9:.3f} GB"
    kept = f", {result.kept_bytes / 1e9:.3f} GB kept from an earlier run" if result.kept_bytes else ""
    speed = f"{result.written_bytes / result.seconds / 1e9:.2f} GB/s written, {shares} of the workers' time"
    return [
        f"converted    {plan.tensor_count} tensors in {_files(plan.shards)}, {written} written{kept}",
        f"dropped      {_dropped(plan)}",
        f"took         {result.seconds:.1f} s: {speed}",
    ]
