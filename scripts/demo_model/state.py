"""Weights and optimizer moments on disk, so that training can go on after an interruption."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .network import DemoModel

STATE_FILE_BYTES = 15 << 20


def save_state(folder: Path, model: DemoModel, optimizer: torch.optim.AdamW, step: int) -> None:
    """Weights in float32, Adam's moments in bfloat16, in safetensors files of at most STATE_FILE_BYTES."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment].bfloat16()
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > STATE_FILE_BYTES:
            files.append({})
        files[-1][name] = tensor.contiguous().cpu()
    for index, part in enumerate(files):
        save_file(part, folder / f"state-{index}.safetensors", metadata={"step": str(step)})


def load_state(folder: Path, model: DemoModel, optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_state` wrote; returns the step to go on with."""
    paths = sorted(folder.glob("state-*.safetensors"))
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    with safe_open(paths[0], "pt") as file:
        step = int(file.metadata()["step"])
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if ":" not in name})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device if parameter.is_cuda else "cpu"),
            **{m: tensors[f"{m}:{name}"].float().to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
        }
    return step
