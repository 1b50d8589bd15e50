"""Small random Hugging Face checkpoints of every corner of the family, and comparing what was converted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from deepspan.convert.executor import Result, run_plan
from deepspan.convert.kinds import KINDS
from deepspan.convert.kinds.options import Options
from deepspan.models.hf_config import spec_from_hf
from deepspan.models.params import parameters
from deepspan.models.spec import ModelSpec, Yarn
from tests.convert import encoders

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"


def write_random(directory: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """BF16 and F32 tensors of random bits, dealt to two shards; MTP tables are copies, as in published checkpoints."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, torch.Tensor] = {}
    for param in parameters(spec):
        # Every bit pattern but NaNs, whose payload a conversion through FP32 need not keep.
        bits = rng.integers(0, 2**16, param.shape, np.uint16) & np.uint16(0xBF7F)
        value = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        tensors[param.name] = value.float() if param.dtype == "F32" else value
    for layer in spec.mtp_layers():
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    encoders.write(directory, tensors)
    config = hf_config(spec)
    (directory / "config.json").write_text(json.dumps(config))
    read = spec_from_hf(config, "config.json")
    assert [p.name for p in parameters(read)] == [p.name for p in parameters(spec)]
    return directory


def change(directory: Path, name: str, edit: Callable[[torch.Tensor], object]) -> None:
    """Edit one tensor of a written checkpoint in place."""
    tensors = stored(directory)
    edit(tensors[name])
    config = (directory / "config.json").read_text()
    encoders.write(directory, tensors)
    (directory / "config.json").write_text(config)


def hf_config(spec: ModelSpec) -> dict:
    config = encoders.hf_config(dataclasses.replace(spec, yarn=spec.yarn or Yarn(4.0, 64)))
    if spec.yarn is None:
        del config["rope_scaling"]
    return config | {"model_type": spec.family, "rope_interleave": spec.rope_interleave}


def convert(kind: str, source: Path, destination: Path, workers: int = 3, **options: object) -> Path:
    run(kind, source, destination, workers, **options)
    return destination


def run(kind: str, source: Path, destination: Path, workers: int = 3, **options: object) -> Result:
    plan = KINDS[kind].plan(source, Options(**options))
    try:
        return run_plan(plan, destination, workers)
    finally:
        plan.close()


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found, f"{name} is there twice"
                found[name] = file.get_tensor(name)
    return found


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(as_bytes(a[name]), as_bytes(b[name])), name


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
