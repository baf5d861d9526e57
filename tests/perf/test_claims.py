"""Claims and ratios come from results alone."""

from __future__ import annotations

import json

import pytest

from sun_perf import claims
from sun_perf.bench_plan import Plan
from sun_perf.bench_ratios import ratios
from tests.perf.bench_data import run

PLAN = Plan(alphas=(0.0, 2.0))
RUNS = [
    run(system, mode, alpha, turn, tokens_per_s=speed * drift, tpot=tpot * drift)
    for system, speed, tpot in (("partitioned", 100.0, 50.0), ("sun", 110.0, 51.0)) for mode in ("closed", "open")
    for alpha in PLAN.alphas for turn, drift in ((0, 1.0), (1, 0.5), (2, 3.0)) if turn or mode == "closed"]
BENCH = {
    "machine": {"cpus": 2}, "commit": "abc", "runs": RUNS, "ratios": ratios(RUNS, PLAN), "server_over_engine": {"server_over_engine": {"median": 0.93}},
    "memory": [{"system": system, "tasks": tasks, "workers": 1, "pss_mib": {"total": mib * tasks}} for system, mib in (("partitioned", 900), ("sun", 400)) for tasks in (2, 4)],
    "settings": {"plans": [{"tasks": 4}], "slo": {"ttft_ms": 2000, "tpot_ms": 200}, "systems": {"partitioned": "Conventional", "sun": "SUN"}}}


def test_ratios_are_of_runs_side_by_side_so_that_a_drift_of_the_machine_does_not_count():
    found = ratios(RUNS, PLAN)
    assert found.keys() == {"sun"} and found["sun"].keys() == {"0", "2"}
    assert found["sun"]["2"]["throughput"] == {"median": 1.1, "low": 1.1, "high": 1.1, "n": 3}
    assert found["sun"]["0"]["throughput_per_worker"]["median"] == 2.2
    assert found["sun"]["0"]["tpot_p50"] == {"median": 1.02, "low": 1.02, "high": 1.02, "n": 2}


def test_only_runs_of_the_plan_at_the_load_that_all_sustain_count():
    odd = [run("sun", "open", tpot=1.0, turn=1, load=0.9), run("sun", "closed", tokens_per_s=1.0, tasks=8)]
    assert ratios([*odd, *RUNS, *odd], PLAN) == ratios(RUNS, PLAN)


def test_claims_are_filled_from_the_results_that_are_there(tmp_path):
    assert claims.gather(tmp_path) == {"measured": {}}
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "peers.json").write_text(json.dumps({"machine": {}, "commit": "def", "over_peer": {"llama.cpp": 1.2}}))
    found = json.loads(claims.write(tmp_path).read_text())
    assert found["throughput_per_worker_sun_over_partitioned"] == {"0": 2.2, "2": 2.2}
    assert found["tpot_sun_over_partitioned"] == {"0": 1.02, "2": 1.02}
    assert found["server_over_engine"] == 0.93 and found["over_peer"] == {"llama.cpp": 1.2}
    assert "qsun_over_sun" not in found and "step_over_floor" not in found
    assert found["measured"]["peers.json"]["commit"] == "def"
    (tmp_path / "steps.json").write_text(json.dumps({"machine": {}, "commit": "x", "qsun_over_sun": {"8": 1.5}, "step_over_floor": {"8": 1.4}}))
    assert set(claims.gather(tmp_path)) == {*claims.CLAIMS, "measured"}


def test_qsun_over_sun_through_the_server_is_of_rounds_side_by_side(tmp_path):
    rounds = [(alpha, gain, turn, drift) for alpha, gain in ((0.0, 2.0), (2.0, 1.5)) for turn, drift in ((0, 1.0), (1, 0.5))]
    quick = [run("qsun", "closed", alpha, turn, tokens_per_s=110.0 * drift * gain) for alpha, gain, turn, drift in rounds]
    odd = [run("qsun", "closed", tasks=8, tokens_per_s=1.0), run("qsun", "open")]
    (tmp_path / "bench.json").write_text(json.dumps({**BENCH, "runs": [*odd, *RUNS, *quick]}))
    assert claims.gather(tmp_path)["qsun_over_sun_server"] == {"0": 2.0, "2": 1.5}
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    assert claims.gather(tmp_path)["qsun_over_sun_server"] == {}


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON"])
def test_results_that_give_no_claim_are_refused_by_file_and_claim(tmp_path, content):
    (tmp_path / "peers.json").write_text(content)
    with pytest.raises(ValueError, match="peers.json: gives no over_peer"):
        claims.gather(tmp_path)
