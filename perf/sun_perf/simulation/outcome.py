"""What a simulation measured, as a load generator would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sun_perf.simulation.workers import DecodeWorker, PrefillWorker, Sequence


@dataclass(frozen=True)
class Slo:
    """At ``percentile`` of the requests, TTFT and TPOT are to be at most these, ms."""

    ttft_ms: float
    tpot_ms: float
    percentile: float = 95.0

    def __post_init__(self) -> None:
        for name, value in (("ttft-ms", self.ttft_ms), ("tpot-ms", self.tpot_ms)):
            if not value > 0:
                raise ValueError(f"{name}: got {value:g}, must be over 0 ms")
        if not 0 < self.percentile < 100:
            raise ValueError(f"percentile: got {self.percentile:g}, must be between 0 and 100")

    def met(self, outcome: Outcome) -> bool:
        """Whether both percentiles are within their limits."""
        ttft, tpot = outcome.ttft(self.percentile), outcome.tpot(self.percentile)
        return ttft <= self.ttft_ms and not tpot > self.tpot_ms


@dataclass(frozen=True, eq=False)
class Outcome:
    """Times of all requests, ms, in order of arrival ([requests] float64 each), and what the workers did.

    busy: share of the time from first arrival to last token that the workers were in a step or pass, [workers].
    batches: decode steps by their number of sequences.
    """

    arrived: np.ndarray
    first: np.ndarray
    last: np.ndarray
    tokens: np.ndarray
    decode_busy: np.ndarray
    prefill_busy: np.ndarray
    batches: dict[int, int]

    @classmethod
    def of(cls, sequences: Many[Sequence], decodes: Many[DecodeWorker], prefills: Many[PrefillWorker]) -> Outcome:
        """Collect it when everything has ended."""
        arrived = np.array([1e3 * s.request.at for s in sequences])
        last = np.array([s.last for s in sequences])
        span = last.max(initial=0.0) - arrived.min(initial=0.0) or 1.0
        batches = sum((worker.batches for worker in decodes), Counter())
        return cls(
            arrived, np.array([s.first for s in sequences]), last, np.array([s.generated for s in sequences]),
            np.array([w.busy for w in decodes]) / span, np.array([w.busy for w in prefills]) / span, dict(sorted(batches.items())))

    @property
    def ttfts(self) -> np.ndarray:
        """Time to first token, [requests] ms."""
        return self.first - self.arrived

    @property
    def tpots(self) -> np.ndarray:
        """Time per output token after the first, [requests with two tokens or more] ms."""
        several = self.tokens > 1
        return (self.last - self.first)[several] / (self.tokens[several] - 1)

    def ttft(self, percentile: float) -> float:
        """Percentile of the TTFT, ms; linear between requests."""
        return float(np.percentile(self.ttfts, percentile))

    def tpot(self, percentile: float) -> float:
        """Percentile of the TPOT, ms; NaN if no request has two tokens."""
        return float(np.percentile(self.tpots, percentile)) if len(self.tpots) else float("nan")

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return float(self.last.max() - self.arrived.min()) / 1e3

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return float(self.tokens.sum()) / self.seconds

    def goodput(self, slo: Slo) -> float:
        """Requests a second that are within both limits of an SLO."""
        tpots = np.where(self.tokens > 1, (self.last - self.first) / np.maximum(self.tokens - 1, 1), 0.0)
        return float(np.sum((self.ttfts <= slo.ttft_ms) & (tpots <= slo.tpot_ms))) / self.seconds

    def after(self, skipped: float) -> Outcome:
        """Without the first ``skipped`` of the requests, which found the fleet empty. The workers' numbers stay."""
        start = int(skipped * len(self.arrived))
        return Outcome(
            self.arrived[start:], self.first[start:], self.last[start:], self.tokens[start:], self.decode_busy, self.prefill_busy, self.batches)

    def summary(self) -> dict[str, float]:
        """The numbers that a load generator reports, ms and per second."""
        steps = sum(self.batches.values())
        return {
            "requests": len(self.arrived), "seconds": self.seconds, "tokens_per_s": self.tokens_per_s,
            "ttft_p50_ms": self.ttft(50), "ttft_p95_ms": self.ttft(95), "tpot_p50_ms": self.tpot(50), "tpot_p95_ms": self.tpot(95),
            "decode_utilisation": float(self.decode_busy.mean()), "mean_batch": sum(b * n for b, n in self.batches.items()) / steps if steps else 0.0}
