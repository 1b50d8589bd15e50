"""The ``deepspan`` command: one module of `commands` for each subcommand, imported only when it is asked for."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..models.errors import DeepspanError, InputError

COMMANDS = {
    "demo": "show the embedded checkpoint at work on this machine",
    "generate": "continue prompts, one or many",
    "chat": "talk to a model",
    "logits": "write the logits of a given text",
    "compare": "measure how far two logits files differ",
    "eval": "measure task accuracy",
    "inspect": "tell what a checkpoint or a named model is",
    "convert": "bring a checkpoint into another layout or number format",
    "verify": "check a checkpoint's bytes and values, or compare two in any layouts",
    "plan": "tell what each rank will hold and whether it fits, before anything loads",
    "launch": "start the workers of this node with torchrun or msrun",
    "bench": "time decode and prefill",
    "doctor": "tell which backends can run here, and why not",
}


class Parser(argparse.ArgumentParser):
    """Reports bad usage as every other error: one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message, self.prog, f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 for done, 1 for failed while running, 2 for bad usage, config or input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    try:
        options = parse(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except BrokenPipeError:
        # The reader of our output is gone; close it quietly, also for the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(error, "--debug" in arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line with the parser of the command that it names."""
    parser = Parser(prog="deepspan", description="DeepSeek-V3-family models: one spec, several backends, one answer.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=Parser, dest="command")
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if arguments and arguments[0] == name:
            module = importlib.import_module(f".commands.{name}", __package__)
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show a traceback with an error")
            command.set_defaults(run=module.run)
    own, workers = _split(arguments)
    options, unknown = parser.parse_known_args(own, argparse.Namespace(workers=workers))
    if unknown:
        subparsers.choices.get(options.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        from importlib.metadata import version

        print(f"deepspan {version('deepspan')}")
        parser.exit()
    if options.command is None:
        parser.error("no command")
    return options


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and after ``--`` of the launch command: its own arguments, and its workers'."""
    if arguments[:1] != ["launch"] or "--" not in arguments:
        return list(arguments), []
    end = arguments.index("--")
    return list(arguments[:end]), list(arguments[end + 1 :])


def _open_closed_streams() -> None:
    """A stream that whoever started us has closed is None here, and a file of ours could get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the end


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {_described(error)}", file=sys.stderr)
    return error.exit_code if isinstance(error, DeepspanError) else 1


def _described(error: Exception) -> str:
    """What, where and what to do, as one line."""
    what = " ".join(str(error).split())
    if isinstance(error, DeepspanError):
        return what
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        todo = "check the path, its permissions and the space that is left"
        return f"{error.strerror}: {error.filename or 'a file or standard output'}: {todo}"
    if isinstance(error, UnicodeEncodeError):
        what = f"cannot write {error.object[error.start]!a} in {error.encoding}"
        return f"{what}: output: set PYTHONIOENCODING=utf-8"
    return f"{type(error).__name__}: {what}: run it again with --debug to see where"


if __name__ == "__main__":
    sys.exit(main())
