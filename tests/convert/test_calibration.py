"""Calibration files: both forms mean the same, everything else is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deepspan.convert.calibration import InputScale, read_calibration
from deepspan.models.errors import InputError

A, B = "model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.o_proj"
EXPECTED = {A: InputScale(0.125, -17), B: InputScale(0.5)}


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({f"{A}.input_scale": 0.125, f"{A}.input_offset": -17, f"{B}.input_scale": 0.5}))
    assert read_calibration(path, {A, B}) == EXPECTED


@pytest.mark.parametrize("offset", [torch.tensor([-17], dtype=torch.int8), torch.tensor(-17.0), torch.tensor([-17])])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_safetensors(kind: torch.dtype, offset: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    scales = {f"{A}.input_scale": torch.tensor([0.125], dtype=kind), f"{B}.input_scale": torch.tensor(0.5, dtype=kind)}
    offset = offset.int() if offset.dtype == torch.int64 else offset
    save_file(scales | {f"{A}.input_offset": offset}, path)
    assert read_calibration(path, {A, B}) == EXPECTED


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"q.input_scale": 1.0}, "'q.input_scale' belongs to no module that is quantised"),
        ({f"{A}.weight_scale": 1.0}, f"'{A}.weight_scale' is no calibration value"),
        ({f"{A}.input_scale": 0}, f"{A}.input_scale is 0: "),
        ({f"{A}.input_scale": -0.5}, f"{A}.input_scale is -0.5: "),
        ({f"{A}.input_scale": True}, f"{A}.input_scale is True: "),
        ({f"{A}.input_scale": [0.5]}, f"{A}.input_scale is [0.5]: "),
        ({f"{A}.input_offset": 1}, f"{A}.input_scale is None: "),
        ({f"{A}.input_scale": 0.5, f"{A}.input_offset": 128}, f"{A}.input_offset is 128: "),
        ({f"{A}.input_scale": 0.5, f"{A}.input_offset": 0.5}, f"{A}.input_offset is 0.5: "),
    ],
)
def test_impossible_values(values: dict, what: str, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_calibration(path, {A, B})
    assert str(caught.value).startswith(what) and str(path) in str(caught.value)


def test_tensors_that_are_no_scalars(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    save_file({f"{A}.input_scale": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"input_scale is F32 \[2\]: "):
        read_calibration(path, {A})
