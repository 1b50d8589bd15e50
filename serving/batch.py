"""Whole batches: prompts in, completions out in the same order; and the logits of a given text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backends.base import FloatArray, Runner, Sampling, StepBatch
from ..models.errors import InputError
from .engine import Engine
from .request import Event, FinishReason, SamplingParams, request_seed


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue every prompt of a batch. ``seed`` is the user's: `request_seed` makes each prompt's from it."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_new_tokens: int = 512
    stop_token_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()

    def sampling(self, token_ids: Sequence[int], repetition: int = 0) -> SamplingParams:
        """The sampling numbers of one prompt."""
        seed = request_seed(self.seed, token_ids, repetition)
        return SamplingParams(self.temperature, self.top_p, self.top_k, seed)


@dataclass
class Completion:
    """What came after one prompt; the stop token is not among ``token_ids``."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


def complete(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Completion]:
    """Continue every prompt. A prompt that can never run raises InputError before any of them starts."""
    completions: dict[int, Completion] = {}
    repetitions: Counter[tuple[int, ...]] = Counter()
    try:
        for number, token_ids in enumerate(prompts, 1):
            key = tuple(token_ids)
            try:
                request_id = engine.add_request(
                    token_ids,
                    options.sampling(token_ids, repetitions[key]),
                    options.max_new_tokens,
                    options.stop_token_ids,
                    options.stop_strings,
                )
            except InputError as error:
                raise InputError(error.what, f"prompt {number} of {len(prompts)}: {error.where}", error.todo) from None
            repetitions[key] += 1
            completions[request_id] = Completion(len(token_ids))
        while engine.has_work:
            for event in engine.step():
                completion = completions[event.request_id]
                completion.token_ids += event.token_ids
                completion.text += event.text
                completion.finish_reason = event.finish_reason
                on_event(event)
    except BaseException:
        for request_id in completions:
            engine.abort(request_id)
        raise
    return list(completions.values())


def prompt_logits(runner: Runner, token_ids: Sequence[int], chunk: int) -> FloatArray:
    """float32 [tokens, vocab]: after every token of the text, the logits of the next ("teacher-forced").

    Writes the first blocks of the runner's cache, so no engine may be using it. ``chunk`` tokens run in a step.
    """
    blocks = -(-len(token_ids) // runner.block_size)
    if blocks > runner.kv_blocks:
        limit = runner.kv_blocks * runner.block_size
        raise InputError(f"text of {len(token_ids)} tokens", f"KV cache of {limit} tokens", "raise engine.max_seq_len")
    parts = []
    for start in range(0, len(token_ids), chunk):
        part = np.asarray(token_ids[start : start + chunk], np.int32)
        batch = StepBatch(
            token_ids_T=part,
            query_lens_B=np.array([len(part)], np.int32),
            context_lens_B=np.array([start], np.int32),
            block_tables_BM=np.arange(blocks, dtype=np.int32)[None],
            num_outputs_B=np.array([len(part)], np.int32),
            sampling=greedy_sampling(1),
            return_logits=True,
        )
        logits_OV = runner.step(batch).logits_OV
        assert logits_OV is not None, "return_logits was set"
        parts.append(logits_OV)
    return np.concatenate(parts)


def greedy_sampling(count: int) -> Sampling:
    """Sampling numbers of ``count`` greedy sequences."""
    return Sampling(
        temperature_B=np.zeros(count, np.float32),
        top_k_B=np.zeros(count, np.int32),
        top_p_B=np.ones(count, np.float32),
        seed_B=np.zeros(count, np.uint32),
    )
