"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..configs.schema import RunConfig
from .runtime import read_run

_SAMPLING = {
    "max_new_tokens": (int, "N", "tokens to generate at most"),
    "temperature": (float, "T", "0 always takes the likeliest token"),
    "top_p": (float, "P", "sample among the likeliest tokens that together have this probability"),
    "top_k": (int, "K", "sample among the K likeliest tokens; 0 is all"),
    "seed": (int, "S", "the same seed gives the same text"),
}


def path(text: str) -> Path:
    """An argument that names a file or a directory: an empty one, such as that of an unset variable, is none."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN and ``--set``."""
    parser.add_argument("run_name", metavar="RUN", help="run YAML, checkpoint directory, or name of a shipped run")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        help="override a key of the run YAML; may be repeated",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """One option for each number of the run's ``sampling`` section."""
    for key, (kind, metavar, help_text) in _SAMPLING.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, metavar=metavar, help=help_text)


def chosen_run(options: argparse.Namespace) -> RunConfig:
    """The run that the command line names, with the overrides and sampling options given there."""
    flags: dict[str, Any] = {
        f"sampling.{key}": value for key in _SAMPLING if (value := getattr(options, key, None)) is not None
    }
    return read_run(options.run_name, options.overrides, flags)
