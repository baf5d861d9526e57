"""The bench of the router's policies: everybody takes turns at one rate, and each is held against conventional serving of the same round."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sun_perf import policies
from sun_perf.bench_plan import EQUAL_LOAD, Plan
from sun_perf.bench_ratios import BASELINE, ratios
from sun_perf.policies import ROUTERS, measure, medians

TPOT = {BASELINE: 50.0, **{name: 10.0 * i for i, name in enumerate(ROUTERS, 1)}}


class Noting:
    """A runner that measures nothing: every round of a system is as slow as ``TPOT`` says, times its number."""

    def __init__(self):
        self.runs, self.served = [], []

    @contextmanager
    def serving(self, name, tasks):
        self.served.append((name, dict(policies.SYSTEMS[name].router)))
        yield SimpleNamespace()

    def closed(self, server, name, plan, turn, alpha):
        self.runs.append({"system": name, "alpha": alpha, "round": turn, "mode": "closed", "tasks": plan.tasks})

    def open(self, server, name, plan, turn, alpha, load):
        ms = {at: turn * TPOT[name] for at in ("p50", "p95")}
        self.runs.append({"system": name, "alpha": alpha, "round": turn, "mode": "open", "load": load, "tasks": plan.tasks, "tpot_ms": ms, "ttft_ms": ms})


def test_all_take_turns_and_are_held_against_the_baseline_of_their_round(monkeypatch):
    monkeypatch.setattr(policies, "SYSTEMS", dict(policies.SYSTEMS))
    runner, plan = Noting(), Plan(systems=(BASELINE, *ROUTERS), alphas=(0.0, 2.0), rounds=3)
    rows = measure(runner, plan)
    assert [name for name, _ in runner.served] == [BASELINE, *plan.systems[::-1], *plan.systems, *plan.systems[::-1]]
    assert all(router == ROUTERS[name] for name, router in runner.served if name in ROUTERS)
    assert len(rows) == 3 * len(plan.systems) * 2 and {row["load"] for row in rows} == {EQUAL_LOAD}
    found, to_baseline = medians(rows), ratios(rows, plan)
    for name in ROUTERS:
        for alpha in ("0", "2"):
            assert found[name][alpha]["tpot_p50"] == 2 * TPOT[name]
            assert to_baseline[name][alpha]["tpot_p50"]["median"] == pytest.approx(TPOT[name] / TPOT[BASELINE])
