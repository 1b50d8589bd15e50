"""What a step reads besides weights and cache, on the device.

Shape letters: T tokens of the step, A tokens in absorbed form, B sequences, Q new tokens of a sequence, M block-table
width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...base import IntArray, StepBatch, output_rows
from ..kernels.prompt_attention import TILE_QUERIES, Tile
from ..plan import ABSORBED_QUERIES, places_of, visible_slots
from .words import HostWords, parts_of, room_for

_MULTIPLE = 8  # rows of a step with prompts: what cuBLASLt wants of scaled operands


@dataclass(frozen=True)
class Absorbed:
    """Sequences with the same number of new tokens each, that attend in the absorbed form.

    ``rows`` are their tokens among the T; ``longest`` is a bound on ``lengths_B`` that the host knows.
    """

    rows: Tensor | slice
    table_BM: Tensor
    lengths_B: Tensor
    longest: int


@dataclass(frozen=True)
class Prompts:
    """Sequences in expanded form whose keys and values are expanded together.

    ``slots_S``: where the cache holds their positions, sequence after sequence. ``tiles_U``: int32, rows of
    `kernels.prompt_attention.Tile`, the longest work first.
    """

    slots_S: Tensor
    tiles_U: Tensor


@dataclass(frozen=True)
class Step:
    """``decode`` when all tokens attend in the absorbed form and alike; else what each does. int32 tensors.

    ``rows_O``: the outputs' rows among the T, of which the last rows from ``tokens`` on are padding; where the host
    knows.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    rows_O: Tensor | None = None
    tokens: int | None = None
    decode: Absorbed | None = None
    absorbed: tuple[Absorbed, ...] = ()
    prompts: tuple[Prompts, ...] = ()


def same_queries(batch: StepBatch) -> int | None:
    """New tokens of every sequence, when all have as many, few, and an output at each; else None."""
    queries = int(batch.query_lens_B[0])
    alike = (batch.query_lens_B == queries).all() and (batch.num_outputs_B == queries).all()
    return queries if alike and queries <= ABSORBED_QUERIES else None


def positions_and_slots(batch: StepBatch, block_size: int) -> tuple[IntArray, IntArray]:
    """Each token's position in its sequence and its slot in the flattened cache."""
    places = places_of(batch, block_size)
    return places.positions_T.astype(np.int32), places.slots_T.astype(np.int32)


