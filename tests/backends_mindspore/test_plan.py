"""Steps cut into parts: every token once, pieces of a sequence in order, what attention looks at."""

import numpy as np
import pytest

from deepspan.backends.base import Sampling, StepBatch
from deepspan.models.sharding import Grid

pytest.importorskip("mindspore", reason="mindspore is not installed")
from deepspan.backends.mindspore_ascend.plan import make_parts, make_shared_parts, rooms_of
from deepspan.backends.shares import share_of

BLOCK = 4


def step(query_lens, context_lens, seed=0):
    count = len(query_lens)
    width = max(-(-(q + c) // BLOCK) for q, c in zip(query_lens, context_lens, strict=True))
    tables = np.random.default_rng(seed).permutation(count * width).astype(np.int32).reshape(count, width)
    tokens = int(sum(query_lens))
    zeros = np.zeros(count, np.int32)
    return StepBatch(
        np.arange(tokens, dtype=np.int32),
        np.array(query_lens, np.int32),
        np.array(context_lens, np.int32),
        tables,
        np.ones(count, np.int32),
        Sampling(np.zeros(count, np.float32), zeros, np.ones(count, np.float32), zeros.view(np.uint32)),
    )


def slot(batch, sequence, position):
    return batch.block_tables_BM[sequence, position // BLOCK] * BLOCK + position % BLOCK


@pytest.mark.parametrize("limit", [5, 7, 1000])
def test_every_token_is_in_one_part_at_its_own_slot(limit):
    batch = step([1, 9, 2, 30, 5], [6, 0, 3, 11, 0])
    wanted = [
        (b, c + i)
        for b, (q, c) in enumerate(zip(batch.query_lens_B, batch.context_lens_B, strict=True))
        for i in range(q)
    ]
    seen = {}
    for part in make_parts(batch, BLOCK, limit):
        assert (np.diff(part.rows_P) > 0).all()
        assert not part.prefill or len(part.rows_P) <= limit
        for row, position, at in zip(part.rows_P, part.positions_P, part.slots_P, strict=True):
            sequence, wanted_position = wanted[row]
            assert (position, at) == (wanted_position, slot(batch, sequence, wanted_position))
            assert all(earlier in seen for earlier in range(row) if wanted[earlier][0] == sequence and part.prefill)
            seen[int(row)] = part
    assert sorted(seen) == list(range(len(wanted)))


def test_a_decoding_token_sees_its_own_blocks_only():
    batch = step([1, 3], [6, 0])
    (part,) = make_parts(batch, BLOCK, 100)
    tables, visible = part.view
    assert not part.prefill
    assert visible.tolist() == [7, 1, 2, 3]
    assert tables[0].tolist() == batch.block_tables_BM[0, :2].tolist()
    assert tables[1:, 1].tolist() == [0, 0, 0], "blocks past the sequence are never the table's own entries"


def test_a_piece_of_a_prompt_sees_everything_before_it():
    batch = step([8, 10], [0, 5])
    first, second = make_parts(batch, BLOCK, 12)
    slots, query_ends, key_ends = first.view
    assert query_ends.tolist() == [8, 12] and key_ends.tolist() == [8, 17]
    assert slots[8:].tolist() == [slot(batch, 1, position) for position in range(9)]
    slots, query_ends, key_ends = second.view
    assert query_ends.tolist() == [6] and key_ends.tolist() == [15]
    assert slots.tolist() == [slot(batch, 1, position) for position in range(15)]


@pytest.mark.parametrize("limit", [5, 1000])
@pytest.mark.parametrize("ranks", [1, 4])
def test_replicas_run_the_same_graphs_with_as_much_room(limit, ranks):
    batch, blocks, spare = step([1, 9, 2, 30, 5], [6, 0, 3, 11, 0]), 11, 999
    shares = [share_of(batch, 5, replica, blocks) for replica in range(5)]
    rooms = rooms_of(batch.query_lens_B, shares[0].replica_B, Grid(tp=ranks, dp=5), limit)
    parts = [list(make_shared_parts(make_parts(share.batch, BLOCK, limit), rooms, spare)) for share in shares]
    assert {len(found) for found in parts} == {len(rooms)}
    for together, room in zip(zip(*parts, strict=True), rooms, strict=True):
        counts = [len(part.positions_P) for part in together]
        assert {part.prefill for part in together} == {room.prefill}, "they meet in the operators of one graph"
        assert room.rows - ranks < max(counts) <= room.rows and room.rows % ranks == 0 and min(counts) >= 1
        for part, count in zip(together, counts, strict=True):
            assert part.spread_R.tolist() == [*range(count), *[0] * (room.rows - count)]
            assert len(part.rows_P) == count or part.slots_P.tolist() == [spare], "idle parts write where nobody reads"
    assert [sum(len(part.rows_P) for part in found) for found in parts] == shares[0].tokens
