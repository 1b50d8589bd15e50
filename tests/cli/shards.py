"""Damage to a checkpoint: safetensors files taken apart and written again, byte for byte where nothing is changed."""

import json
from collections.abc import Callable
from pathlib import Path

Tensors = dict[str, tuple[str, list[int], bytes]]
INDEX = "model.safetensors.index.json"


def read(path: Path) -> Tensors:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in header.items()
    }


def write(path: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def edit(checkpoint: Path, name: str, change: Callable[[Tensors], object]) -> None:
    """Apply ``change`` to the tensors of the shard that holds ``name``, and bring the index in line."""
    index = json.loads((checkpoint / INDEX).read_text())
    shard = index["weight_map"][name]
    tensors = read(checkpoint / shard)
    change(tensors)
    write(checkpoint / shard, tensors)
    kept = {key: file for key, file in index["weight_map"].items() if file != shard}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, shard)}
    (checkpoint / INDEX).write_text(json.dumps(index))


def remove(checkpoint: Path, name: str) -> None:
    edit(checkpoint, name, lambda tensors: tensors.pop(name))


def add(checkpoint: Path, name: str) -> None:
    edit(checkpoint, "model.norm.weight", lambda tensors: tensors.update({name: ("F32", [1], bytes(4))}))


def configure(checkpoint: Path, **changes: object) -> None:
    """Change keys of config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
