"""Prompts: text or messages to token ids, and token ids back to text, as the checkpoint's tokenizer files say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..models.errors import InputError
from ..models.hf_config import token_ids

# The format of DeepSeek-V3 and R1 (their tokenizer_config.json), for copies of the checkpoints that lost the template.
DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '<｜Assistant｜>' + message.content + eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
_DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>")
# Templates cut the reasoning out of earlier answers at these, so an assistant's own are left as they are.
_THINK_TOKENS = ("<think>", "</think>")
# Characters for marks inside rendered prompts: private use, so no template gives them a meaning.
_MARKS = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))

Message = Mapping[str, Any]


class Tokenizer:
    """The ``tokenizer.json`` of a checkpoint with the control tokens and chat template of ``tokenizer_config.json``.

    Text inside chat messages can never become a control token: see `encode_chat`.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any], template: str | None, where: str):
        self._where = where
        try:
            self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
            contents = json.loads(tokenizer_json)
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise InputError("not a tokenizer.json", where, " ".join(str(error).split())) from None
        added = contents.get("added_tokens") or []
        control = [token["content"] for token in added if token.get("special") or _is_markup(token["content"])]
        self._control_ids = {text: self._id(text) for text in control}
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        self._plain = _without(contents, set(control))
        self._plain_ids = {
            new: self._id(token.content) for new, token in self._plain.get_added_tokens_decoder().items()
        }
        self.vocab_size = self._full.get_vocab_size(with_added_tokens=True)
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self.eos_token_id = self._full.token_to_id(self.eos_token) if self.eos_token else None
        self._add_bos = config.get("add_bos_token")
        self._template = template

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint directory, or a ``tokenizer.json`` with its config beside it."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(
                "no tokenizer.json", str(path), "copy it from the original checkpoint, or set model.tokenizer"
            )
        config_file = file.with_name("tokenizer_config.json")
        config = read_json(config_file) if config_file.is_file() else {}
        return cls(_read_text(file), config, _find_template(config, file.parent), str(file))

    def encode_raw(self, text: str) -> list[int]:
        """The ids of ``text`` as it is, control tokens included, after the bos token if the tokenizer adds one."""
        _check_unicode(text, "prompt")
        ids: list[int] = self._full.encode(text, add_special_tokens=self._add_bos is not False).ids
        if self._add_bos and self.bos_token:
            bos = self._id(self.bos_token)
            if ids[:1] != [bos]:
                ids = [bos, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant answers.

        The template writes control tokens and the messages write text, but it returns one string: to tell them apart,
        a mark (a character that occurs nowhere else) is put behind every character of a message that could begin a
        control token. What still reads as a control token in the result is the template's; then the marks go.
        Encoding each message apart would be simpler and wrong: templates trim, join and cut them.
        """
        check_messages(messages)
        if self._template is None and not self._control_ids.keys() >= set(_DEEPSEEK_TOKENS):
            raise InputError(
                "no chat template", self._where, "add chat_template to tokenizer_config.json, or use --raw"
            )
        mark = self._unused_mark(messages)
        marked = [self._with_marks(message, mark) for message in messages]
        return self._encode_marked(self._render(marked), mark)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt text that `encode_chat` encodes."""
        check_messages(messages)
        return self._render(messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out; an unfinished character shows as U+FFFD."""
        text: str = self._full.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _id(self, token: str) -> int:
        token_id = self._full.token_to_id(token)
        if token_id is None:
            raise InputError(
                f"token {token!r} is not in the vocabulary", self._where, "use the files of one checkpoint"
            )
        return int(token_id)

    def _render(self, messages: Sequence[Message]) -> str:
        environment = _sandbox()
        try:
            return environment.from_string(self._template or DEEPSEEK_TEMPLATE).render(
                messages=messages,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
                add_generation_prompt=True,
            )
        except TemplateSyntaxError as error:
            where = str(Path(self._where).with_name("tokenizer_config.json or chat_template.jinja"))
            raise InputError(f"chat template: {error}", where, "use the file of the original checkpoint") from None
        except Exception as error:  # a template is foreign code and can fail in any way
            raise InputError(
                f"chat template: {error}", self._where, "check the roles and contents of the messages"
            ) from None

    def _unused_mark(self, messages: Sequence[Message]) -> str:
        used = set(json.dumps(messages, ensure_ascii=False)) | set(self._template or "")
        mark = next((chr(code) for code in _MARKS if chr(code) not in used), None)
        if mark is None:
            raise InputError("message uses all private-use characters", "messages", "shorten it")
        return mark

    def _with_marks(self, value: Any, mark: str, keep: tuple[str, ...] = ()) -> Any:
        """A copy of a message with its texts marked; roles are the template's business and stay."""
        if isinstance(value, str):
            firsts = re.escape("".join({text[0] for text in self._control_ids}))
            if not firsts:
                return value
            kept = "".join(f"(?!{re.escape(text)})" for text in keep)
            return re.sub(f"{kept}[{firsts}]", lambda found: found[0] + mark, value)
        if isinstance(value, Mapping):
            keep = _THINK_TOKENS if value.get("role") == "assistant" else keep
            return {key: item if key == "role" else self._with_marks(item, mark, keep) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._with_marks(item, mark, keep) for item in value]
        return value

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for found in self._control.finditer(text):
            ids += self._encode_plain(text[end : found.start()].replace(mark, ""))
            ids.append(self._control_ids[found[0]])
            end = found.end()
        return ids + self._encode_plain(text[end:].replace(mark, ""))

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, not even what looks like one."""
        if not text:
            return []
        ids = self._plain.encode(text, add_special_tokens=False).ids
        ids = [self._plain_ids.get(token_id, token_id) for token_id in ids]
        # A vocabulary that lists its control tokens can still find one as a whole word; not letter by letter.
        if len(text) > 1 and not set(self._control_ids.values()).isdisjoint(ids):
            return [token_id for letter in text for token_id in self._encode_plain(letter)]
        return ids


def stop_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """Everything that any file of the checkpoint calls an end token.

    They disagree in published checkpoints: Kimi-K2's config.json names another token than the one its turns end with.
    """
    ids: set[int] = set()
    for name, source in (("config.json", config), ("generation_config.json", generation_config)):
        ids.update(token_ids(source.get("eos_token_id"), f"{name}: eos_token_id"))
    if tokenizer and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def check_messages(messages: Any) -> None:
    """Refuse what is not a list of {role, content} with text in both."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError("messages is not a list of messages", "messages", "give [{role: user, content: …}, …]")
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise InputError(f"message {number} has no {key} text", "messages", "give role and content as text")
            _check_unicode(message[key], f"message {number}")


def _check_unicode(text: str, where: str) -> None:
    """Bytes that are no UTF-8 reach Python as lone surrogates, which are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start + 1} is not valid Unicode", where, "write it in UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        values = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError("not a JSON file", str(path), str(error)) from None
    if not isinstance(values, dict):
        raise InputError("not a JSON object", str(path), "use the file of the original checkpoint")
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text", str(path), "copy the file again") from None
    except OSError as error:
        raise InputError("cannot read", str(path), error.strerror or str(error)) from None


def _find_template(config: Mapping[str, Any], directory: Path) -> str | None:
    """``chat_template.jinja`` beside the tokenizer, or the config's: one text, or a list of named ones."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text or an object with the text in ``content``."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _is_markup(text: str) -> bool:
    """Whether an added token steers the model though its file does not call it special, as <｜User｜> and <think>.

    Other added tokens (letters, runs of spaces) are vocabulary, which any text may use.
    """
    return len(text) > 2 and (text[0], text[-1]) in {("<", ">"), ("[", "]")}


def _without(contents: Mapping[str, Any], control: set[str]) -> tokenizers.Tokenizer:
    """The same tokenizer with the control tokens unknown to it."""
    added = [token for token in contents.get("added_tokens") or [] if token["content"] not in control]
    # The post-processor names tokens that are gone, and it is not used on parts of a prompt.
    return tokenizers.Tokenizer.from_str(json.dumps({**contents, "added_tokens": added, "post_processor": None}))


def _sandbox() -> ImmutableSandboxedEnvironment:
    """The environment Hugging Face templates are written for; they come with checkpoints, so it is sandboxed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
