"""A small byte-level tokenizer with DeepSeek's control tokens, written as the files of a checkpoint."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (BOS, EOS, "<｜▁pad▁｜>")
MARKUP = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
TEXTS = ["What is 12 + 34? The answer is 46.", "请介绍一下北京的景点", "hello world, hello again", "故宫 长城 天坛"]


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def write(directory: Path, **config) -> Path:
    """``tokenizer.json`` and ``tokenizer_config.json`` in ``directory``; ``config`` adds to or replaces the latter."""
    build().save(str(directory / "tokenizer.json"))
    values = {"bos_token": {"content": BOS}, "eos_token": EOS, "add_bos_token": True, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory
