"""From tokens to text as they come: whole characters only, cut at stop strings."""

from __future__ import annotations

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""What the beginning of a character decodes to."""


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

    In the text of the first ``min_tokens`` tokens no stop string is looked for. Not by the tokenizers package's `DecodeStream`: it raises
    "Invalid prefix" where a tokeniser with byte tokens (Llama 2's, Mistral's) is given bytes that make no character, as sampling does.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], min_tokens: int = 0):
        self._tokenizer = tokenizer
        # Such tokenisers take the space from the first word; what follows a token is decoded behind one.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids
        self._lengths = {special: len(tokenizer.decode(self._before, skip_special_tokens=special)) for special in (True, False)}
        self._stops, self._min_tokens = StopMatcher(stops), min_tokens
        self._count, self._begun = 0, False
        self._pending: list[int] = []

    def push(self, token: int) -> tuple[str, bool]:
        """Text that the token completes (perhaps none), and whether a stop string was met."""
        self._count += 1
        self._pending.append(token)
        text = self._decode()
        return self._search("" if text.endswith(UNFINISHED) else self._emit(text))

    def one(self, token: int) -> str:
        """A token's own text; U+FFFD stands for what is a part of a character."""
        return self._behind([token], False)

    def finish(self) -> tuple[str, bool]:
        """The rest at the end of the sequence: an unfinished character (as U+FFFD) and what a stop string might have been."""
        text, hit = self._search(self._emit(self._decode()))
        return (text, True) if hit else (text + self._stops.flush(), False)

    def _decode(self) -> str:
        return self._behind(self._pending, True) if self._begun else self._tokenizer.decode(self._pending, skip_special_tokens=True)

    def _behind(self, tokens: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode([*self._before, *tokens], skip_special_tokens=skip_special)[self._lengths[skip_special] :]

    def _emit(self, text: str) -> str:
        if text:  # what is none yet, as Llama 2's lone space at the beginning, may be a part of what follows
            self._pending, self._begun = [], True
        return text

    def _search(self, text: str) -> tuple[str, bool]:
        return self._stops.push(text) if self._count > self._min_tokens else (text, False)
