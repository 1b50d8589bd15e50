"""What the commands of the original projects share: they show the equivalent ``deepspan`` line and hand over to it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable

from ..models.errors import DeepspanError
from . import cli


def boolean(text: str) -> bool:
    """``true`` or ``false`` in any case, as the originals spell their switches."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def run_original(parser: argparse.ArgumentParser, translate: Callable[[argparse.Namespace], list[str]]) -> int:
    """Parse this process's command line, print the ``deepspan`` line that it means, and run that; the exit code."""
    try:
        command = translate(parser.parse_args())
    except DeepspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(shlex.join(["deepspan", *command]), flush=True)
    return cli.main(command)
