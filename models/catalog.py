"""Models by name: the YAML files of ``configs/model``."""

from __future__ import annotations

from importlib import resources

import yaml

from .errors import InputError
from .hf_config import refuse_relative
from .spec import ModelSpec, nearest, spec_from_dict


def spec_names() -> list[str]:
    """Every name that `load_spec` knows."""
    folder = resources.files("deepspan.configs") / "model"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_spec(name: str) -> ModelSpec:
    """The spec named ``name``; relatives of another architecture are refused with the reason."""
    known = spec_names()
    if name not in known:
        refuse_relative(name, "model spec")
        raise InputError(f"unknown model {name!r}", "model spec", nearest(name, known))
    text = (resources.files("deepspan.configs") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return spec_from_dict(yaml.safe_load(text), f"configs/model/{name}.yaml")
