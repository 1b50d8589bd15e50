"""32-bit words that go to the device in one transfer, in parts of which each begins at a multiple of 16 bytes: kernels
are compiled for pointers that do, or for others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLE = 4


def room_for(counts: Sequence[int]) -> int:
    """Words that parts of ``counts`` words take."""
    return sum(_rooms(counts))


def parts_of(words: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return [room[:count] for room, count in zip(words.split(_rooms(counts)), counts, strict=True)]


def _rooms(counts: Sequence[int]) -> list[int]:
    return [-(-count // _MULTIPLE) * _MULTIPLE for count in counts]


class HostWords:
    """What ``device_words`` are to become, written on the host."""

    def __init__(self, device_words: Tensor):
        self._device_words = device_words
        self._words = torch.zeros(len(device_words), dtype=torch.int32, pin_memory=device_words.device.type != "cpu")

    def send(self) -> None:
        """To the device, after all that was started before."""
        self._device_words.copy_(self._words, non_blocking=True)
