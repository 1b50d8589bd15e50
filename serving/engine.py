"""The engine: requests in, events out, one forward step of a Runner at a time.

What a request yields depends on its own tokens, sampling numbers and seed only: the scheduler decides when a token is
computed, never which one it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..backends.base import Runner, Sampling, StepBatch, StepResult, starts_ahead
from ..models.errors import InputError
from .blocks import BlockManager
from .prompt import Tokenizer
from .request import Event, FinishReason, Request, SamplingParams, check_token_ids
from .scheduler import Chunk, Scheduler
from .text import OutputText


@dataclass(frozen=True)
class EngineLimits:
    """The ``engine`` section of a run, as far as it is decided above the seam; ``replicas`` is ``parallel.dp``."""

    max_batch: int
    max_seq_len: int
    max_batch_tokens: int
    prefix_cache: bool = True
    speculative_tokens: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class _Running:
    """A step that was started, or will be when its result is asked for."""

    chunks: list[Chunk]
    result: Callable[[], StepResult]


class Engine:
    """Continuous batching over one Runner. Without a tokenizer, events carry token ids and no text."""

    def __init__(self, runner: Runner, vocab_size: int, limits: EngineLimits, tokenizer: Tokenizer | None = None):
        if limits.speculative_tokens:
            raise InputError("speculation is not supported yet", "engine.speculative_tokens", "set it to 0")
        self._runner = runner
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        blocks = runner.kv_blocks // limits.replicas
        caches = [
            BlockManager(blocks, runner.block_size, limits.prefix_cache, first=blocks * replica)
            for replica in range(limits.replicas)
        ]
        self.scheduler = Scheduler(caches, limits.max_batch, limits.max_batch_tokens)
        cache_tokens = blocks * runner.block_size
        self._limit_name = "engine.max_seq_len" if limits.max_seq_len <= cache_tokens else "tokens in the KV cache"
        self.max_tokens = min(limits.max_seq_len, cache_tokens)
        self._requests: dict[int, Request] = {}
        self._ahead: _Running | None = None
        self._ids = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def add_request(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        max_new_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        stop_strings: Sequence[str] = (),
    ) -> int:
        """Queue one prompt and return the id that its events carry.

        Generation ends at a stop token or string ("stop"), or at ``max_new_tokens`` or the longest sequence that the
        run allows ("length"). Raises InputError, and changes nothing, for a prompt that can never run.
        """
        self._check(token_ids, max_new_tokens, stop_strings)
        text = OutputText(self._tokenizer.decode, stop_strings) if self._tokenizer else None
        request = Request(
            request_id=next(self._ids),
            token_ids=list(token_ids),
            max_tokens=min(len(token_ids) + max_new_tokens, self.max_tokens),
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            text=text,
        )
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        return request.request_id

    def abort(self, request_id: int) -> None:
        """Forget a request; one that is finished or unknown is ignored, as it may have ended meanwhile."""
        if request := self._requests.pop(request_id, None):
            self.scheduler.remove(request)

    def step(self) -> list[Event]:
        """Run one forward step; the events of the requests that got a token in it, in order of arrival.

        A runner that can is given the step after it, too, before this one ends. A request that ends meanwhile is in
        that step for nothing.
        """
        running = self._ahead or self._start(self.scheduler.schedule())
        self._ahead = None
        if running is None:
            return []
        if starts_ahead(self._runner):
            self._ahead = self._start(self.scheduler.schedule_ahead(running.chunks))
        tokens = iter(running.result().token_ids_O.tolist())
        events = []
        for chunk in running.chunks:
            token_id = next(tokens) if chunk.yields else None
            if chunk.request.request_id not in self._requests:
                continue
            if chunk.output is not None:  # its token was not known before
                self.scheduler.publish(chunk)
            if token_id is not None:
                events.append(self._accept(chunk.request, token_id))
        return events

    def _start(self, chunks: list[Chunk]) -> _Running | None:
        if not chunks:
            return None
        batch = step_batch(chunks)
        result: Callable[[], StepResult] = partial(self._runner.step, batch)
        if starts_ahead(self._runner):
            result = self._runner.start(batch).result
        for chunk in chunks:
            if chunk.output is None:
                self.scheduler.publish(chunk)  # steps run in order: whoever shares these blocks reads them later
        return _Running(chunks, result)

    def _accept(self, request: Request, token_id: int) -> Event:
        """Add a sampled token to its request, or end the request."""
        new, text, reason = self._continue(request, token_id)
        if reason:
            self.abort(request.request_id)
        return Event(request.request_id, new, text, reason)

    def _continue(self, request: Request, token_id: int) -> tuple[tuple[int, ...], str, FinishReason | None]:
        output = request.text
        if token_id in request.stop_token_ids:
            return (), output.flush() if output else "", "stop"
        request.token_ids.append(token_id)
        text = output.push(token_id) if output else ""
        if output and output.stopped:
            return (token_id,), text, "stop"
        if len(request.token_ids) < request.max_tokens:
            return (token_id,), text, None
        text += output.flush() if output else ""
        return (token_id,), text, "stop" if output and output.stopped else "length"

    def _check(self, token_ids: Sequence[int], max_new_tokens: int, stop_strings: Sequence[str]) -> None:
        check_token_ids(token_ids, self._vocab_size)
        if len(token_ids) >= self.max_tokens:
            raise InputError(
                f"prompt of {len(token_ids)} tokens is too long",
                f"{self._limit_name} = {self.max_tokens}",
                "shorten it to leave room for an answer, or raise engine.max_seq_len",
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}", "sampling", "give 1 or more")
        if stop_strings and self._tokenizer is None:
            raise InputError("stop strings without a tokenizer", "sampling.stop", "give model.tokenizer")


def step_batch(chunks: Sequence[Chunk]) -> StepBatch:
    """The arrays of one step: each request's next tokens, its blocks, and one output where its tokens are complete."""
    requests = [chunk.request for chunk in chunks]
    tables_BM = np.zeros((len(chunks), max(len(request.blocks) for request in requests)), np.int32)
    for row_M, request in zip(tables_BM, requests, strict=True):
        row_M[: len(request.blocks)] = request.blocks
    return StepBatch(
        token_ids_T=np.asarray([token_id for chunk in chunks for token_id in chunk.token_ids], np.int32),
        query_lens_B=np.asarray([chunk.tokens for chunk in chunks], np.int32),
        context_lens_B=np.asarray([chunk.start for chunk in chunks], np.int32),
        block_tables_BM=tables_BM,
        num_outputs_B=np.asarray([chunk.yields for chunk in chunks], np.int32),
        sampling=Sampling(
            temperature_B=np.asarray([request.sampling.temperature for request in requests], np.float32),
            top_k_B=np.asarray([request.sampling.top_k for request in requests], np.int32),
            top_p_B=np.asarray([request.sampling.top_p for request in requests], np.float32),
            seed_B=np.asarray([request.sampling.seed for request in requests], np.uint32),
        ),
    )
