"""Every kernel that a launcher can choose compiles, ahead of time, for chips that this machine does not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "norm._add_norm_quantise", "int8._quantise_rows", "few_rows._rows", "experts._group", "experts._rows",
    "router._route", "router._choose_of_logits", "mla_decode._attend", "mla_decode._merge", "rope_cache._rope_cache",
    "entries._read", "absorb._absorb", "prompt_attention._prompt_attention", "grouped._grouped", "best._best",
    "pairs._count", "pairs._tile", "pairs._place", "pairs._gather", "embed._embed", "decoded._decoded",
    "gather._beside", "logits._logits", "combine._add_parts", "gate._gate", "values._values",
}  # fmt: skip
HOPPER = {"grouped_hopper._grouped_hopper", "mla_hopper._mla_hopper", "prompt_hopper._prompt_hopper"}


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_compiles_for(chip):
    script = Path(__file__).with_name("compile_for.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(script), chip], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    variants = json.loads(result.stdout)
    expected = set(KERNELS) if chip == "sm_80" else KERNELS | {"quant._quantise"}  # no FP8 units: nothing is quantised
    assert set(variants) == expected | (HOPPER if chip == "sm_90" else set())
