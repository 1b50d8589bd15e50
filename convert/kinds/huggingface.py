"""Writing Hugging Face directories: shards with an index, config.json, and the files that travel with the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import path_inside
from ..declarations import ASCEND_DESCRIPTION, without_quantisation
from ..manifest import MANIFEST_FILE
from ..plan import Output, ShardPlan, numbered_shards, plan_shard

METADATA = {"format": "pt"}  # without it older transformers refuse the file
DEFAULT_SHARD_BYTES = 5_000_000_000
_COMPANIONS = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt")
_OURS = ("config.json", "param_name_map.json", MANIFEST_FILE)
_DESCRIPTIONS = ASCEND_DESCRIPTION.removesuffix(".json")  # older tools add the quantisation's name


def new_shards(outputs: Iterable[Output], shard_bytes: int | None, stem: str = "model") -> tuple[ShardPlan, ...]:
    """Outputs in their order, in numbered files."""
    files = numbered_shards(outputs, shard_bytes or DEFAULT_SHARD_BYTES, stem)
    return tuple(plan_shard(name, content, METADATA) for name, content in files.items())


def index_files(shards: Sequence[ShardPlan], stem: str = "model") -> dict[str, bytes]:
    """The index, which a lone model.safetensors does not need."""
    if [shard.name for shard in shards] == ["model.safetensors"]:
        return {}
    places = {output.name: shard.name for shard in shards for output in shard.outputs}
    total = sum(output.nbytes for shard in shards for output in shard.outputs)
    return {
        f"{stem}.safetensors.index.json": as_json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        )
    }


def plain_config(config: Mapping[str, Any], has_mtp: bool, declared: Any = None) -> dict[str, bytes]:
    """config.json, which says so when the MTP layers are left out; ``declared`` is its new quantization_config."""
    values = without_quantisation(config)
    if not has_mtp and values.get("num_nextn_predict_layers"):
        values["num_nextn_predict_layers"] = 0
    if declared is not None:
        values["quantization_config"] = declared
    return {"config.json": as_json(values)}


def companions(directory: Path) -> dict[str, Path]:
    """Tokenizer, generation settings, licence and ``*.py`` files, which are copied and never run."""
    found = {}
    for entry in sorted(directory.iterdir()):
        travels = entry.suffix in _COMPANIONS or entry.name.startswith(("LICENSE", "NOTICE"))
        is_index = entry.name.endswith(".index.json")
        if travels and not is_index and entry.name not in _OURS and not entry.name.startswith((".", _DESCRIPTIONS)):
            path = path_inside(directory, entry.name)
            if path.is_file():
                found[entry.name] = path
    return found


def as_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
