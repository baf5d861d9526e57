"""From tokens to text as they come: whole characters only, cut at stop strings."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopMatcher:
    """Finds stop strings across the borders of pieces; holds back only what may be the beginning of one."""

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that may go out now, and whether a stop string was met (the text before it is all there will be)."""
        text = self._held + piece
        hits = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper prefix of ``stop`` that ends ``text``."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """One sequence's text. Multi-byte characters that span tokens come out whole; special tokens are left out.

    In the text of the first ``min_tokens`` tokens no stop string is looked for.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stops, self._min_tokens = StopMatcher(stops), min_tokens
        self._ids: list[int] = []
        self._decoded = 0

    def push(self, token: int) -> tuple[str, bool]:
        """Text that the token completes (perhaps none), and whether a stop string was met."""
        self._ids.append(token)
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._decoded += len(piece)
        return self._search(piece)

    def one(self, token: int) -> str:
        """A token's own text; U+FFFD stands for what is a part of a character."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def finish(self) -> tuple[str, bool]:
        """The rest at the end of the sequence: an unfinished character (as U+FFFD) and what a stop string might have been."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._decoded :]
        text, hit = self._search(rest)
        return (text, True) if hit else (text + self._stops.flush(), False)

    def _search(self, text: str) -> tuple[str, bool]:
        return self._stops.push(text) if len(self._ids) > self._min_tokens else (text, False)
