"""The seam between what is written once (prompts, scheduling, KV blocks, stop conditions) and the backends.

The seam is the whole model. What crosses it is numpy: token ids, block tables and sampling numbers go in; token ids,
and logits when asked for, come out. Hidden states never cross, so neither side sees the other's tensor type.

Shape letters: T tokens of the step over all sequences, B sequences, O outputs (sampled positions), M block-table width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..configs.schema import RunConfig
from ..models.holding import Held, held_as
from ..models.quant import StoredInt4
from ..models.spec import ModelSpec

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class Weights(Protocol):
    """Where a runner loads from: a checkpoint of any stored format, or random numbers. Canonical (HF) names."""

    @property
    def has_mtp(self) -> bool:
        """False when the source lacks the multi-token-prediction layers as a whole, which is legal."""

    def names(self) -> Iterable[str]:
        """Every parameter that ``read`` accepts."""

    def read(
        self, name: str, dtype: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> NDArray:
        """The logical [out, in] values, or a slice: float32 for dtype "f32", uint16 bit patterns for "bf16"."""

    def format(self, name: str) -> str:
        """How a parameter is stored: `convert.storage.Stored.format` lists the values."""

    def group_size(self, name: str) -> int | None:
        """Input channels that share a scale in a weight that is stored in a 4-bit format, else None."""

    def fp8_blocks(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.uint8], FloatArray] | None:
        """Codes (e4m3fn) and multipliers of 128 x 128 blocks of a weight that is stored so, or of a slice of it.

        None when it is stored otherwise, or the slice cuts a block.
        """

    def int8_channels(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.int8], FloatArray] | None:
        """Signed codes [out, in], or a slice, and multipliers [out] of a weight that is stored so, else None."""

    def int8_blocks(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> tuple[NDArray[np.int8], FloatArray] | None:
        """As `fp8_blocks`, with signed codes."""

    def int4(
        self, name: str, rows: tuple[int, int] | None = None, cols: tuple[int, int] | None = None
    ) -> StoredInt4 | None:
        """The stored words of a weight in a 4-bit format, or of a slice of it, else None."""

    def static_input(
        self, name: str, rows: tuple[int, int] | None = None
    ) -> tuple[float, int, NDArray[np.int32] | None] | None:
        """How the checkpoint maps a weight's inputs to INT8: clip(round(x / scale + offset), -128, 127).

        The scale, the offset, and what is added to the sums of products [out] for it; None there when that follows from
        the codes: -offset times their sum. None when activations are quantised as they come.
        """


def stored_as(run: RunConfig, weights: Weights) -> dict[str, Held]:
    """How each parameter would be held as it is stored. Random weights are not: they are made in the run's format."""
    if run.model.weights == "random":
        return {}
    return {name: held_as(weights.format(name), weights.group_size(name)) for name in weights.names()}


@dataclass(frozen=True)
class Sampling:
    """How each sequence is sampled. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    Noise is a hash of (seed, position, token id), see `models.sampling`: a request's tokens depend on its own logits
    and seed only, not on the batch it runs in, and are the same on every backend that gives the same logits.
    """

    temperature_B: FloatArray
    top_k_B: IntArray
    top_p_B: FloatArray
    seed_B: NDArray[np.uint32]


@dataclass(frozen=True)
class StepBatch:
    """One forward step over a ragged batch of sequences, each with at least one new token.

    ``token_ids_T`` holds the new tokens of all sequences one after the other, ``query_lens_B`` of them each, at the
    positions ``context_lens_B[b] + 0, 1, …``: the context is what the cache already holds. ``block_tables_BM`` maps the
    sequence's position p to cache block ``block_tables_BM[b, p // block_size]``, slot ``p % block_size``; entries past
    the sequence are never read. With data-parallel replicas the blocks are divided evenly over them, in order, and all
    of a sequence's blocks are one replica's. Prefill, chunks of a prefill at any offset, decode and several tokens a
    sequence for verifying drafts are all this one form.

    ``num_outputs_B``: how many of the sequence's last new tokens get logits and a sampled successor (0 for a chunk that
    is not the last, 1 usually). ``draft`` also runs the MTP layer over all new tokens and proposes, after each output,
    the token that follows the sampled one; ``next_token_ids_B`` then gives the known next token of sequences without
    outputs (ignored for the others).

    To a runner that `StartsAhead`, a token id of -1 - o means output o of the step before, whatever that is.
    """

    token_ids_T: IntArray
    query_lens_B: IntArray
    context_lens_B: IntArray
    block_tables_BM: IntArray
    num_outputs_B: IntArray
    sampling: Sampling
    return_logits: bool = False
    draft: bool = False
    next_token_ids_B: IntArray | None = None


