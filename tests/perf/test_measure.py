"""Smoke runs of what needs an engine: calibration, and a real run beside its simulation, on a tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest

from sun.local import LocalFleet
from sun.router.policy import LeastTokens
from sun.router.router import Limits as RouterLimits
from sun.router.router import Router
from sun.router.tasks import TaskRegistry
from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base
from sun_perf.calibrate import AS_IT_IS, measure, measure_prefill, measure_steps, undisturbed
from sun_perf.simulation.costs import PrefillTime, StepTime
from sun_perf.simulation.fleet import Fleet, Limits
from sun_perf.simulation.traffic import Request
from sun_perf.validate_simulation import COMPARED, compare, real, slower
from tests.unit import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny base, and a repository of tasks a and b."""
    folder = tmp_path_factory.mktemp("measure")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "base", PromptSettings())
    for name in ("a", "b"):
        tiny.task(folder / "models", folder / "base", name)
    return folder / "base", folder / "models"


@pytest.fixture
def fleet(place):
    """Engines of both tasks and one worker."""
    base, models = place
    made = LocalFleet(base, {name: models / f"prefill_{name}" / "1" for name in ("a", "b")}, kv_tokens=2048, max_batch=8)
    yield made
    made.close()


def test_a_calibration_measures_every_batch_and_context_and_leaves_nothing_behind(fleet):
    steps = measure_steps(fleet, "fp32", 1, undisturbed(1), batches=(1, 4), contexts=(8, 64), rounds=1)
    assert [(row.batch, row.context) for row in steps] == [(1, 8), (1, 64), (4, 8), (4, 64)] and all(row.ms > 0 for row in steps)
    prefill = measure_prefill(fleet, 1, undisturbed(1), prompts=(8, 16, 32), rounds=1)
    assert [row.tokens for row in prefill] == [8, 16, 32] and all(row.ms > 0 and row.pull_ms > 0 for row in prefill)
    StepTime.from_rows(steps), PrefillTime.from_rows(prefill, 512)
    engine = fleet.decodes["decode_0"]
    assert not engine.scheduler.sequences and engine.pool.free_tokens == 2048


def test_a_calibration_has_each_number_format_beside_the_other_and_prefill_once(place):
    base, models = place
    steps, prefill = measure(base, {"a": models / "prefill_a" / "1"}, ["fp32", "int8"], 1, batches=(1, 2), contexts=(8, 64), prompts=(8, 16, 32))
    assert [(row.scheme, row.batch, row.context) for row in steps] == [(s, b, c) for s in ("fp32", "int8") for b in (1, 2) for c in (8, 64)]
    assert [row.tokens for row in prefill] == [8, 16, 32]


def test_a_batch_larger_than_the_worker_takes_is_an_error(fleet):
    with pytest.raises(RuntimeError, match="max_batch or kv_tokens"):
        measure_steps(fleet, "fp32", 1, AS_IT_IS, batches=(9,), contexts=(8,), rounds=1)


def test_a_real_run_is_compared_number_by_number(place, fleet):
    base, models = place
    prompts = PromptFormat.load(base, PromptSettings())
    router = Router(fleet, ["decode_0"], TaskRegistry(models), prompts, LeastTokens(), [], RouterLimits(max_tokens=tiny.CONTEXT))
    requests = [Request("ab"[i % 2], i / 50, 30, 6, 6) for i in range(10)]
    try:
        measured = real(router, fleet, requests, ["time"] * len(requests))
    finally:
        router.close()
    assert measured.tokens.tolist() == [6] * 10 and sum(b * n for b, n in measured.batches.items()) == 60
    times = StepTime((1, 8), (1.0, 2.0), 0.0, None), PrefillTime(1.0, 0.0, 0.0, 0.0, None)
    assert 0 < slower(measured, times[0], requests) < 1e4
    rows = compare(measured, Fleet(*times, Limits(), 1).run(requests))
    assert rows.keys() == set(COMPARED) and all(row["measured"] > 0 and row["error"] > -1 for row in rows.values())
