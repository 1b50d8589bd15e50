"""KV-block bookkeeping: who owns which cache block, and which full blocks can be used again.

A block is identified by everything up to its end: its own tokens and the identity of the block before it. Equal
identities therefore mean equal cache contents. Only full blocks get an identity, so a shared block is never written to.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], count: int, block_size: int) -> None:
    """Append to ``hashes`` the identities that it lacks of the full blocks of the first ``count`` tokens.

    A cryptographic digest, because a collision would silently serve one user's context to another.
    """
    for start in range(len(hashes) * block_size, count - block_size + 1, block_size):
        tokens = np.asarray(token_ids[start : start + block_size], "<i8").tobytes()
        previous = hashes[-1] if hashes else b""
        hashes.append(hashlib.blake2b(previous + tokens, digest_size=16).digest())


class BlockManager:
    """Allocation with reference counts, prefix reuse and least-recently-used eviction.

    A block is in one of three states: used (one or more references), cached (no reference, contents can be found
    again by identity until the block is evicted) or empty. Blocks are numbered from ``first`` on.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True, first: int = 0):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._empty = list(range(first, first + num_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._references = dict.fromkeys(self._empty, 0)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._empty) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of the chain ``hashes``; takes no reference."""
        blocks = []
        for identity in hashes:
            if identity not in self._block_of:
                break
            blocks.append(self._block_of[identity])
        return blocks

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """References to ``shared`` blocks (from `match`) and ``count`` more of unknown content, as one list.

        None, and no change, when there are not enough free blocks.
        """
        revived = sum(block in self._cached for block in shared)
        if count > self.free_blocks - revived:
            return None
        for block in shared:
            self._cached.pop(block, None)
            self._references[block] += 1
        return [*shared, *(self._allocate_one() for _ in range(count))]

    def _allocate_one(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block

    def publish(self, block: int, identity: bytes) -> None:
        """Make a full block known once its contents are computed.

        When another block has the same contents already, that one stays the known one.
        """
        if identity not in self._block_of and block not in self._hash_of:
            self._block_of[identity] = block
            self._hash_of[block] = identity

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each. A sequence's end is evicted before its beginning, which more prompts share."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than taken"
            if self._references[block] == 0 and block in self._hash_of:
                self._cached[block] = None
            elif self._references[block] == 0:
                self._empty.append(block)
