"""``deepspan doctor``: what is installed here, which backends can run and why not, and what does not fit together."""

from __future__ import annotations

import argparse
import platform

import psutil

from ... import backends
from ...backends.memory import GIB
from ...models.errors import InputError
from ..requirements import conflicts, installed_version, known_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit code 1 when versions do not fit together."


def run(options: argparse.Namespace) -> int:
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    memory = psutil.virtual_memory()
    print(f"memory {memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free")
    print("\npackages")
    for name in known_packages():
        print(f"  {name:<20} {installed_version(name) or 'not installed'}")
    print("\nbackends")
    for name in backends.REQUIREMENTS:
        _report_backend(name)
    print("\nversions")
    found = list(conflicts())
    print("\n".join(f"  {line}" for line in found) or "  all fit together")
    return 1 if found else 0


def _report_backend(name: str) -> None:
    """Whether the backend can run: its devices, or the reason why not."""
    try:
        devices = backends.load(name).devices()
    except InputError as error:
        print(f"  {name:<20} no: {error.what}: {error.todo}")
    except (ImportError, OSError, RuntimeError) as error:  # a framework that is installed and does not start
        print(f"  {name:<20} no: {' '.join(str(error).split())}")
    else:
        print(f"  {name:<20} ready")
        for device in devices:
            print(f"  {'':<20}   {device}")
