"""What a step reads besides weights and cache, on the device.

Shape letters: T tokens of the step, A tokens in absorbed form, B sequences, Q new tokens of a sequence, M block-table
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...base import FloatArray, IntArray, StepBatch
from ..plan import ABSORBED_QUERIES

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
class Prompt:
    """A sequence in expanded form: its rows among the T, its cache blocks, and how many positions it sees."""

    rows: slice
    blocks_M: Tensor
    visible: int


@dataclass(frozen=True)
class Step:
    """``decode`` when all tokens attend in the absorbed form and alike; else what each does. int32 tensors."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    decode: Absorbed | None = None
    absorbed: tuple[Absorbed, ...] = ()
    prompts: tuple[Prompt, ...] = ()


def same_queries(batch: StepBatch) -> int | None:
    """New tokens of every sequence, when all have as many, few, and an output at each; else None."""
    queries = int(batch.query_lens_B[0])
    alike = (batch.query_lens_B == queries).all() and (batch.num_outputs_B == queries).all()
    return queries if alike and queries <= ABSORBED_QUERIES else None


def positions_and_slots(batch: StepBatch, block_size: int) -> tuple[IntArray, IntArray]:
    """Each token's position in its sequence and its slot in the flattened cache."""
    lens_B = batch.query_lens_B.astype(np.int64)
    sequence_T = np.repeat(np.arange(len(lens_B)), lens_B)
    starts_B = np.cumsum(lens_B) - lens_B
    positions_T = np.arange(len(sequence_T)) - starts_B[sequence_T] + batch.context_lens_B[sequence_T]
    blocks_T = batch.block_tables_BM[sequence_T, positions_T // block_size].astype(np.int64)
    slots_T = blocks_T * block_size + positions_T % block_size
    return positions_T.astype(np.int32), slots_T.astype(np.int32)


def mixed_step(batch: StepBatch, block_size: int, longest: int, device: torch.device) -> Step:
    """Prompts, chunks of them and decoding sequences in any mixture. Rows are padded with tokens that nobody reads."""
    positions_T, slots_T = positions_and_slots(batch, block_size)
    padding = -len(positions_T) % _MULTIPLE

    def padded(values_T: IntArray, filler: int) -> Tensor:
        return torch.from_numpy(np.pad(values_T, (0, padding), constant_values=filler)).to(device)

    lens_B = batch.query_lens_B
    return Step(
        padded(batch.token_ids_T, 0),
        padded(positions_T, 0),
        padded(slots_T, -1),
        absorbed=tuple(
            _absorbed(batch, np.flatnonzero(lens_B == queries), queries, longest, device)
            for queries in range(1, ABSORBED_QUERIES + 1)
            if (lens_B == queries).any()
        ),
        prompts=tuple(
            _prompt(batch, sequence, block_size, device) for sequence in np.flatnonzero(lens_B > ABSORBED_QUERIES)
        ),
    )


def _absorbed(
    batch: StepBatch, sequences_B: NDArray[np.int64], queries: int, longest: int, device: torch.device
) -> Absorbed:
    first_B = (np.cumsum(batch.query_lens_B) - batch.query_lens_B)[sequences_B]
    rows_A = (first_B[:, None] + np.arange(queries)).reshape(-1)
    lengths_B = (batch.context_lens_B[sequences_B] + queries).astype(np.int32)
    tables_BM = np.ascontiguousarray(batch.block_tables_BM[sequences_B])
    rows, table, lengths = (torch.from_numpy(part).to(device) for part in (rows_A, tables_BM, lengths_B))
    return Absorbed(rows, table, lengths, longest)


def _prompt(batch: StepBatch, sequence: int, block_size: int, device: torch.device) -> Prompt:
    end = int(batch.query_lens_B[: sequence + 1].sum())
    visible = int(batch.context_lens_B[sequence] + batch.query_lens_B[sequence])
    blocks_M = batch.block_tables_BM[sequence, : -(-visible // block_size)].astype(np.int64)
    return Prompt(slice(end - int(batch.query_lens_B[sequence]), end), torch.from_numpy(blocks_M).to(device), visible)


class DecodeBuffers:
    """The inputs of a decode step of fixed size, at fixed addresses: written on the host, sent in one transfer.

    Rows past the batch are padding: they write nothing, see nothing, and their tokens are not read.
    """

    def __init__(self, sequences: int, queries: int, width: int, longest: int, device: torch.device):
        self.sequences, self.queries = sequences, queries
        tokens = sequences * queries
        sizes = [tokens] * 7 + [sequences, sequences * width]
        pinned = device.type != "cpu"
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._host_parts = [part.numpy() for part in self._host.split(sizes)]
        token_ids, positions, slots, *sampling, lengths, table = self._device.split(sizes)
        decode = Absorbed(slice(None), table.view(sequences, width), lengths, longest)
        self.step = Step(token_ids, positions, slots, decode)
        temperature, top_k, top_p, seed = sampling
        self.sampling = SamplingNumbers(
            positions, temperature.view(torch.float32), top_k, top_p.view(torch.float32), seed
        )
        self._width = width

    def fill(self, batch: StepBatch, block_size: int) -> None:
        """Send ``batch`` to the device, after all that was started before."""
        tokens, sequences = len(batch.token_ids_T), len(batch.query_lens_B)
        for part, filler in zip(self._host_parts, (0, 0, -1, 0, 0, 0, 0, 0, 0), strict=True):
            part[:] = filler
        chosen = batch.sampling
        by_token = [
            batch.token_ids_T,
            *positions_and_slots(batch, block_size),
            *(
                np.repeat(values_B, self.queries).view(np.int32)
                for values_B in (chosen.temperature_B, chosen.top_k_B, chosen.top_p_B, chosen.seed_B)
            ),
        ]
        for part, values_T in zip(self._host_parts, by_token, strict=False):
            part[:tokens] = values_T
        lengths, table = self._host_parts[-2:]
        lengths[:sequences] = batch.context_lens_B + batch.query_lens_B
        used = min(self._width, batch.block_tables_BM.shape[1])
        table.reshape(self.sequences, self._width)[:sequences, :used] = batch.block_tables_BM[:, :used]
        self._device.copy_(self._host, non_blocking=True)


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


def sampling_numbers(
    batch: StepBatch, sequence_O: NDArray[np.int64], position_O: IntArray, device: torch.device
) -> SamplingNumbers:
    chosen = batch.sampling

    def send(values_O: IntArray | FloatArray | NDArray[np.uint32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values_O)).to(device)

    return SamplingNumbers(
        send(position_O),
        send(chosen.temperature_B[sequence_O]),
        send(chosen.top_k_B[sequence_O]),
        send(chosen.top_p_B[sequence_O]),
        send(chosen.seed_B[sequence_O].view(np.int32)),
    )
