"""Prompts as users give them: on the command line, in a file or on standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.strict_json import StrictJsonError, parse_object
from ..models.errors import InputError
from ..models.spec import nearest
from ..serving.batch import Completion, complete
from ..serving.prompt import Message, Tokenizer, check_messages
from ..serving.request import Event
from .progress import Progress
from .runtime import Session, note

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Prompt:
    """What is asked: one text, or the messages of a conversation."""

    given: str | list[Message]

    def encode(self, tokenizer: Tokenizer, raw: bool = False) -> list[int]:
        """Token ids; ``raw`` text goes to the model as it is, otherwise the chat template frames it."""
        if not isinstance(self.given, str):
            if raw:
                raise InputError("messages need the chat template", "--raw", "leave --raw out, or give prompts")
            return tokenizer.encode_chat(self.given)
        return tokenizer.encode_raw(self.given) if raw else tokenizer.encode_chat(user_message(self.given))

    @property
    def title(self) -> str:
        """What stands above the answer: the text, or the last message's."""
        return self.given if isinstance(self.given, str) else self.given[-1]["content"]


def user_message(text: str) -> list[Message]:
    """The conversation that begins with ``text``."""
    return [{"role": "user", "content": text}]


def complete_prompts(session: Session, prompts: Sequence[list[int]], what: str, **changes: Any) -> list[Completion]:
    """Continue encoded prompts as one batch, with progress; ``changes`` are `Session.generation_options`'s."""
    finished = 0
    with Progress(what, len(prompts)) as progress:

        def count(event: Event) -> None:
            nonlocal finished
            finished += event.finish_reason is not None
            progress.show(finished)

        return complete(session.engine, prompts, session.generation_options(**changes), count)


def read_prompts(texts: Sequence[str], input_file: str | None) -> list[Prompt]:
    """``texts`` and then the prompts of ``input_file``; with neither, those of a piped standard input."""
    if not texts and input_file is None:
        if sys.stdin.isatty():
            raise InputError("no prompt", "command line", "give --prompt or --input-file, or pipe prompts in")
        input_file = STANDARD_INPUT
    prompts = [Prompt(text) for text in texts]
    if input_file is not None:
        prompts += _read_file(input_file)
    return prompts


def _read_file(name: str) -> list[Prompt]:
    """One prompt a line, or one JSON object a line when the first line that is not blank begins with a brace."""
    where = "standard input" if name == STANDARD_INPUT else name
    numbered = list(enumerate(_read_text(name, where).split("\n"), 1))
    filled = [(number, line) for number, line in numbered if line.strip()]
    if not filled:
        raise InputError("no prompts", where, "write one prompt a line")
    if filled[0][1].lstrip().startswith("{"):
        prompts = [_read_object(line, f"{where}, line {number}") for number, line in filled]
    else:
        prompts = [Prompt(line) for _, line in filled]
    if blank := filled[-1][0] - len(filled):
        note(f"{where}: {blank} blank line{'s' if blank > 1 else ''} skipped")
    return prompts


def _read_text(name: str, where: str) -> str:
    try:
        if name == STANDARD_INPUT:
            return sys.stdin.read()
        return Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", where, "save the prompts as UTF-8") from None
    except OSError as error:
        raise InputError("cannot read the prompts", where, error.strerror or str(error)) from None


def _read_object(line: str, where: str) -> Prompt:
    try:
        values = parse_object(line.encode("utf-8"))
    except StrictJsonError as error:
        raise InputError(f"{error}", where, "write one JSON object a line, with prompt or messages") from None
    for key in values:
        if key not in ("prompt", "messages"):
            raise InputError(f"unknown key {key!r}", where, nearest(key, ("prompt", "messages")))
    if len(values) != 1:
        raise InputError("not exactly one of prompt and messages", where, "give one of them")
    if "messages" in values:
        return Prompt(_messages(values["messages"], where))
    if not isinstance(values["prompt"], str):
        raise InputError("prompt is not text", where, "write it as a JSON string")
    return Prompt(values["prompt"])


def _messages(value: Any, where: str) -> list[Message]:
    try:
        check_messages(value)
    except InputError as error:
        raise InputError(error.what, f"{where}: {error.where}", error.todo) from None
    return list(value)
