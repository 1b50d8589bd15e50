"""The trained model as a published checkpoint: FP8 blocks, Hugging Face names, several shards; and back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...models.params import stored_tensors
from .config import CONFIG
from .fp8 import dequantise_blocks, quantise_blocks
from .network import DemoModel
from .text import BOS_ID, EOS_ID, PAD_ID, write_json

SHARDS = 3


def canonical_weights(model: DemoModel) -> dict[str, Tensor]:
    """Float32 weights by Hugging Face name, experts apart, embedding and head a second time in the MTP layer."""
    last = f"model.layers.{model.spec.num_hidden_layers}."
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.float().cpu()
        if name in ("embed_tokens", "lm_head"):
            main, copy = {"embed_tokens": ("model.embed_tokens", "embed_tokens")}.get(
                name, ("lm_head", "shared_head.head")
            )
            weights[f"{main}.weight"] = weights[f"{last}{copy}.weight"] = tensor
        elif name.startswith("mtp.shared_head_norm"):
            weights[f"{last}shared_head.norm.weight"] = tensor
        elif name == "mtp.eh_proj":
            weights[f"{last}eh_proj.weight"] = tensor
        else:
            full = name.replace("mtp.", last) if name.startswith("mtp.") else f"model.{name}"
            weights.update(_split_experts(full, tensor))
    return weights


def _split_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if ".mlp.experts." not in name:
        return {name: tensor}
    prefix, projection = name.rsplit(".", 1)
    return {f"{prefix}.{expert}.{projection}.weight": part for expert, part in enumerate(tensor)}


def write_checkpoint(model: DemoModel, folder: Path) -> None:
    """Config, shards and index in Hugging Face's layout; the tokenizer files must be there already."""
    weights = canonical_weights(model)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors: dict[str, Tensor] = {}
    for stored in stored_tensors(model.spec):
        if stored.name.endswith("_scale_inv"):
            continue
        weight = weights.pop(stored.name)
        if stored.dtype == "F8_E4M3":
            tensors[stored.name], tensors[f"{stored.name}_scale_inv"] = quantise_blocks(weight)
        else:
            tensors[stored.name] = weight.to(dtypes[stored.dtype])
    assert not weights, f"not in the parameter table: {sorted(weights)}"
    _write_shards(tensors, folder)
    write_json(folder / "config.json", CONFIG)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False},
    )


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    weight_map, written = {}, 0
    for name, tensor in tensors.items():
        shard = written * SHARDS // total
        written += tensor.nbytes
        if name.endswith(("kv_a_proj_with_mqa.weight_scale_inv", "experts.3.up_proj.weight_scale_inv")):
            shard = (shard + 1) % SHARDS  # as in the published checkpoint, some scales lie in another file
        shards[shard][name] = tensor.contiguous().clone()
        weight_map[name] = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
    for index, shard_tensors in enumerate(shards):
        file = folder / f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard_tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library makes files that only their owner can read
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index_json)


def read_checkpoint(folder: Path, model: DemoModel) -> None:
    """Load the model with the dequantised weights of a checkpoint that `write_checkpoint` wrote."""
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    weights = {
        name: dequantise_blocks(tensor, stored[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in stored
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    last = f"model.layers.{model.spec.num_hidden_layers}."
    state = {}
    for name in model.state_dict():
        source = (
            name.replace("mtp.", last)
            if name.startswith("mtp.")
            else f"model.{name}".replace("model.lm_head", "lm_head")
        )
        source = source.replace("shared_head_norm", "shared_head.norm")
        if ".mlp.experts." in name:
            prefix, projection = source.rsplit(".", 1)
            experts = range(model.spec.n_routed_experts)
            state[name] = torch.stack([weights[f"{prefix}.{expert}.{projection}.weight"] for expert in experts])
        else:
            state[name] = weights[source if source in weights else f"{source}.weight"]
    model.load_state_dict(state)
    model.round_weights(False)
