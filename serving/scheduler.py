"""Which tokens of which requests run in the next step: continuous batching, first come first served."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from .blocks import BlockManager, extend_hashes
from .request import Request


@dataclass(frozen=True)
class Chunk:
    """``tokens`` tokens of a request, from position ``start`` on; the last chunk of its tokens ``yields`` a new one.

    ``output``: the chunk is one token that is not known yet, that output of the step before.
    """

    request: Request
    start: int
    tokens: int
    yields: bool
    output: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """As `backends.base.StepBatch` has them."""
        if self.output is not None:
            return [-1 - self.output]
        return self.request.token_ids[self.start : self.start + self.tokens]


class Scheduler:
    """Keeps ``running`` in order of arrival: only the last of them can be part-way through its prompt.

    A prompt gets all of its blocks when it is admitted, a running request one more whenever it fills its last. When
    there is none, the latest arrivals give theirs back and are computed anew later (preemption by recompute): the
    oldest request always progresses, so everything finishes.

    Each data-parallel replica of the model has a cache of its own, one of ``caches``. A request stays with the replica
    that it is admitted to.
    """

    def __init__(self, caches: Sequence[BlockManager], max_batch: int, max_batch_tokens: int):
        self.caches = caches
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._max_batch = max_batch
        self._max_batch_tokens = max_batch_tokens

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, at most ``max_batch`` of them and ``max_batch_tokens`` tokens together."""
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        preemptions = self.preemptions
        position = 0
        while position < len(self.running) and budget:
            request = self.running[position]
            tokens = min(len(request.token_ids) - request.computed, budget)
            if not self._grow(request, request.computed + tokens):
                continue
            chunks.append(_next_chunk(request, tokens))
            budget -= tokens
            position += 1
        return chunks + self._admitted(budget) if self.preemptions == preemptions else chunks

    def schedule_ahead(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The step after ``chunks``, which run: the token that each of them yields, or more of its prompt.

        Requests that end with the token that they wait for are left out. Nothing is preempted: the step is empty where
        blocks are lacking.
        """
        outputs = {id(chunk.request): output for output, chunk in enumerate(c for c in chunks if c.yields)}
        planned: list[tuple[Request, int, int | None]] = []
        budget = self._max_batch_tokens
        for request in self.running:
            output = outputs.get(id(request))
            if output is not None and request.computed + 1 == request.max_tokens:
                continue
            if not budget:
                break
            tokens = 1 if output is not None else min(len(request.token_ids) - request.computed, budget)
            if not self._add_blocks(request, request.computed + tokens):
                return []
            planned.append((request, tokens, output))
            budget -= tokens
        return [_next_chunk(*part) for part in planned] + self._admitted(budget)

    def publish(self, chunk: Chunk) -> None:
        """Let others share the blocks that a chunk of known tokens fills, once its step comes before theirs."""
        request, cache = chunk.request, self.caches[chunk.request.replica]
        if not cache.prefix_cache:
            return
        end = chunk.start + chunk.tokens
        extend_hashes(request.hashes, request.token_ids, end, cache.block_size)
        filled = slice(chunk.start // cache.block_size, end // cache.block_size)
        for block, identity in zip(request.blocks[filled], request.hashes[filled], strict=True):
            cache.publish(block, identity)

    def remove(self, request: Request) -> None:
        """Forget a request that finished or was aborted, whether it runs or waits."""
        if request in self.running:
            self.running.remove(request)
            self.caches[request.replica].release(request.blocks)
        else:
            self.waiting.remove(request)

    def _admitted(self, budget: int) -> list[Chunk]:
        """First chunks of requests that waited, of at most ``budget`` tokens together."""
        chunks = []
        while budget and (request := self._admit()):
            tokens = min(len(request.token_ids) - request.computed, budget)
            chunks.append(_next_chunk(request, tokens))
            budget -= tokens
        return chunks

    def _admit(self) -> Request | None:
        """Start the request that waits longest, at the replica with the least to do of those that have the blocks."""
        if not self.waiting or len(self.running) == self._max_batch:
            return None
        request = self.waiting[0]
        shared = [self._known_blocks(request, cache) for cache in self.caches]
        running = Counter(other.replica for other in self.running)
        for replica in sorted(range(len(self.caches)), key=lambda replica: (running[replica], -len(shared[replica]))):
            cache, known = self.caches[replica], shared[replica]
            blocks = cache.allocate(cache.blocks_for(len(request.token_ids)) - len(known), known)
            if blocks is not None:
                request.replica, request.blocks = replica, blocks
                request.computed = len(known) * cache.block_size
                self.running.append(self.waiting.popleft())
                return request
        return None

    def _known_blocks(self, request: Request, cache: BlockManager) -> list[int]:
        """Blocks that hold the beginning of a request already."""
        if not cache.prefix_cache:
            return []
        extend_hashes(request.hashes, request.token_ids, len(request.token_ids), cache.block_size)
        # At least one token has to be computed to get its successor.
        return cache.match(request.hashes[: (len(request.token_ids) - 1) // cache.block_size])

    def _grow(self, request: Request, tokens: int) -> bool:
        """Make room for the first ``tokens`` of a running request; False when it had to give up its own blocks."""
        while not self._add_blocks(request, tokens):
            victim = next(other for other in reversed(self.running) if other.replica == request.replica)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _add_blocks(self, request: Request, tokens: int) -> bool:
        """Make room for the first ``tokens`` of a request if enough blocks are free."""
        cache = self.caches[request.replica]
        missing = cache.blocks_for(tokens) - len(request.blocks)
        added = cache.allocate(missing) if missing > 0 else []
        request.blocks += added or []
        return added is not None

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.caches[request.replica].release(request.blocks)
        request.blocks, request.computed = [], 0
        self.waiting.appendleft(request)
        self.preemptions += 1


def _next_chunk(request: Request, tokens: int, output: int | None = None) -> Chunk:
    start = request.computed
    request.computed += tokens
    return Chunk(request, start, tokens, output is not None or request.computed == len(request.token_ids), output)
