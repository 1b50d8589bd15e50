"""Lets the scripts of this folder run from a checkout that is not installed, where ``deepspan.X`` is folder ``X``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def use_checkout() -> None:
    """Make ``deepspan`` importable, and this folder's file names no module names of their own."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    if find_spec("deepspan") is None:
        package = ModuleType("deepspan")
        package.__path__ = [str(folder.parent)]
        sys.modules["deepspan"] = package
