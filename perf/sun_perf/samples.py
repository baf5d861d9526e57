"""What a load generator saw: when each token of each request came, and the figures made of that."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One request as its client saw it. sent: seconds, of any clock; tokens: when each token came, ascending, by the same clock."""

    task: str
    sent: float
    tokens: tuple[float, ...]

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return (self.tokens[0] - self.sent) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None for a single token."""
        return (self.tokens[-1] - self.tokens[0]) * 1e3 / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


@dataclass(frozen=True)
class Slo:
    """Limits in ms that a request must keep, both, to count as good."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 200.0

    def kept(self, sample: Sample) -> bool:
        """Whether a request kept both; one token has no TPOT."""
        return sample.ttft_ms <= self.ttft_ms and (sample.tpot_ms or 0.0) <= self.tpot_ms


def latencies(samples: Sequence[Sample], slo: Slo) -> dict:
    """p50 and p95 of TTFT and TPOT in ms over all requests, and the share that kept the SLO."""
    tpots = [s.tpot_ms for s in samples if s.tpot_ms is not None]
    return {
        "ttft_ms": percentiles([s.ttft_ms for s in samples]), "tpot_ms": percentiles(tpots) if tpots else None,
        "slo_share": round(sum(map(slo.kept, samples)) / len(samples), 4)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95."""
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}


def saturated_rate(samples: Sequence[Sample], concurrency: int) -> float:
    """Tokens a second while ``concurrency`` requests were in flight: from the first that was sent into a free place to the last one sent.

    Raises ValueError for fewer than two requests beyond ``concurrency``: start and drain would then be all there is.
    """
    sent = sorted(s.sent for s in samples)
    if len(sent) < concurrency + 2:
        raise ValueError(f"samples: {len(sent)} requests are too few for a concurrency of {concurrency}; at least {concurrency + 2}")
    return _rate(samples, sent[concurrency], sent[-1])


def batch_rate(samples: Sequence[Sample]) -> float:
    """Tokens a second while all of these requests decoded together: from the last one's first token to the first one's last.

    Raises ValueError if they never did.
    """
    start, end = max(s.tokens[0] for s in samples), min(s.tokens[-1] for s in samples)
    if end <= start:
        raise ValueError("samples: the requests were never all decoding at once; they need more tokens")
    return _rate(samples, start, end)


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | int]:
    """Ratios of values measured side by side: their median, lowest and highest, and how many there are."""
    ratios = sorted(a / b for a, b in pairs)
    return {"median": round(statistics.median(ratios), 4), "low": round(ratios[0], 4), "high": round(ratios[-1], 4), "n": len(ratios)}


def _rate(samples: Sequence[Sample], start: float, end: float) -> float:
    return sum(start < at <= end for s in samples for at in s.tokens) / (end - start)
