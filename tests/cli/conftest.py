"""The command line, run in this process; and copies of the embedded checkpoint to damage."""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepspan.scripts.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "models" / "demo"


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def deepspan(capsys, monkeypatch):
    """Run one command: ``deepspan("eval", "demo_reference", stdin="…")``; without stdin there is a terminal."""

    def run(*arguments, stdin=None):
        text = io.StringIO(stdin or "")
        text.isatty = lambda: stdin is None
        monkeypatch.setattr(sys, "stdin", text)
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded checkpoint."""
    return Path(shutil.copytree(DEMO, tmp_path / "checkpoint"))
