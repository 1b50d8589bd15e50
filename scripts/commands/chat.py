"""``deepspan chat``: a conversation on the terminal, or with lines that are piped in."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ...models.errors import InputError
from ...serving.batch import complete
from ...serving.prompt import Message
from ...serving.request import Event
from ..options import add_run, add_sampling, chosen_run
from ..prompts import user_message
from ..runtime import Session, note, open_run

HELP = "/exit ends, /clear forgets the conversation, /system TEXT sets the system prompt (without TEXT: none)"
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = HELP
    add_sampling(parser)


def run(options: argparse.Namespace) -> int:
    with open_run(chosen_run(options)) as session:
        session.tokenizer.encode_chat(user_message(""))  # a run that cannot chat says so at once
        conversation = Conversation(session)
        for line in _lines():
            if command := _COMMAND.fullmatch(line):
                if command[1] == "exit":
                    break
                _obey(conversation, command[1], command[2] or "")
            elif line:
                conversation.answer(line)
    return 0


def _lines() -> Iterator[str]:
    """What the user types, stripped, until the end of input; Ctrl-C drops a line, not the conversation."""
    prompt = ""
    if sys.stdin.isatty():
        note(HELP)
        prompt = "> "
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives input() line editing and history
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            note("/exit or the end of input ends the conversation")


def _obey(conversation: Conversation, command: str, text: str) -> None:
    if command == "clear":
        conversation.turns.clear()
    elif command == "system":
        conversation.system = text
    else:
        note(f"unknown command /{command}; {HELP}")


class Conversation:
    """The turns so far. A turn that failed is forgotten, one that was interrupted is kept as far as it was shown."""

    def __init__(self, session: Session):
        self.system = ""
        self.turns: list[Message] = []
        self._session = session

    def answer(self, text: str) -> None:
        """Print the answer to ``text`` while it is made."""
        asked = [*self.turns, *user_message(text)]
        shown: list[str] = []
        try:
            self._generate(asked, shown)
            print()
        except KeyboardInterrupt:
            print(flush=True)
            note("interrupted")
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return
        self.turns = [*asked, {"role": "assistant", "content": "".join(shown)}]

    def _generate(self, asked: list[Message], shown: list[str]) -> None:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        token_ids = self._session.tokenizer.encode_chat([*system, *asked])
        with _interrupts_between_steps() as interrupted:

            def show(event: Event) -> None:
                print(event.text, end="", flush=True)
                shown.append(event.text)
                if interrupted:
                    raise KeyboardInterrupt

            complete(self._session.engine, [token_ids], self._session.generation_options(), show)


@contextmanager
def _interrupts_between_steps() -> Iterator[list[int]]:
    """A list that Ctrl-C fills: in the middle of a step it would leave the engine undefined. A second one does end."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)
