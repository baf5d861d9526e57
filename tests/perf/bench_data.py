"""Made-up bench results for the tests of what is made of them."""

from __future__ import annotations


def run(system: str, mode: str, alpha: float = 0.0, turn: int = 1, tokens_per_s: float = 100.0, tpot: float = 50.0, **more) -> dict:
    """A run as `bench_run` notes it."""
    workers = {"partitioned": 4, "sun": 2, "qsun": 2}[system]
    row = {"round": turn, "system": system, "tasks": 4, "workers": workers, "alpha": alpha, "mode": mode,
           "ttft_ms": {"p50": 200.0, "p95": 300.0}, "tpot_ms": {"p50": tpot, "p95": 2 * tpot}, "slo_share": 1.0}
    row |= {"tokens_per_s": tokens_per_s} if mode == "closed" else {"load": 0.6, "requests_per_s": 2.0, "goodput_per_s": 2.0}
    return {**row, **more}
