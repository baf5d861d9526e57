"""What is asked in a run: which tasks, how long the prompts and the answers, and when. A seed gives the same list again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Short and common, so that most tokenisers have a token for each.
WORDS = ("the", "of", "and", "to", "in", "is", "for", "on", "with", "as", "time", "day", "work", "part", "house", "water", "number", "people")


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of lengths, rounded and cut to ``low`` to ``high``. sigma: of the logarithm, 0 for always the median."""

    median: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (1 <= self.low <= self.median <= self.high and 0 <= self.sigma < math.inf):
            raise ValueError(f"lengths: needs 1 <= low <= median <= high and sigma >= 0, got {self}")

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """``count`` lengths."""
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(count))
        return np.clip(np.rint(drawn), self.low, self.high).astype(int).tolist()


@dataclass(frozen=True)
class Request:
    """One request: exactly ``tokens`` tokens are to be generated, so that every system does the same work."""

    task: str
    prompt: str
    tokens: int

    @property
    def sampling(self) -> dict[str, float | int | bool]:
        """Its sampling parameters: greedy, and no end before the length."""
        return {"temperature": 0, "max_tokens": self.tokens, "ignore_eos": True}


def zipf(count: int, alpha: float) -> list[float]:
    """Shares of ``count`` tasks, the most popular first: the k-th has a share in proportion to k^-alpha; 0 is uniform."""
    if count < 1 or not 0 <= alpha < math.inf:
        raise ValueError(f"tasks: needs at least one task and alpha of at least 0, got {count} and {alpha}")
    weights = np.arange(1, count + 1, dtype=float) ** -alpha
    return (weights / weights.sum()).tolist()


def draw(tasks: Sequence[str], alpha: float, count: int, seed: int, prompt: Lengths, output: Lengths) -> list[Request]:
    """``count`` requests: tasks by `zipf` (the first task is the most popular), prompts of ``prompt`` words, answers of ``output`` tokens."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(tasks), size=count, p=zipf(len(tasks), alpha))
    prompts = [" ".join(rng.choice(WORDS, size=words)) for words in prompt.draw(rng, count)]
    return [Request(tasks[task], text, tokens) for task, text, tokens in zip(chosen, prompts, output.draw(rng, count), strict=True)]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Seconds between ``count`` arrivals of a Poisson process of ``rate`` a second; the first one's from the start."""
    if not 0 < rate < math.inf:
        raise ValueError(f"poisson: rate must be over 0 a second, got {rate}")
    return np.random.default_rng(seed).exponential(1 / rate, count).tolist()
