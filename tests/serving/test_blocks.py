"""Who owns which block: a model of the rules, driven by random operations."""

import numpy as np
import pytest

from deepspan.serving.blocks import BlockManager, extend_hashes


def chain(tokens, size=4):
    hashes = []
    extend_hashes(hashes, tokens, len(tokens), size)
    return hashes


def test_hashes_identify_the_whole_prefix_and_full_blocks_only():
    assert len(chain(range(11))) == 2
    assert chain(range(8)) == chain(range(11))
    assert chain([9, 1, 2, 3, 4, 5, 6, 7])[1] != chain(range(8))[1]
    grown = []
    for count in range(12):
        extend_hashes(grown, range(12), count, 4)
    assert grown == chain(range(11))


def test_published_blocks_are_found_shared_and_evicted_oldest_first():
    manager = BlockManager(4, 4)
    hashes = chain(range(12))
    blocks = manager.allocate(3)
    for block, identity in zip(blocks, hashes, strict=True):
        manager.publish(block, identity)
    manager.release(blocks)
    assert manager.free_blocks == 4
    assert manager.match(hashes) == blocks
    shared = manager.allocate(1, manager.match(hashes[:2]))
    assert shared[:2] == blocks[:2] and shared[2] not in blocks
    assert manager.allocate(2) is None
    assert manager.allocate(1) == [blocks[2]]  # evicts the only cached one
    assert manager.match(hashes) == blocks[:2]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    manager = BlockManager(3, 4)
    hashes = chain(range(12))
    blocks = manager.allocate(3)
    for block, identity in zip(blocks, hashes, strict=True):
        manager.publish(block, identity)
    manager.release(blocks)
    assert manager.allocate(1) == [blocks[2]]
    assert manager.match(hashes) == blocks[:2]


def test_shared_blocks_that_were_cached_do_not_count_as_free():
    manager = BlockManager(2, 4)
    blocks = manager.allocate(2)
    hashes = chain(range(8))
    for block, identity in zip(blocks, hashes, strict=True):
        manager.publish(block, identity)
    manager.release(blocks)
    assert manager.allocate(1, blocks) is None
    assert manager.free_blocks == 2
    assert manager.allocate(1, blocks[:1]) == [blocks[0], blocks[1]]


def test_releasing_twice_is_a_bug_that_shows():
    manager = BlockManager(2, 4)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="released"):
        manager.release(blocks)


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_every_block_accounted_for(seed):
    rng = np.random.default_rng(seed)
    manager = BlockManager(12, 2)
    held = []
    for _ in range(400):
        if held and rng.random() < 0.45:
            manager.release(held.pop(rng.integers(len(held)))[0])
            continue
        tokens = rng.integers(0, 2, size=rng.integers(1, 9)).tolist()
        hashes = chain(tokens, 2)
        shared = manager.match(hashes)
        blocks = manager.allocate(-(-len(tokens) // 2) - len(shared), shared)
        if blocks is None:
            continue
        for block, identity in zip(blocks, hashes, strict=False):
            manager.publish(block, identity)
        held.append((blocks, tokens))
        used = {block for blocks, _ in held for block in blocks}
        assert manager.free_blocks == manager.num_blocks - len(used)
        prefix_of = {}
        for owned, content in held:  # the same block is only ever the same prefix
            for index, block in enumerate(owned):
                full = len(content) >= 2 * (index + 1)
                key = tuple(content[: 2 * (index + 1)]) if full else ("partial", id(owned))
                assert prefix_of.setdefault(block, key) == key
