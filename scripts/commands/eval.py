"""``deepspan eval``: greedy accuracy on a task, to compare formats and backends."""

from __future__ import annotations

import argparse
import json
import sys

from ...models.errors import InputError
from ..options import add_run, chosen_run
from ..prompts import Prompt, complete_prompts
from ..runtime import open_run, unknown_choice
from ..tasks import TASKS

SHOWN_MISTAKES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    tasks = "; ".join(f"{name}: {task.summary}" for name, task in TASKS.items())
    parser.add_argument("--task", metavar="NAME", required=True, help=tasks)
    parser.add_argument("--limit", metavar="N", type=int, help="ask the first N questions only")
    parser.add_argument("--json", action="store_true", help="print the result alone, without the first mistakes")


def run(options: argparse.Namespace) -> int:
    config = chosen_run(options)
    if options.task not in TASKS:
        raise unknown_choice("task", options.task, TASKS)
    if options.limit is not None and options.limit < 1:
        raise InputError(f"limit is {options.limit}", "--limit", "give 1 or more")
    task = TASKS[options.task]
    questions = task.questions()[: options.limit]
    with open_run(config) as session:
        token_ids = [Prompt(prompt).encode(session.tokenizer) for prompt, _ in questions]
        completions = complete_prompts(session, token_ids, "evaluating", temperature=0.0)
    mistakes = [
        (prompt, answer, completion.text)
        for (prompt, answer), completion in zip(questions, completions, strict=True)
        if not task.is_right(completion.text, answer)
    ]
    if not options.json:
        for prompt, answer, text in mistakes[:SHOWN_MISTAKES]:
            print(f"wrong: {prompt!r} gives {text!r}, not {answer!r}", file=sys.stderr)
    n = len(questions)
    print(json.dumps({"task": options.task, "accuracy": (n - len(mistakes)) / n, "n": n}))
    return 0
