"""What is asked: tasks and their shares, lengths of prompts and answers, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

Z95 = 1.6448536269514722  # 95 % of a standard normal distribution lies below


@dataclass(frozen=True)
class Request:
    """One request: arrives at ``at`` seconds, has ``prompt`` tokens and generates ``output`` of the ``max_tokens`` that it may."""

    task: str
    at: float
    prompt: int
    output: int
    max_tokens: int


class Lengths(msgspec.Struct, frozen=True):
    """A request's measured lengths, named as in the server's answers; a line of JSONL each."""

    num_input_tokens: int
    num_output_tokens: int
    task: str | None = None


@dataclass(frozen=True)
class Lognormal:
    """Lengths in tokens by their mean and 95th percentile; equal ones mean a constant.

    With m and q these two: sigma = z - sqrt(z^2 - 2 ln(q / m)), mu = ln m - sigma^2 / 2, z the normal distribution's 95th percentile.
    """

    name: str
    mean: float
    p95: float

    def __post_init__(self) -> None:
        most = math.exp(Z95**2 / 2)
        if not 1 <= self.mean < math.inf:
            raise ValueError(f"{self.name}-mean: got {self.mean:g}, must be at least 1 token")
        if not self.mean <= self.p95 <= most * self.mean:
            raise ValueError(f"{self.name}-p95: got {self.p95:g}, must be from the mean ({self.mean:g}) to {most * self.mean:.0f}, the most of a lognormal of that mean")

    def draw(self, rng: np.random.Generator, count: int, high: int) -> np.ndarray:
        """[count] int lengths from 1 to ``high``."""
        sigma = Z95 - math.sqrt(max(0.0, Z95**2 - 2 * math.log(self.p95 / self.mean)))
        drawn = self.mean * np.exp(sigma * rng.standard_normal(count) - sigma * sigma / 2)
        return np.clip(np.rint(drawn), 1, high).astype(int)


@dataclass(frozen=True)
class Traffic:
    """Poisson arrivals of ``rate`` requests a second, of tasks by ``shares`` (summing to 1).

    lengths: a distribution each for prompt and output, or measured pairs, drawn with replacement (of the request's own task where
    they name tasks). max_tokens: what a request may generate, which is the room it takes; outputs are cut there, prompts at max_prompt.
    """

    rate: float
    shares: dict[str, float]
    lengths: tuple[Lognormal, Lognormal] | tuple[Lengths, ...]
    max_tokens: int
    max_prompt: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate: got {self.rate:g}, must be over 0 requests a second")
        if not self.shares or any(not 0 <= share < math.inf for share in self.shares.values()) or not sum(self.shares.values()):
            raise ValueError("shares: at least one task is needed, no share under 0 and one over 0")
        if self.max_tokens < 1:
            raise ValueError(f"max-tokens: got {self.max_tokens}, must be at least 1")

    def requests(self, count: int, seed: int) -> list[Request]:
        """``count`` requests by time of arrival; the same for a seed, whatever the rate but for the times."""
        rng = np.random.default_rng(seed)
        tasks = list(self.shares)
        shares = np.array(list(self.shares.values()), dtype=float)
        chosen = [tasks[i] for i in rng.choice(len(tasks), size=count, p=shares / shares.sum())]
        at = np.cumsum(rng.exponential(1.0, count)) / self.rate
        prompts, outputs = self._draw(rng, chosen)
        rows = zip(chosen, at.tolist(), prompts, outputs, strict=True)
        return [Request(task, when, prompt, output, self.max_tokens) for task, when, prompt, output in rows]

    def _draw(self, rng: np.random.Generator, chosen: list[str]) -> tuple[list[int], list[int]]:
        if isinstance(self.lengths[0], Lognormal):
            prompt, output = self.lengths
            return prompt.draw(rng, len(chosen), self.max_prompt).tolist(), output.draw(rng, len(chosen), self.max_tokens).tolist()
        own = {task: [row for row in self.lengths if row.task == task] or self.lengths for task in set(chosen)}
        rows = [own[task][int(u * len(own[task]))] for task, u in zip(chosen, rng.random(len(chosen)), strict=True)]
        return [min(row.num_input_tokens, self.max_prompt) for row in rows], [min(row.num_output_tokens, self.max_tokens) for row in rows]


def named(shares: Sequence[float]) -> dict[str, float]:
    """Tasks without names: task_0 and so on."""
    return {f"task_{i}": share for i, share in enumerate(shares)}


def read_lengths(path: Path) -> tuple[Lengths, ...]:
    """Measured lengths from JSONL. Raises ValueError naming the file and line at fault."""
    if not path.is_file():
        raise ValueError(f"lengths: there is no file {path}")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = msgspec.json.decode(line, type=Lengths)
        except msgspec.DecodeError as error:
            raise ValueError(f"lengths: {path}, line {number}: {error}") from error
        if row.num_input_tokens < 1 or row.num_output_tokens < 1:
            raise ValueError(f"lengths: {path}, line {number}: num_input_tokens and num_output_tokens must be at least 1")
        rows.append(row)
    if not rows:
        raise ValueError(f"lengths: {path} is empty")
    return tuple(rows)
