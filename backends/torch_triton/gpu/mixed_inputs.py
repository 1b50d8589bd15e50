"""The inputs of steps with prompts, padded to sizes that come again.

What is padded repeats what is there: an output, a tile of queries or a decoding sequence that is computed twice is
written twice with the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...base import StepBatch, output_rows
from ..kernels.prompt_attention import TILE_QUERIES, Tile
from ..kernels.sizes import power_of_2
from ..plan import ABSORBED_QUERIES
from .inputs import (
    Absorbed,
    Prompts,
    SamplingNumbers,
    Step,
    absorbed_arrays,
    positions_and_slots,
    prompt_arrays,
    sampling_arrays,
)
from .words import HostWords, parts_of, room_for

_LEAST = 16


class MixedSize(NamedTuple):
    """``positions``: of the prompts and what is cached before them. ``decoding``: sequences with one new token."""

    tokens: int
    positions: int
    decoding: int
    prompts: int

    @property
    def outputs(self) -> int:
        return self.decoding + self.prompts

    @property
    def tiles(self) -> int:
        """Of queries, at most."""
        return self.tokens // TILE_QUERIES + self.prompts


def mixed_size(batch: StepBatch, longest: int, expanded: int) -> MixedSize | None:
    """The size that holds ``batch``, of at most ``longest`` tokens; None if none does. ``expanded`` positions have keys
    and values at a time.
    """
    lens_B = batch.query_lens_B
    is_prompt_B, is_decoding_B = lens_B > ABSORBED_QUERIES, lens_B == 1
    tokens, positions = len(batch.token_ids_T), int((batch.context_lens_B + lens_B)[is_prompt_B].sum())
    alike = (is_prompt_B | is_decoding_B).all() and (batch.num_outputs_B <= 1).all()
    if not is_prompt_B.any() or not alike or tokens > longest or positions > min(expanded, 2 * longest):
        return None
    decoding, prompts = int(is_decoding_B.sum()), int(is_prompt_B.sum())
    rows = _padded(tokens)
    return MixedSize(rows, max(rows, _padded(positions)), power_of_2(decoding) if decoding else 0, power_of_2(prompts))


def _padded(count: int) -> int:
    """A multiple of a sixteenth of the next power of two: at most an eighth more, of few tokens up to 15 more."""
    step = max(_LEAST, power_of_2(count) // 16)
    return -(-count // step) * step


class MixedBuffers:
    """The inputs of a step of ``size``, at fixed addresses on the device; ``width``: blocks of a sequence."""

    def __init__(self, size: MixedSize, width: int, longest: int, device: torch.device):
        self.device, self.outputs = device, size.outputs
        decoding, outputs = size.decoding, size.outputs
        self._counts = [
            *[size.tokens] * 3, outputs, decoding, decoding * width, decoding, size.positions, 4 * size.tiles,
            *[outputs] * 5, 1,
        ]  # fmt: skip
        self._held = torch.zeros(room_for(self._counts), dtype=torch.int32, device=device)
        parts = parts_of(self._held, self._counts)
        token_ids, positions, slots, rows_O, rows_A, table, lengths, prompt_slots, tiles, *sampling, self.turn = parts
        tiles_U = tiles.view(-1, 4)
        slots.fill_(-1)  # a first run, before there are inputs, writes nothing,
        tiles_U[:, Tile._fields.index("queries")] = 1  # and no kernel takes a tile of no queries
        absorbed = Absorbed(rows_A, table.view(decoding, width), lengths, longest)
        prompts = Prompts(prompt_slots, tiles_U)
        self.step = Step(
            token_ids, positions, slots, rows_O, absorbed=(absorbed,) if decoding else (), prompts=(prompts,)
        )
        self.sampling = SamplingNumbers.of_words(*sampling)

    def host(self, turn: int) -> MixedInputs:
        """Room for them on the host, which tells the device whose ``turn`` it is."""
        return MixedInputs(self._held, self._counts, turn)


class MixedInputs(HostWords):
    """The inputs of such a step on the host."""

    def __init__(self, device_words: Tensor, counts: list[int], turn: int):
        super().__init__(device_words)
        self._parts = [part.numpy() for part in parts_of(self._words, counts)]
        self._parts[-1][:] = turn

    def fill(self, batch: StepBatch, block_size: int) -> None:
        """Take ``batch``. What was sent before must have arrived."""
        token_ids, positions, slots, rows, rows_A, table, lengths, prompt_slots, tiles, *sampling, _ = self._parts
        positions_T, slots_T = positions_and_slots(batch, block_size)
        _put(token_ids, batch.token_ids_T, 0)
        _put(positions, positions_T, 0)
        _put(slots, slots_T, -1)
        rows_O, _, _ = output_rows(batch)
        _repeat(rows, rows_O)
        decoding_B = np.flatnonzero(batch.query_lens_B == 1)
        if len(decoding_B):
            row_A, table_BM, length_B = absorbed_arrays(batch, decoding_B, 1)
            _repeat(rows_A, row_A)
            _repeat(lengths, length_B)
            table_DM = table.reshape(len(lengths), -1)
            width = min(table_DM.shape[1], table_BM.shape[1])
            _repeat(table_DM[:, :width], table_BM[:, :width])
        prompts_B = np.flatnonzero(batch.query_lens_B > ABSORBED_QUERIES)
        slots_S, tiles_U = prompt_arrays(batch, prompts_B.tolist(), block_size)
        _repeat(prompt_slots, slots_S)
        _repeat(tiles.reshape(-1, 4), tiles_U)
        for part, values_O in zip(sampling, sampling_arrays(batch), strict=True):
            _repeat(part, values_O.view(np.int32))


def _put(room: NDArray[np.int32], values: NDArray, filler: int) -> None:
    room[: len(values)] = values
    room[len(values) :] = filler


def _repeat(room: NDArray[np.int32], values: NDArray) -> None:
    """``values``, and the last of them again; nobody reads the room of none."""
    if len(values):
        _put(room, values, values[-1])
