"""The manifest: what a finished conversion wrote, from what. A directory of ours without one is unfinished."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plan import Plan
from .strict_json import read_object

MANIFEST_FILE = "conversion-manifest.json"
CONVERTER = 1  # raised whenever the same source and options would give other bytes


def begin_record(plan: Plan) -> dict[str, Any]:
    """What decides every byte of the result; equal records mean equal results."""
    record = {
        "converter": CONVERTER,
        "kind": plan.kind,
        "options": dict(plan.options),
        "structure": plan.structure_hash(),
        "source": plan.source.identity(),
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(record))
    return as_read_back


def manifest(
    plan: Plan, begin: Mapping[str, Any], checksums: Mapping[str, Mapping[str, str]], small: Mapping[str, bytes]
) -> bytes:
    """``checksums``: file -> tensor -> CRC-32; ``small``: the contents of the other files."""
    dropped = defaultdict(list)
    for name, rule in plan.dropped.items():
        dropped[rule].append(name)
    content = {
        **begin,
        "source_directory": str(plan.source.directory.resolve()),
        "notes": list(plan.notes),
        "dropped": dropped,
        "files": {
            shard.name: {"bytes": shard.nbytes, "header_sha256": shard.header_hash, "crc32": checksums[shard.name]}
            for shard in plan.shards
        },
        "small_files": {name: hashlib.sha256(data).hexdigest() for name, data in small.items()},
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"


def read_manifest(directory: Path) -> Mapping[str, Any] | None:
    """The manifest of ``directory``, None without one. Raises InputError when it is not JSON."""
    path = directory / MANIFEST_FILE
    return read_object(path) if path.is_file() else None


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What an earlier conversion did otherwise than this one would; None when they are the same."""
    for key in ("kind", "options", "source"):
        old, new = before.get(key), now[key]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed = next(name for name in {**old, **new} if old.get(name) != new.get(name))
            return f"the source's {changed} has changed" if key == "source" else f"with another {changed}"
        return f"as {old!r}"
    same = all(before.get(key) == value for key, value in now.items())
    return None if same else "by another version of the converter"