def mixed_step(
    batch: StepBatch, tokens: int, block_size: int, longest: int, expanded: int, device: torch.device
) -> Step:
    """Prompts, chunks of them and decoding sequences in any mixture. Rows are padded with tokens that nobody reads.

    ``tokens``: at least so many rows; ``longest`` bounds a sequence's tokens; ``expanded`` positions have keys and
    values of all heads at a time, or one sequence.
    """
    positions_T, slots_T = positions_and_slots(batch, block_size)
    padding = -(-tokens // _MULTIPLE) * _MULTIPLE - len(positions_T)

    def padded(values_T: IntArray, filler: int) -> IntArray:
        return np.pad(values_T, (0, padding), constant_values=filler)

    lens_B = batch.query_lens_B
    absorbed = [
        absorbed_arrays(batch, np.flatnonzero(lens_B == queries), queries)
        for queries in range(1, ABSORBED_QUERIES + 1)
        if (lens_B == queries).any()
    ]
    prompts = [prompt_arrays(batch, group, block_size) for group in _groups_of_prompts(batch, expanded)]
    rows_O, _, _ = output_rows(batch)
    common = padded(batch.token_ids_T, 0), padded(positions_T, 0), padded(slots_T, -1), rows_O
    sent = iter(send_together([*common, *itertools.chain(*absorbed, *prompts)], device))
    return Step(
        token_ids_T=next(sent),
        positions_T=next(sent),
        slots_T=next(sent),
        rows_O=next(sent),
        tokens=len(positions_T),
        absorbed=tuple(Absorbed(next(sent), next(sent), next(sent), longest) for _ in absorbed),
        prompts=tuple(Prompts(next(sent), next(sent)) for _ in prompts),
    )


def send_together(arrays: Sequence[NDArray], device: torch.device) -> list[Tensor]:
    """Integers and FP32 numbers, as 32-bit tensors on the device after one transfer, for which nobody waits."""
    parts = [np.ascontiguousarray(part, np.float32 if part.dtype.kind == "f" else np.int32) for part in arrays]
    counts = [part.size for part in parts]
    words = torch.empty(room_for(counts), dtype=torch.int32, pin_memory=device.type != "cpu")
    for part, room in zip(parts, parts_of(words, counts), strict=True):
        room.numpy()[:] = part.reshape(-1).view(np.int32)
    sent = parts_of(words.to(device, non_blocking=True), counts)
    types = [torch.float32 if part.dtype.kind == "f" else torch.int32 for part in parts]
    return [found.view(kind).view(part.shape) for part, found, kind in zip(parts, sent, types, strict=True)]


def absorbed_arrays(batch: StepBatch, sequences_B: NDArray[np.int64], queries: int) -> tuple[NDArray, NDArray, NDArray]:
    """Rows, tables and lengths of `Absorbed`."""
    first_B = (np.cumsum(batch.query_lens_B) - batch.query_lens_B)[sequences_B]
    rows_A = (first_B[:, None] + np.arange(queries)).reshape(-1)
    return rows_A, batch.block_tables_BM[sequences_B], batch.context_lens_B[sequences_B] + queries


def _groups_of_prompts(batch: StepBatch, limit: int) -> list[list[int]]:
    """Sequences with many new tokens, as many together as have ``limit`` positions, but at least one."""
    groups: list[list[int]] = []
    room = 0
    for sequence in np.flatnonzero(batch.query_lens_B > ABSORBED_QUERIES).tolist():
        visible = int(batch.context_lens_B[sequence] + batch.query_lens_B[sequence])
        if not groups or visible > room:
            groups.append([])
            room = limit
        groups[-1].append(sequence)
        room -= visible
    return groups


def prompt_arrays(batch: StepBatch, sequences: list[int], block_size: int) -> tuple[NDArray, NDArray]:
    """Slots and tiles of `Prompts`."""
    rows_B = np.cumsum(batch.query_lens_B) - batch.query_lens_B
    slots: list[NDArray[np.int64]] = []
    tiles = []
    start = 0
    for sequence in sequences:
        context, queries = int(batch.context_lens_B[sequence]), int(batch.query_lens_B[sequence])
        slots.append(visible_slots(batch, sequence, block_size))
        for first in range(0, queries, TILE_QUERIES):
            count = min(TILE_QUERIES, queries - first)
            tiles.append(Tile(int(rows_B[sequence]) + first, count, start, context + first))
        start += context + queries
    tiles.sort(key=lambda tile: tile.position, reverse=True)
    return np.concatenate(slots), np.array(tiles)


class DecodeBuffers:
    """The inputs of a decode step of fixed size, at fixed addresses on the device."""

    def __init__(self, sequences: int, queries: int, width: int, longest: int, device: torch.device):
        self.queries, self.device = queries, device
        tokens = self.outputs = sequences * queries
        self._sizes = [tokens] * 7 + [sequences, sequences * width, 1]
        self._held = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        token_ids, positions, slots, *sampling, lengths, table, self.turn = self._held.split(self._sizes)
        slots.fill_(-1)  # a first run, before there are inputs, writes nothing
        decode = Absorbed(slice(None), table.view(sequences, width), lengths, longest)
        self.step = Step(token_ids, positions, slots, decode=decode)
        self.sampling = SamplingNumbers.of_words(positions, *sampling)

    def host(self, turn: int) -> HostInputs:
        """Room for them on the host, which tells the device whose ``turn`` it is."""
        return HostInputs(self._held, self._sizes, self.queries, turn)


class HostInputs(HostWords):
    """The inputs of a decode step on the host.

    Rows past the batch are padding: they write nothing, see nothing, and their tokens are not read.
    """

    def __init__(self, device_words: Tensor, sizes: list[int], queries: int, turn: int):
        super().__init__(device_words)
        self._queries = queries
        parts = [part.numpy() for part in self._words.split(sizes)]
        self._token_ids_T, self._positions_T, self._slots_T = parts[:3]
        self._sampling_T = parts[3:7]
        self._lengths_B, self._table_BM = parts[7], parts[8].reshape(sizes[7], -1)
        self._slots_T[:] = -1
        parts[9][:] = turn
        self._filled = 0

    def fill(self, batch: StepBatch, block_size: int) -> None:
        """Take ``batch``. What was sent before must have arrived."""
        tokens, sequences = len(batch.token_ids_T), len(batch.query_lens_B)
        self._token_ids_T[:tokens] = batch.token_ids_T
        self._positions_T[:tokens], self._slots_T[:tokens] = positions_and_slots(batch, block_size)
        self._token_ids_T[tokens : self._filled] = 0
        self._slots_T[tokens : self._filled] = -1
        self._lengths_B[:sequences] = batch.context_lens_B + batch.query_lens_B
        self._lengths_B[sequences:] = 0
        self._filled = tokens
        width = min(self._table_BM.shape[1], batch.block_tables_BM.shape[1])
        self._table_BM[:sequences, :width] = batch.block_tables_BM[:, :width]
        chosen = batch.sampling
        if (chosen.temperature_B > 0).any():  # otherwise nothing reads the numbers
            numbers = chosen.temperature_B, chosen.top_k_B, chosen.top_p_B, chosen.seed_B
            for part, values_B in zip(self._sampling_T, numbers, strict=True):
                part[:tokens] = np.repeat(values_B, self._queries).view(np.int32)


@dataclass(frozen=True)
class SamplingNumbers:
    """Of each output; see `base.Sampling`. ``position_O`` is that of the last token before the sampled one.

    Integers are int32; a seed's 32 bits are read as unsigned.
    """

    position_O: Tensor
    temperature_O: Tensor
    top_k_O: Tensor
    top_p_O: Tensor
    seed_O: Tensor

    @classmethod
    def of_words(
        cls, position_O: Tensor, temperature_O: Tensor, top_k_O: Tensor, top_p_O: Tensor, seed_O: Tensor
    ) -> SamplingNumbers:
        """All of them int32, FP32 numbers by their bits."""
        return cls(position_O, temperature_O.view(torch.float32), top_k_O, top_p_O.view(torch.float32), seed_O)


def sampling_numbers(batch: StepBatch, device: torch.device) -> SamplingNumbers:
    """Of a step's outputs."""
    return SamplingNumbers(*send_together(sampling_arrays(batch), device))


def sampling_arrays(batch: StepBatch) -> list[NDArray]:
    """Of a step's outputs, in the order of `SamplingNumbers`."""
    chosen = batch.sampling
    _, sequence_O, position_O = output_rows(batch)
    by_sequence = chosen.temperature_B, chosen.top_k_B, chosen.top_p_B, chosen.seed_B.view(np.int32)
    return [position_O, *(values_B[sequence_O] for values_B in by_sequence)]