@dataclass(frozen=True)
class StepResult:
    """Outputs in the order of the batch: sequence by sequence, position by position."""

    token_ids_O: IntArray
    logits_OV: FloatArray | None = None  # before temperature and filters
    draft_token_ids_O: IntArray | None = None
    draft_logits_OV: FloatArray | None = None


def output_rows(batch: StepBatch) -> tuple[NDArray[np.int64], NDArray[np.int64], IntArray]:
    """For each output: its row among the T tokens, its sequence, its position in that sequence."""
    ends_B = np.cumsum(batch.query_lens_B)
    sequence_O = np.repeat(np.arange(len(ends_B)), batch.num_outputs_B)
    first_O = np.repeat(np.cumsum(batch.num_outputs_B) - batch.num_outputs_B, batch.num_outputs_B)
    from_end_O = batch.num_outputs_B[sequence_O] - (np.arange(len(sequence_O)) - first_O)
    rows_O = ends_B[sequence_O] - from_end_O
    total_B = batch.context_lens_B + batch.query_lens_B
    return rows_O.astype(np.int64), sequence_O, (total_B[sequence_O] - from_end_O).astype(np.int32)


def next_tokens(batch: StepBatch, rows_O: NDArray[np.int64], token_ids_O: IntArray) -> IntArray:
    """The token after each of the T tokens: known from the batch, or just sampled at the outputs."""
    next_T = np.roll(batch.token_ids_T, -1)
    last_B = np.cumsum(batch.query_lens_B) - 1
    if batch.next_token_ids_B is not None:
        next_T[last_B] = batch.next_token_ids_B
    next_T[rows_O] = token_ids_O
    return next_T


class Rank(Protocol):
    """This process among those of the run, made from the launcher's environment (torchrun's or msrun's)."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def broadcast(self, array: NDArray) -> NDArray:
        """Rank 0's array on every rank; other ranks pass one of any content."""

    def barrier(self) -> None: ...


class Runner(Protocol):
    """A model on a device with its cache."""

    kv_blocks: int  # blocks in the cache; known after load
    block_size: int  # tokens a block
    dtype: str  # how linear weights are held: fp32, bf16, fp8, w8a8 or int4; known after load
    kv_dtype: str  # how the cache is held: fp32, bf16 or fp8

    def load(self, weights: Weights) -> None:
        """Fill every parameter; missing, leftover or misshapen ones raise InputError."""

    def step(self, batch: StepBatch) -> StepResult: ...

    def close(self) -> None: ...


class Pending(Protocol):
    """A step that runs."""

    def result(self) -> StepResult:
        """Wait for it."""


@runtime_checkable
class StartsAhead(Protocol):
    """A runner that can be given the next step while one runs, so that the device never waits for the host."""

    @property
    def starts_ahead(self) -> bool:
        """Whether it can in this run."""

    def start(self, batch: StepBatch) -> Pending:
        """`Runner.step` without waiting for its end. At most one other step may be unfinished."""


def starts_ahead(runner: Runner) -> TypeGuard[StartsAhead]:
    """Whether ``runner`` can be given a step while another runs."""
    return isinstance(runner, StartsAhead) and runner.starts_ahead


@runtime_checkable
class CountsExperts(Protocol):
    """A runner that can tell which experts a step uses, for the bytes that it must read."""

    def experts_hit(self, batch: StepBatch) -> list[int]:
        """Distinct routed experts of each MoE layer that the ranks use together; empty if this runner cannot tell.

        Runs ``batch``, a decode step, once more; all ranks take part.
        """


class Backend(Protocol):
    """One folder of `backends`: what `backends.load(name)` returns."""

    def start(self, run: RunConfig) -> Rank:
        """Read the launcher's environment, choose the device, join the other ranks."""

    def build(self, spec: ModelSpec, run: RunConfig, rank: Rank) -> Runner:
        """An empty runner. Refuses, before anything is allocated, what does not fit or is not supported."""

    def devices(self) -> list[str]:
        """The devices of this machine that a run can name, each as one line for people."""

    def copy_bandwidth(self, run: RunConfig) -> float:
        """Bytes a second, read and written, of a large copy in the memory of the run's device."""


@dataclass(frozen=True)
class SingleProcess:
    """The Rank of a run without a launcher."""

    rank: int = 0
    world_size: int = 1

    def broadcast(self, array: NDArray) -> NDArray:
        return array

    def barrier(self) -> None:
        return None
