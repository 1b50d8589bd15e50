"""``deepspan generate``: continue one prompt as a stream, or many as a batch."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...serving.batch import Completion, complete
from ...serving.request import Event
from ..options import add_run, add_sampling, chosen_run
from ..prompts import Prompt, complete_prompts, read_prompts
from ..runtime import Session, note, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--prompt", dest="prompts", metavar="T", action="append", default=[], help="text to answer; may be repeated"
    )
    parser.add_argument(
        "--input-file",
        metavar="F",
        help="one prompt a line, or one JSON object with prompt or messages a line; - is standard input",
    )
    parser.add_argument("--raw", action="store_true", help="give the text to the model without the chat template")
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")


def run(options: argparse.Namespace) -> int:
    config = chosen_run(options)
    prompts = read_prompts(options.prompts, options.input_file)
    with open_run(config) as session:
        token_ids = [prompt.encode(session.tokenizer, options.raw) for prompt in prompts]
        if len(prompts) == 1 and not options.json:
            _stream(session, token_ids[0])
            return 0
        completions = complete_prompts(session, token_ids, "generating")
    for prompt, completion in zip(prompts, completions, strict=True):
        if options.json:
            print(json.dumps(_as_json(prompt, completion), ensure_ascii=False))
        else:
            print(f"> {prompt.title}\n{completion.text}\n")
    return 0


def _stream(session: Session, token_ids: list[int]) -> None:
    def show(event: Event) -> None:
        print(event.text, end="", flush=True)

    [completion] = complete(session.engine, [token_ids], session.generation_options(), show)
    print()
    if completion.finish_reason == "length":
        note(f"cut off after {len(completion.token_ids)} tokens; --max-new-tokens and engine.max_seq_len allow more")


def _as_json(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    new_tokens = len(completion.token_ids)
    return {
        "prompt": prompt.given,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": completion.prompt_tokens + new_tokens,
        },
    }
