"""What a user asks for: one prompt and how to continue it; and what the engine remembers of it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..models.errors import InputError
from .text import OutputText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled: temperature 0 is greedy, top_k 0 and top_p 1 are off; seed is a uint32."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}", "sampling", "give a number of 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}", "sampling", "give a number above 0 and up to 1")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}", "sampling", "give a count, or 0 for all tokens")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}", "sampling", "give a number below 2**32")


@dataclass(frozen=True)
class Event:
    """What one step added to one request.

    ``token_ids`` never contain the stop token. ``text`` is withheld while it may be half a character or the beginning
    of a stop string; the texts of a request's events join to its final text.
    """

    request_id: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None


@dataclass(eq=False)
class Request:
    """One request inside the engine. ``token_ids`` is the prompt and what was generated after it."""

    request_id: int
    token_ids: list[int]
    max_tokens: int  # prompt and generated tokens together
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    text: OutputText | None
    replica: int = 0  # whose cache has ``blocks``
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # identities of the leading full blocks, see `blocks`
    computed: int = 0  # leading tokens whose cache entries are in ``blocks``, or will be when the step that runs ends


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse an empty text and ids that are not in the vocabulary."""
    if not token_ids:
        raise InputError("empty prompt", "prompt", "give at least one token")
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InputError(f"token id {token_id}", "prompt", f"ids go from 0 to {vocab_size - 1}")


def request_seed(seed: int | None, token_ids: Sequence[int], repetition: int = 0) -> int:
    """The uint32 seed of one request: random for None, otherwise a digest of seed, prompt and repetition.

    The prompt itself is part of it, so that the prompts of a batch draw independently under one user seed, while each
    of them gets the same draws in any batch, at any place in it, and alone. ``repetition`` counts earlier requests
    with the same prompt in the same batch: asking twice gives two samples.
    """
    if seed is None:
        return int.from_bytes(os.urandom(4), "little")
    content = f"{seed}:{repetition}:".encode() + np.asarray(token_ids, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")
