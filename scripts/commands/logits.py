"""``deepspan logits``: the logits after every token of a given text, for comparing backends and checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...models.errors import InputError
from ..logits_file import check_writable, write_logits
from ..options import add_run, chosen_run
from ..prompts import Prompt
from ..runtime import note, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt-ids", metavar="0,5,9", help="token ids, separated by commas")
    text.add_argument("--prompt", metavar="T", help="text, framed by the chat template as generate does")
    parser.add_argument("--raw", action="store_true", help="encode --prompt without the chat template")
    parser.add_argument("--output", metavar="F.npz", type=Path, required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")


def run(options: argparse.Namespace) -> int:
    config = chosen_run(options)
    check_writable(options.output, options.overwrite)
    ids = None if options.prompt_ids is None else _parse_ids(options.prompt_ids)
    with open_run(config) as session:
        token_ids = ids if ids is not None else Prompt(options.prompt).encode(session.tokenizer, options.raw)
        logits = session.logits(token_ids)
    write_logits(options.output, logits, token_ids)
    note(f"{options.output}: logits {list(logits.shape)}, float32")
    return 0


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"cannot read {text!r}", "--prompt-ids", "give token ids as 0,5,9") from None
