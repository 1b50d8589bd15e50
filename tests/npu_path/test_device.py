"""What choosing an NPU asks of a machine, each in a process of its own: PyTorch cannot forget a device.

There is no NPU here. The last two tests put a module in torch_npu's place that registers the device as torch_npu does;
everything else is PyTorch's.
"""

import os
import subprocess
import sys

import pytest

REGISTERS = """
import types
import torch
torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", types.SimpleNamespace(
    is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda number: "Ascend910B",
    mem_get_info=lambda device: (32 << 30, 64 << 30),
))
"""
RUN = """
import sys
from deepspan import backends
from deepspan.configs.schema import RunConfig
run = RunConfig.model_validate({"model": {"spec": "demo", "weights": "random"}, "device": DEVICE})
backend = backends.load("torch_triton")
"""


def python(code, folder, module=None):
    """Output of ``code`` where ``module`` is all that torch_npu is."""
    if module is not None:
        (folder / "torch_npu.py").write_text(module)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def refusal(folder, module=None):
    code = RUN.replace("DEVICE", "'npu'") + "\ntry: backend.start(run); backend.build(None, run, backend.start(run))\n"
    return python(code + "except Exception as error: print(type(error).__name__, error)", folder, module)


def test_without_torch_npu_one_line_says_what_to_install(tmp_path):
    assert refusal(tmp_path) == (
        "InputError the package torch_npu is not installed: device: npu: "
        "install CANN and then pip install 'deepspan[npu]', or set it to cpu"
    )


@pytest.mark.parametrize(
    "error", ["ImportError('libhccl.so: cannot open\\nmore')", "OSError('libhccl.so: cannot open')"]
)
def test_torch_npu_that_does_not_start_says_why(tmp_path, error):
    assert refusal(tmp_path, f"raise {error}") == (
        "InputError torch_npu does not start: libhccl.so: cannot open: device: npu: "
        "install the CANN that fits it and source its set_env.sh, or set it to cpu"
    )


def test_torch_npu_is_imported_only_when_an_npu_is_chosen(tmp_path):
    code = RUN.replace("DEVICE", "'cpu'") + "backend.start(run); print('torch_npu' in sys.modules)"
    assert python(code, tmp_path, "raise ImportError('imported')") == "False"


def test_each_device_has_its_libraries_and_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    code = (
        RUN.replace("DEVICE", "'npu', 'launch': {'launcher': 'torchrun'}")
        + """
from deepspan.backends.torch_triton import device
chosen = device.choose_device(run)
print(chosen, device.collectives(chosen), device.memory(chosen))
"""
    )
    assert python(code, tmp_path, REGISTERS) == f"npu:1 cpu:gloo,npu:hccl ({32 << 30}, {64 << 30})"


def test_doctor_lists_npus_or_says_why_not(tmp_path):
    code = RUN.replace("DEVICE", "'cpu'") + "print(*backend.devices(), sep='\\n')"
    assert python(code, tmp_path, REGISTERS).count("npu: Ascend910B, 64.0 GiB\n") == 2
    assert "npu: no: torch_npu does not start: no CANN: install the CANN" in python(
        code, tmp_path, "raise ImportError('no CANN')"
    )
