"""The interference bench: which ways of sharing cores it compares, what it makes of their turns, and a smoke run of real engines."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack

import pytest

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_perf import interference
from sun_perf.interference import Turn, Way
from sun_perf.interference_engines import Engines, Seat, Work, decode
from tests.unit import tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("interference")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "base", PromptSettings())
    return Work(folder / "base", tiny.task(folder / "models", folder / "base", "mine"), batch=2, context=8, steps=4, prompt=16, alone_s=1)


def test_every_way_of_sharing_is_compared_and_each_has_an_own_place_only_where_cores_suffice():
    four = {way.name: (way.decode, way.prefill) for way in interference.ways([0, 1, 2, 3])}
    assert four["decode alone"] == (Seat(), None) and four["prefill alone"] == (None, Seat())
    assert four["cores of their own"] == (Seat("0"), Seat("1-3"))
    assert four["the same cores, prefill nice 10"] == (Seat("0"), Seat("0", 10)) and four["anywhere"] == (Seat(), Seat())
    assert "cores of their own" not in {way.name for way in interference.ways([3])}


def test_a_round_is_compared_with_the_same_rounds_turn_alone():
    compared = [Way("a", Seat(), None), Way("b", None, Seat()), Way("both", Seat(), Seat())]
    seen = {
        "a": [Turn([10.0], [], 0), Turn([20.0], [], 0)], "b": [Turn([], [100.0], 1), Turn([], [100.0], 1)],
        "both": [Turn([15.0], [300.0], 0.5), Turn([60.0, 60.0], [], 0.3)]}
    made = interference.summary(compared[2], seen, compared)
    assert made["decode_step_ms"] == {"p50": 60.0, "p95": 60.0, "n": 3, "over_alone": {"median": 2.25, "low": 1.5, "high": 3.0, "n": 2}}
    assert made["prefill_ms"]["over_alone"] == {"median": 3.0, "low": 3.0, "high": 3.0, "n": 1} and made["prefill_cpus"] == 0.4
    idle = interference.summary(compared[0], seen, compared)
    assert idle["prefill_ms"] is None and idle["prefill_cpus"] is None
    assert interference.line({"name": "both", **made}).split() == ["both", "60.0", "60.0", "2.25", "300.0", "300.0", "3.00", "0.40"]


def test_real_engines_run_where_they_were_put_and_all_of_it_can_be_written(work, capsys):
    core = str(min(os.sched_getaffinity(0)))
    compared = [Way("decode alone", Seat(core), None), Way("prefill alone", None, Seat(core, 5)), Way("one core", Seat(core), Seat(core, 5))]
    made = json.loads(json.dumps(interference.report(work, compared, rounds=1)))
    alone, prefill, both = made["ways"]
    assert alone["decode_step_ms"]["n"] == both["decode_step_ms"]["n"] == work.steps and alone["decode_step_ms"]["over_alone"]["median"] == 1
    assert prefill["prefill_ms"]["p50"] > 0 and prefill["prefill_cpus"] > 0
    assert made["work"]["prompt"] == 16 and made["machine"]["cpu"] and both["prefill"] == {"cores": core, "nice": 5}
    assert "round 1 of 1: one core" in capsys.readouterr().out


def test_an_engine_that_cannot_start_says_why(work):
    with ExitStack() as stack, pytest.raises(RuntimeError, match="an engine failed: ValueError: cores: got '5000'"):
        Engines(work, stack).get(decode, Seat("5000"))
