"""How long a decode step, a prefill pass and the handing over of a KV take: least-squares fits of measured times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import msgspec
import numpy as np

from sun.prefill.engine import plan


class StepRow(msgspec.Struct, frozen=True):
    """A measured decode step: ``batch`` sequences of ``context`` tokens each took ``ms``."""

    scheme: str
    threads: int
    batch: int
    context: int
    ms: float


class PrefillRow(msgspec.Struct, frozen=True):
    """A measured prefill of one prompt alone: ``ms`` until its KV was published, then ``pull_ms`` until a worker had it in its slot."""

    threads: int
    tokens: int
    ms: float
    pull_ms: float


@dataclass(frozen=True)
class Fit:
    """Relative errors of a fit on its own rows."""

    rows: int
    median: float
    worst: float

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Fit:
        """predicted, measured: [rows] in ms."""
        errors = np.abs(predicted / measured - 1)
        return cls(len(measured), float(np.median(errors)), float(errors.max()))


@dataclass(frozen=True)
class StepTime:
    """ms of a decode step = base(batch) + per_token * (sum of its sequences' contexts).

    base is a line between measured batch sizes, since a step's linear layers cost steps and knees rather than a straight line; beyond the
    last it goes on with the last slope. Reading K and V is linear in the tokens read.
    """

    batches: tuple[int, ...]
    bases: tuple[float, ...]
    per_token: float
    fit: Fit
    _table: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def from_rows(cls, rows: Sequence[StepRow]) -> StepTime:
        """Weighted least squares: relative errors count, so that small batches weigh as much as large ones.

        Raises ValueError if the rows cannot tell base and context apart.
        """
        if any(not (row.batch >= 1 and row.context >= 1 and 0 < row.ms < math.inf) for row in rows):
            raise ValueError("steps: every row needs batch and context of at least 1, and ms over 0")
        batches = sorted({row.batch for row in rows})
        if len(batches) < 2 or len({row.context for row in rows}) < 2:
            raise ValueError(f"steps: {len(rows)} rows with batches {batches} and contexts {sorted({row.context for row in rows})}; two of each are needed at least")
        ms = np.array([row.ms for row in rows])
        design = np.array([[float(row.batch == batch) for batch in batches] + [row.batch * row.context] for row in rows])
        solved = _solve(design, ms)
        # A larger batch never takes less: where noise says so, the smaller one's time stands.
        bases = np.maximum.accumulate(solved[:-1])
        fit = Fit.of(design @ np.append(bases, solved[-1]), ms)
        return cls(tuple(batches), tuple(bases.tolist()), float(solved[-1]), fit)

    def base(self, batch: int) -> float:
        """The part of a step of ``batch`` sequences that does not depend on their contexts, ms."""
        while len(self._table) <= batch:
            self._table.append(self._interpolate(len(self._table)))
        return self._table[batch]

    def scaled(self, factor: float) -> StepTime:
        """Steps that take ``factor`` times as long."""
        return replace(self, bases=tuple(factor * base for base in self.bases), per_token=factor * self.per_token)

    def _interpolate(self, batch: int) -> float:
        spans = list(pairwise(zip(self.batches, self.bases, strict=True)))
        (b0, m0), (b1, m1) = next((span for span in spans if batch <= span[1][0]), spans[-1])
        return max(0.0, m0 + (m1 - m0) * (batch - b0) / (b1 - b0)) if batch >= b0 else m0

    def ms(self, batch: int, context: float) -> float:
        """One step of ``batch`` sequences of ``context`` tokens each."""
        return self.base(batch) + self.per_token * batch * context


@dataclass(frozen=True)
class PrefillTime:
    """ms of a prefill pass = per_pass + per_token * tokens + per_pair * (pairs of a token and one that it attends to)."""

    per_pass: float
    per_token: float
    per_pair: float
    pull_per_token: float
    fit: Fit

    @classmethod
    def from_rows(cls, rows: Sequence[PrefillRow], budget: int) -> PrefillTime:
        """Fit rows whose prompts ran in passes of ``budget`` tokens. Raises ValueError if there are too few sizes."""
        if any(not (row.tokens >= 1 and 0 < row.ms < math.inf and 0 <= row.pull_ms < math.inf) for row in rows):
            raise ValueError("prefill: every row needs at least 1 token, ms over 0 and pull_ms of at least 0")
        if len({row.tokens for row in rows}) < 3:
            raise ValueError(f"prefill: prompts of three lengths are needed at least, got {sorted({row.tokens for row in rows})}")
        ms = np.array([row.ms for row in rows])
        design = np.array([np.sum([(1, size, pairs(done, size)) for done, size in passes(row.tokens, budget)], axis=0) for row in rows])
        solved = _solve(design, ms)
        tokens, pulls = np.array([row.tokens for row in rows]), np.array([row.pull_ms for row in rows])
        return cls(*map(float, solved), float(tokens @ pulls / (tokens @ tokens)), Fit.of(design @ solved, ms))

    def ms(self, chunks: Sequence[tuple[int, int]]) -> float:
        """One pass over ``chunks``, each the tokens done before and those done now."""
        return self.per_pass + sum(self.per_token * size + self.per_pair * pairs(done, size) for done, size in chunks)

    def alone(self, tokens: int, budget: int) -> float:
        """A prompt of ``tokens`` that shares no pass, ms."""
        return sum(self.ms([chunk]) for chunk in passes(tokens, budget))

    def scaled(self, factor: float) -> PrefillTime:
        """Passes and pulls that take ``factor`` times as long."""
        return PrefillTime(*(factor * value for value in (self.per_pass, self.per_token, self.per_pair, self.pull_per_token)), self.fit)

    def pull(self, tokens: int) -> float:
        """ms until a decode worker has checked the KV of ``tokens`` and has it in its slot."""
        return self.pull_per_token * tokens


@dataclass(eq=False)
class Prompt:
    """What `sun.prefill.engine.plan` needs to know of a prompt: ``left`` tokens are still to run, ``done`` have."""

    left: int
    done: int = 0

    def advance(self, size: int) -> None:
        """``size`` tokens have run."""
        self.done += size
        self.left -= size


def passes(tokens: int, budget: int) -> list[tuple[int, int]]:
    """The passes of a prompt alone, as the engine plans them: tokens done before and in each. A prompt without tokens needs none."""
    prompt, made = Prompt(tokens), []
    while prompt.left:
        size = plan(deque([prompt]), budget)[0].size
        made.append((prompt.done, size))
        prompt.advance(size)
    return made


def pairs(done: int, size: int) -> float:
    """Pairs of a query and a key that causal attention of ``size`` tokens after ``done`` others has."""
    return size * done + size * (size + 1) / 2


def _solve(design: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Least squares on relative errors, [columns]; columns (dependence on context, on pairs) that noise makes negative are left out, for none saves time."""
    keep = np.ones(design.shape[1], dtype=bool)
    solved = np.zeros(design.shape[1])
    while True:
        solved[keep] = np.linalg.lstsq(design[:, keep] / ms[:, None], np.ones(len(ms)), rcond=None)[0]
        negative = keep & (solved < 0)
        if not negative.any():
            return solved
        keep &= ~negative
        solved[~keep] = 0
