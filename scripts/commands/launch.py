"""``deepspan launch``: start this node's workers with torchrun or msrun, as the run says."""

from __future__ import annotations

import argparse
import shlex

from ...models.errors import InputError
from ...models.sharding import check_divides
from ..cli import parse
from ..launching import Node, check_ranks, run_node
from ..options import add_run
from ..runtime import read_run
from .plan import planned_spec

_COMMANDS = ("generate", "chat", "logits", "eval", "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--node-rank", type=int, metavar="N", help="this machine's number, from 0")
    parser.add_argument("--master-addr", metavar="A", help="the first node's address, in place of the run's")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.epilog = "After -- stands what every worker runs, such as: -- generate --prompt T. RUN is added to it."


def run(options: argparse.Namespace) -> int:
    config = read_run(options.run_name, options.overrides)
    check_divides(planned_spec(config), check_ranks(config))
    launch = config.launch
    if options.master_addr:
        launch = launch.model_copy(update={"master_addr": options.master_addr})
    if options.node_rank is None and launch.nodes > 1:
        raise InputError(f"one of {launch.nodes} nodes", "--node-rank", "say which one, from 0")
    node = Node(launch, options.node_rank or 0)
    if not options.workers:
        raise InputError("no command for the workers", "deepspan launch", "add one, such as: -- generate --prompt T")
    if options.workers[0] not in _COMMANDS:
        todo = f"choose from {', '.join(_COMMANDS)}"
        raise InputError(f"{options.workers[0]} is no command for several processes", "deepspan launch", todo)
    arguments = _with_run(options.workers, options.run_name, options.overrides)
    parse(arguments)  # what no worker would understand is said before any starts
    if options.dry_run:
        settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(launch.env.items())]
        print(" ".join([*settings, shlex.join(node.command(arguments))]))
        return 0
    run_node(node, arguments)
    return 0


def _with_run(command: list[str], run_name: str, overrides: list[str]) -> list[str]:
    """The command with RUN as its first argument, where it may stand already, and this command line's overrides."""
    name, *rest = command
    if rest[:1] == [run_name]:
        rest = rest[1:]
    return [name, run_name, *(f"--set={override}" for override in overrides), *rest]
