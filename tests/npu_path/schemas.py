"""Signatures of torch-npu's operators, as a wheel registers them: python -m tests.npu_path.schemas WHEEL > schemas.txt

``schemas.txt`` has those that the backend calls, of the version in its first line.
"""

import re
import sys
import zipfile
from pathlib import Path

TABLE = Path(__file__).with_name("schemas.txt")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
_SCHEMA = re.compile(rb"\x00((?:_?npu_|[a-z])[\w.]*\([^\x00\n]*\) -> [^\x00\n]+)(?=\x00)")
_OTHER_TYPES = re.compile("__torch__|Dimname")
_CALL = re.compile(r"torch\.ops\.npu\.(\w+)")


def called():
    """The operators that the backend calls."""
    folder = Path(__file__).resolve().parents[2] / "backends" / "torch_triton" / "npu"
    return sorted({name for file in folder.glob("*.py") for name in _CALL.findall(file.read_text(encoding="utf-8"))})


def table():
    """The version and, by name, the schemas that are checked in."""
    version, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    return version.removeprefix("# torch-npu "), by_name(lines)


def by_name(schemas):
    return {schema.partition("(")[0]: schema for schema in schemas}


def of_wheel(wheel):
    """The version, and every schema in the library of a wheel whose types PyTorch knows by themselves."""
    with zipfile.ZipFile(wheel) as opened:
        found = [schema.decode() for schema in _SCHEMA.findall(opened.read(LIBRARY))]
    return Path(wheel).name.split("-")[1], by_name(schema for schema in found if not _OTHER_TYPES.search(schema))


if __name__ == "__main__":
    version, schemas = of_wheel(sys.argv[1])
    print(f"# torch-npu {version}", *(schemas[name] for name in called()), sep="\n")
