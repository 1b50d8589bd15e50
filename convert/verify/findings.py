"""What is found to be wrong, and work that is spread over threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...models.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; ``file`` or ``tensor`` is None where it is not about one."""

    what: str
    file: str | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.tensor, self.what) if part)

    @staticmethod
    def of(error: InputError) -> Finding:
        """What reading the directory would end with."""
        return Finding(error.what, Path(error.where).name)


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results of ``work`` in the order of ``items``, which are taken only a little ahead of them."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
