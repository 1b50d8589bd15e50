"""From generated tokens to text that can be shown at once: whole characters only, stop strings cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A character is at most four bytes, so at most three replacement characters at the end can still become one.
_REPLACEMENT = "\ufffd"
_MAX_PENDING = 3


class StreamDecoder:
    """Incremental detokenisation: the pieces of `push` and `flush` join to the decoding of all tokens.

    Only the tokens since the last clean character boundary (and one before it, for decoders that treat the first token
    of a text specially) are decoded again, so a step costs the same at any length.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._token_ids: list[int] = []
        self._shown = 0  # leading characters of the decoded tokens that were returned already

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty when it ends inside a character."""
        self._token_ids.append(token_id)
        text = self._decode(self._token_ids)
        certain = len(text.rstrip(_REPLACEMENT))
        certain = max(certain, len(text) - _MAX_PENDING)
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text):
            self._token_ids = [token_id]
            self._shown = len(self._decode(self._token_ids))
        return piece

    def flush(self) -> str:
        """What is left at the end: an unfinished character, as a replacement character."""
        text = self._decode(self._token_ids)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece


class OutputText:
    """A request's text with stop strings: shown pieces never contain one, nor a beginning that could become one."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]):
        self._decoder = StreamDecoder(decode)
        self._stop_strings = [stop for stop in stop_strings if stop]
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token; sets ``stopped`` when a stop string is complete."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, when generation ended for another reason than a stop string."""
        if self.stopped:
            return ""
        piece = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return piece

    def _release(self, piece: str) -> str:
        self._held += piece
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0]
        if found:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
