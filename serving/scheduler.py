"""Which tokens of which requests run in the next step: continuous batching, first come first served."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .blocks import BlockManager, extend_hashes
from .request import Request


@dataclass(frozen=True)
class Chunk:
    """The next ``tokens`` uncomputed tokens of a request; the last chunk of its tokens yields a new one."""

    request: Request
    tokens: int

    @property
    def is_last(self) -> bool:
        return self.request.computed + self.tokens == len(self.request.token_ids)


class Scheduler:
    """Keeps ``running`` in order of arrival: only the last of them can be part-way through its prompt.

    A prompt gets all of its blocks when it is admitted, a running request one more whenever it fills its last. When
    there is none, the latest arrivals give theirs back and are computed anew later (preemption by recompute): the
    oldest request always progresses, so everything finishes.
    """

    def __init__(self, blocks: BlockManager, max_batch: int, max_batch_tokens: int):
        self.blocks = blocks
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
                break
            chunks.append(Chunk(request, tokens))
            budget -= tokens
            position += 1
        while budget and self.preemptions == preemptions and (admitted := self._admit()):
            tokens = min(len(admitted.token_ids) - admitted.computed, budget)
            chunks.append(Chunk(admitted, tokens))
            budget -= tokens
        return chunks

    def advance(self, chunk: Chunk) -> None:
        """Note that the chunk's cache entries exist now, and let others share the blocks that became full."""
        request, size = chunk.request, self.blocks.block_size
        full_before = request.computed // size
        request.computed += chunk.tokens
        if not self.blocks.prefix_cache:
            return
        full = request.computed // size
        extend_hashes(request.hashes, request.token_ids, request.computed, size)
        for block, identity in zip(request.blocks[full_before:full], request.hashes[full_before:full], strict=True):
            self.blocks.publish(block, identity)

    def remove(self, request: Request) -> None:
        """Forget a request that finished or was aborted, whether it runs or waits."""
        if request in self.running:
            self.running.remove(request)
            self.blocks.release(request.blocks)
        else:
            self.waiting.remove(request)

    def _admit(self) -> Request | None:
        if not self.waiting or len(self.running) == self._max_batch:
            return None
        request = self.waiting[0]
        shared: list[int] = []
        if self.blocks.prefix_cache:
            extend_hashes(request.hashes, request.token_ids, len(request.token_ids), self.blocks.block_size)
            # At least one token has to be computed to get its successor.
            shared = self.blocks.match(request.hashes[: (len(request.token_ids) - 1) // self.blocks.block_size])
        needed = self.blocks.blocks_for(len(request.token_ids))
        blocks = self.blocks.allocate(needed - len(shared), shared)
        if blocks is None:
            return None
        request.blocks = blocks
        request.computed = len(shared) * self.blocks.block_size
        self.running.append(self.waiting.popleft())
        return request

    def _grow(self, request: Request, tokens: int) -> bool:
        """Make room for the first ``tokens`` of a running request; False when it had to give up its own blocks."""
        missing = self.blocks.blocks_for(tokens) - len(request.blocks)
        if missing <= 0:
            return True
        while (added := self.blocks.allocate(missing)) is None:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks += added
        return True

    def _preempt(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        request.blocks, request.computed = [], 0
        self.waiting.appendleft(request)
        self.preemptions += 1
