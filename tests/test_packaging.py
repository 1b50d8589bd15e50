"""What is installed is what the tree holds: a package left out of the list would be missing from the wheel silently."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = ("backends", "configs", "convert", "models", "scripts", "serving")


def test_package_list_equals_the_tree():
    tree = {
        ".".join(("deepspan", *file.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == tree


def test_every_module_is_in_a_package():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.relative_to(ROOT)} would not be installed"


def test_top_folders_are_mapped_and_typed():
    assert SETUPTOOLS["package-dir"] == {f"deepspan.{folder}": folder for folder in FOLDERS}
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_data_files_are_covered_by_package_data():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"][package]
        covered = {file for pattern in patterns for file in folder.glob(pattern)}
        data = {
            file
            for file in folder.rglob("*")
            if file.is_file() and file.suffix in (".yaml", ".json", ".safetensors", ".sh", ".typed")
        }
        assert data == covered, f"{package}: {[str(file) for file in data ^ covered]}"


def test_constraints_pin_a_cpu_torch_inside_the_supported_range():
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")
        if "==" in line and not line.startswith("#")
    )
    assert pins["torch"] == "2.13.0"
    assert pins["mindspore"] == "2.10.0"
    assert pins["numpy"].startswith("1.26")
    assert {"transformers", "triton"} <= pins.keys()
