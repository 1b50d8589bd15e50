"""Import hygiene: neutral folders load no framework, and one file is never two modules."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("torch", "triton", "mindspore", "torch_npu", "transformers")
NEUTRAL = ("models", "convert", "configs", "serving")
# Names that tie code to one vendor; only one file may know them.
VENDOR_FILE = "backends/torch_triton/device.py"


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)


def modules_of(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    names = [".".join(["deepspan", *file.relative_to(ROOT).with_suffix("").parts]) for file in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("folder", [*NEUTRAL, "backends/reference", "scripts/cli.py"])
def test_importing_every_neutral_module_loads_no_framework(folder, tmp_path):
    modules = ["deepspan.scripts.cli"] if folder == "scripts/cli.py" else modules_of(folder)
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
loaded = [name for name in {FRAMEWORKS!r} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["models", "backends", "convert", "configs", "serving", "scripts"])
def test_folders_cannot_be_imported_beside_the_namespace(folder):
    """`import models` from a checkout would make a second copy of every module; the guard says what to import."""
    result = python(f"import {folder}", ROOT)
    assert result.returncode != 0
    assert f"import deepspan.{folder}, not {folder}" in result.stderr


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", NEUTRAL)
def test_neutral_sources_import_no_framework_even_lazily(folder):
    for file in (ROOT / folder).rglob("*.py"):
        framework = imported_names(ast.parse(file.read_text(encoding="utf-8"))) & set(FRAMEWORKS)
        assert not framework, f"{file.relative_to(ROOT)} imports {framework}"


def identifiers(tree: ast.AST) -> set[str]:
    """Names, attributes and string constants that are not docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            found.add(node.value)
    return found


def test_one_file_knows_the_vendors():
    for file in (ROOT / "backends").rglob("*.py"):
        if file.relative_to(ROOT).as_posix() == VENDOR_FILE:
            continue
        for word in identifiers(ast.parse(file.read_text(encoding="utf-8"))):
            vendor = re.fullmatch(r"(cuda|hip)(:\d+|\..*)?", word)
            assert not vendor, f"{file.relative_to(ROOT)} names {word!r}: ask device.py instead"


def dangers(tree: ast.AST) -> list[str]:
    """What would run code that came with a checkpoint: pickles, torch.load, trust_remote_code, exec."""
    found = sorted(imported_names(tree) & {"pickle", "marshal", "shelve", "dill", "cloudpickle"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in ("torch.load", "exec", "eval", "compile") else []
            found += [
                "allow_pickle" for k in node.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"
            ]
            found += ["trust_remote_code" for k in node.keywords if k.arg == "trust_remote_code"]
    return found


def test_nothing_loads_pickles_or_runs_checkpoint_code():
    for folder in (*NEUTRAL, "backends", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            found = dangers(ast.parse(file.read_text(encoding="utf-8")))
            assert not found, f"{file.relative_to(ROOT)}: {found}"


def test_the_danger_check_sees_dangers():
    code = "import pickle\ntorch.load(f)\nexec(s)\nnp.load(f, allow_pickle=True)\nm(trust_remote_code=True)"
    assert dangers(ast.parse(code)) == ["pickle", "torch.load", "exec", "allow_pickle", "trust_remote_code"]
