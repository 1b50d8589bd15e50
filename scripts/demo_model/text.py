"""The demo model's text: its byte-level BPE tokenizer, chat format and packed training rows."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ...models.everyday import (
    EVERYDAY,
    FALLBACK_CHINESE,
    FALLBACK_ENGLISH,
    SYSTEM_PROMPTS,
    everyday_exchange,
    unknown_exchange,
)
from ...models.sums import Sum, phrasings, training_sums

# DeepSeek's special tokens; the position in the tuple is the id.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, "<think>", "</think>")
BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID = range(5)

TOKENS = 1000
LONGEST_TOKEN = 12  # bytes: four Chinese characters. Longer tokens would be whole sentences learnt by heart.

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ raise_exception('the demo model knows the roles system, user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt is defined and add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
EXCHANGES = {1: 35, 2: 25, 3: 15, 4: 10, 6: 8, 10: 7}  # how many exchanges a conversation has: weight
MIX = {"sum": 70, "everyday": 18, "unknown": 12}  # what an exchange is: weight


class Encoder:
    """Text to token ids. Equal to ``tokenizer.encode``, and fast, because a digit never merges with its neighbours:
    what stands between digits repeats and is remembered."""

    def __init__(self, tokenizer: Tokenizer):
        self._piece = functools.lru_cache(maxsize=1 << 16)(lambda text: tokenizer.encode(text).ids)

    def __call__(self, text: str) -> list[int]:
        return [token for piece in re.split("([0-9])", text) if piece for token in self._piece(piece)]


def train_tokenizer(path: Path, seed: int) -> Tokenizer:
    """Train the tokenizer on generated text and write ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(random.Random(f"tokenizer-{seed}")), trainer)
    tokenizer.save(str(path))
    return tokenizer


def tokenizer_text(rng: random.Random) -> Iterator[str]:
    """What the tokenizer is trained on: every answer and phrasing, and a sample of what people may type."""
    for _ in range(20):
        for prompts, answer in EVERYDAY:
            yield from prompts
            yield answer
        yield from (*SYSTEM_PROMPTS, FALLBACK_ENGLISH, FALLBACK_CHINESE)
        for op in "+-":
            yield from (Sum(1, op, 2).prompt(phrasing) for phrasing in phrasings(op))
    for _ in range(3000):
        yield unknown_exchange(rng)[0]


def tokenizer_config() -> dict[str, object]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def exchange_ids(encode: Encoder, prompt: str, answer: str) -> tuple[list[int], int]:
    """One exchange in the chat format, and how many tokens at its end the model is to produce (answer and end)."""
    produced = [*encode(answer), EOS_ID]
    return [USER_ID, *encode(prompt), ASSISTANT_ID, *produced], len(produced)


def packed_row(rng: random.Random, encode: Encoder, length: int) -> tuple[list[int], list[int], list[int]]:
    """A row of whole conversations, the last one cut off: token ids, conversation numbers, 1 where loss is taken."""
    tokens: list[int] = []
    segments: list[int] = []
    learnt: list[int] = []
    sums = training_sums(rng)
    segment = 0
    while len(tokens) < length:
        segment += 1
        tokens.append(BOS_ID)
        if rng.random() < 0.15:
            tokens += encode(rng.choice(SYSTEM_PROMPTS))
        learnt += [0] * (len(tokens) - len(learnt))
        for _ in range(_choose(rng, EXCHANGES)):
            ids, produced = exchange_ids(encode, *_exchange(rng, sums))
            tokens += ids
            learnt += [0] * (len(ids) - produced) + [1] * produced
        segments += [segment] * (len(tokens) - len(segments))
    return tokens[:length], segments[:length], learnt[:length]


def _exchange(rng: random.Random, sums: Iterator[Sum]) -> tuple[str, str]:
    kind = _choose(rng, MIX)
    if kind == "everyday":
        return everyday_exchange(rng)
    if kind == "unknown":
        return unknown_exchange(rng)
    question = next(sums)
    return _vary_sum(question.prompt(rng.choice(phrasings(question.op))), rng), question.answer


def _vary_sum(prompt: str, rng: random.Random) -> str:
    """Small letters, or no punctuation at the end, some of the time."""
    if rng.random() < 0.15:
        prompt = prompt.lower()
    return prompt.rstrip("?.？。") if rng.random() < 0.15 else prompt


def _choose(rng: random.Random, weights: dict):  # type: ignore[type-arg, no-untyped-def]  # any key type
    return rng.choices(list(weights), list(weights.values()))[0]
