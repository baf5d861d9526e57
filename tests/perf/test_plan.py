"""The search for workers: enough of them, no more than needed, and said at once where no number will do."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sun_client.cli import app
from sun_client.cli_plan import read_shares, spread
from sun_perf.simulation.costs import Fit, PrefillTime, StepTime, passes
from sun_perf.simulation.fleet import Limits
from sun_perf.simulation.outcome import Slo
from sun_perf.simulation.plan import Demand, Unreachable, allot, plan
from sun_perf.simulation.traffic import Lognormal, Traffic, named
from sun_perf.workload import zipf

EXACT = Fit(0, 0.0, 0.0)
STEPS = StepTime((1, 8), (20.0, 34.0), 0.005, EXACT)
PREFILLS = PrefillTime(5.0, 0.5, 0.0, 0.01, EXACT)


def demand(rate: float = 10, tasks: int = 4, slo: Slo = Slo(500, 40), alpha: float = 1.2, **limits) -> Demand:
    lengths = (Lognormal("prompt", 60, 120), Lognormal("output", 20, 40))
    return Demand(Traffic(rate, named(zipf(tasks, alpha)), lengths, 64), slo, STEPS, PREFILLS, Limits(**limits), requests=400)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 20), min_size=1, max_size=8), st.integers(0, 40))
def test_workers_are_shared_out_one_each_and_then_by_need(loads, further):
    total = len(loads) + further
    workers = allot(loads, total)
    assert sum(workers.values()) == total and min(workers.values()) >= 1
    more = allot(loads, total + 1)
    assert all(more[task] >= workers[task] for task in loads), "more workers took one away"


@settings(max_examples=6)
@given(st.floats(2, 30), st.integers(1, 5), st.booleans())
def test_a_plan_meets_the_slo_and_one_decode_worker_less_does_not(rate, tasks, partitioned):
    wanted = demand(rate, tasks)
    made = plan(wanted, partitioned)
    assert wanted.slo.met(made.outcome)
    assert made.decode_workers >= sum(wanted.decode_load().values()) * 0.9
    if not partitioned and made.decode > 1:
        assert not wanted.slo.met(wanted.fleet(made.decode - 1).run(wanted.asked).after(0.1))


def test_many_tasks_need_fewer_workers_in_one_pool():
    wanted = demand(tasks=16)
    pool, own = plan(wanted, partitioned=False, prefill=False), plan(wanted, partitioned=True, prefill=False)
    assert own.decode_workers >= 16 > 2 * pool.decode_workers and pool.prefill is None


def test_the_same_demand_gives_the_same_plan():
    assert plan(demand(), False).numbers() == plan(demand(), False).numbers()


@pytest.mark.parametrize("slo, field", [(Slo(500, 19), "tpot-ms: no number of workers can meet 19 ms"), (Slo(30, 40), "ttft-ms: no number of workers")])
def test_an_slo_that_nobody_meets_alone_is_refused(slo, field):
    with pytest.raises(Unreachable, match=field):
        plan(demand(slo=slo), False)


def test_a_fast_fleet_is_still_simulated_until_it_settles():
    asked = demand(rate=500).asked
    assert len(asked) > 400 and asked[-1].at > 30 * 0.4


@pytest.fixture
def calibration(tmp_path):
    """A file of made-up times."""
    steps = [{"scheme": "fp32", "threads": 1, "batch": b, "context": c, "ms": STEPS.ms(b, c)} for b in (1, 8) for c in (128, 512)]
    prefill = [{"threads": 1, "tokens": n, "ms": PREFILLS.ms(passes(n, 512)), "pull_ms": 0.01 * n} for n in (32, 128, 512)]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"machine": {"cpu": "made up"}, "commit": "none", "token_budget": 512, "steps": steps, "prefill": prefill}))
    return path


def ask(calibration, *words: str):
    return CliRunner().invoke(app, ["plan", "--calibration", str(calibration), "--requests", "200", "--rate", "5", "--tpot-ms", "45", *words])


def test_sun_plan_compares_both(calibration):
    result = ask(calibration, "--tasks", "4")
    assert result.exit_code == 0, result.exception
    decode = next(line for line in result.stdout.splitlines() if "decode workers" in line)
    sun, own, ratio = map(float, re.findall(r"[\d.]+", decode))
    assert sun < own == 4 and ratio == round(sun / own, 2) and "made up" in result.stdout


def test_sun_plan_as_json(calibration):
    made = json.loads(ask(calibration, "--shares", "bank=0.7,bash=0.3", "--json").stdout)["plans"]
    assert made["SUN"]["decode"] == made["SUN"]["decode_workers"] and made["partitioned"]["decode"].keys() == {"bank", "bash"} == made["SUN"]["prefill"].keys()
    assert made["SUN"]["ttft_p95_ms"] <= 2000 and made["SUN"]["tpot_p95_ms"] <= 45


@pytest.mark.parametrize("words, message", [
    (("--rate", "0"), "rate: got 0"), (("--tasks", "0"), "tasks: needs at least one"), (("--mode", "x"), "--mode: got 'x'"),
    (("--tpot-ms", "1"), "tpot-ms: no number of workers"), (("--shares", "a"), "--shares: got 'a'"), (("--shares", "a=1,a=2"), "named before"),
    (("--scheme", "nf4"), "scheme nf4 on 1 threads was not measured"), (("--kv-tokens", "9"), "kv-tokens: 9"), (("--max-batch", "0"), "max-batch: got 0"),
    (("--percentile", "100"), "percentile: got 100"), (("--prompt-p95", "1"), "prompt-p95: got 1"), (("--lengths", "none.jsonl"), "no file none.jsonl"),
    (("--calibration", "none.json"), "no file none.json")])
def test_sun_plan_names_what_is_wrong(calibration, words, message):
    result = ask(calibration, *words)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_shares_and_spreads_are_read_and_written():
    assert read_shares("a=0.5, b=2") == {"a": 0.5, "b": 2.0}
    assert spread({"a": 3, "b": 1}) == "3 1" and spread(dict.fromkeys(range(9), 2)) == "2" and spread({i: 1 + i for i in range(9)}) == "1 to 9"
