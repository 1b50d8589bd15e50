"""Realisations of the model: a protocol (base) and one folder per framework."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if not __name__.startswith("deepspan."):
    raise ImportError("import deepspan.backends, not backends: the folder is installed under the deepspan namespace")

if TYPE_CHECKING:
    from .base import Backend

# Backend name -> the package it needs and the command that installs it.
REQUIREMENTS: dict[str, tuple[str, str]] = {
    "reference": ("numpy", "pip install deepspan"),
    "torch_triton": ("torch", "pip install 'deepspan[torch]'"),
    "mindspore_ascend": ("mindspore", "pip install 'deepspan[mindspore]'"),
}


def missing_package(name: str) -> str | None:
    """The package that backend ``name`` needs and that is not installed, or None. Imports nothing."""
    package = REQUIREMENTS[name][0]
    return None if importlib.util.find_spec(package) else package


def is_built(name: str) -> bool:
    """Whether this version of deepspan contains the backend at all."""
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def load(name: str) -> Backend:
    """Import one backend, and only that one. A missing framework is an error that names the install command."""
    from ..models.errors import InputError

    if name not in REQUIREMENTS:
        raise InputError(f"unknown backend {name!r}", "backend", f"choose one of {', '.join(REQUIREMENTS)}")
    if not is_built(name):
        raise InputError(f"backend {name} is not part of this version", "backend", "choose another one")
    if missing := missing_package(name):
        raise InputError(f"backend {name} needs the package {missing}", "backend", REQUIREMENTS[name][1])
    module = importlib.import_module(f".{name}", __name__)
    backend: Backend = module.backend()
    return backend
