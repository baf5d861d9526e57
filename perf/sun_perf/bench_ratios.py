"""SUN against conventional disaggregation, from runs that took turns: each round's pair gives a ratio, and their median counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sun_perf.bench_plan import EQUAL_LOAD, Plan
from sun_perf.samples import ratio

BASELINE = "partitioned"


def ratios(runs: Sequence[dict], plan: Plan) -> dict[str, dict[str, dict]]:
    """{system: {alpha: {name: ratio to partitioned}}} of a plan's runs; see `samples.ratio`.

    throughput, throughput_per_worker: tokens a second of the closed loops. tpot_p50, tpot_p95, ttft_p50: ms at `EQUAL_LOAD`.
    """
    mine = [run for run in runs if run["tasks"] == plan.tasks]
    return {system: {f"{alpha:g}": _against_baseline(mine, system, alpha) for alpha in plan.alphas} for system in plan.systems if system != BASELINE}


def _against_baseline(runs: Sequence[dict], system: str, alpha: float) -> dict[str, dict]:
    closed, equal = ([run for run in runs if run["alpha"] == alpha and run["mode"] == mode and run.get("load", EQUAL_LOAD) == EQUAL_LOAD]
                     for mode in ("closed", "open"))
    pairs = {
        "throughput": _pairs(closed, system, _tokens_per_s),
        "throughput_per_worker": _pairs(closed, system, lambda run: run["tokens_per_s"] / run["workers"]),
        **{f"{kind}_{at}": _pairs(equal, system, lambda run, kind=kind, at=at: run[f"{kind}_ms"][at])
           for kind, at in (("tpot", "p50"), ("tpot", "p95"), ("ttft", "p50"))}}
    return {name: ratio(found) for name, found in pairs.items() if found}


def throughput(runs: Sequence[dict], tasks: int, system: str, other: str) -> dict[str, dict]:
    """{alpha: ratio of two systems' tokens a second} of the closed loops with so many tasks, where there are both."""
    closed = [run for run in runs if run["tasks"] == tasks and run["mode"] == "closed"]
    alphas = sorted({run["alpha"] for run in closed})
    pairs = {f"{alpha:g}": _pairs([run for run in closed if run["alpha"] == alpha], system, _tokens_per_s, other) for alpha in alphas}
    return {alpha: ratio(found) for alpha, found in pairs.items() if found}


def _tokens_per_s(run: dict) -> float:
    return run["tokens_per_s"]


def _pairs(runs: Sequence[dict], system: str, value: Callable[[dict], float], other: str = BASELINE) -> list[tuple[float, float]]:
    """A system's value and the other's, of every round that has both."""
    by_round: dict[int, dict[str, float]] = {}
    for run in runs:
        by_round.setdefault(run["round"], {})[run["system"]] = value(run)
    return [(of[system], of[other]) for of in by_round.values() if system in of and other in of]
