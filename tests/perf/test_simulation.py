"""The simulation against closed forms, against the same steps one by one, and its books."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_perf.simulation.costs import Fit, PrefillTime, StepTime
from sun_perf.simulation.fleet import Fleet, Limits
from sun_perf.simulation.leap import Leap
from sun_perf.simulation.outcome import Slo
from sun_perf.simulation.traffic import Lognormal, Request, Traffic, named
from sun_perf.workload import zipf

EXACT = Fit(0, 0.0, 0.0)
CONSTANT = StepTime((1, 2), (10.0, 10.0), 0.0, EXACT)
GROWING = StepTime((1, 4, 16), (10.0, 16.0, 28.0), 0.01, EXACT)
INSTANT = PrefillTime(0.0, 0.0, 0.0, 0.0, EXACT)
PREFILL = PrefillTime(5.0, 0.5, 0.001, 0.02, EXACT)
TASKS = ("a", "b", "c")

request = st.builds(
    lambda task, at, prompt, output, spare: Request(task, at, prompt, output, output + spare),
    st.sampled_from(TASKS), st.floats(0, 2), st.integers(1, 60), st.integers(1, 12), st.integers(0, 5))
requests = st.lists(request, min_size=1, max_size=25).map(lambda made: sorted(made, key=lambda r: r.at))
fleets = st.builds(
    Fleet, st.sampled_from([CONSTANT, GROWING]), st.sampled_from([INSTANT, PREFILL]),
    st.builds(Limits, st.integers(1, 5), st.integers(80, 200), st.integers(1, 64)),
    st.one_of(st.integers(1, 3), st.fixed_dictionaries(dict.fromkeys(TASKS, st.integers(1, 2)))),
    st.one_of(st.none(), st.fixed_dictionaries(dict.fromkeys(TASKS, st.integers(1, 2)))),
    st.sampled_from(["least_tokens", "round_robin"]))


def poisson(rate: float, count: int, prompt: int = 1, output: int = 1, tasks: int = 1) -> list[Request]:
    """Requests of constant lengths."""
    return Traffic(rate, named(zipf(tasks, 0)), (Lognormal("prompt", prompt, prompt), Lognormal("output", output, output)), output).requests(count, 0)


@given(fleets, requests)
def test_every_request_ends_and_every_token_was_in_a_step(fleet, asked):
    outcome = fleet.run(asked)
    assert outcome.tokens.tolist() == [r.output for r in asked]
    assert sum(batch * steps for batch, steps in outcome.batches.items()) == outcome.tokens.sum()
    assert max(outcome.batches) <= fleet.limits.max_batch
    assert np.all(outcome.first > outcome.arrived) and np.all(outcome.last >= outcome.first)
    assert np.all(outcome.decode_busy <= 1 + 1e-9) and np.all(outcome.prefill_busy <= 1 + 1e-9)


@given(fleets, requests)
def test_the_same_requests_give_the_same_times(fleet, asked):
    one, other = fleet.run(asked), fleet.run(asked)
    assert one.last.tolist() == other.last.tolist() and one.batches == other.batches


@given(fleets, requests)
def test_nobody_is_served_faster_than_alone(fleet, asked):
    """What `sun plan` relies on when it says that no number of workers will do."""
    outcome = fleet.run(asked)
    for r, ttft, span in zip(asked, outcome.ttfts, outcome.last - outcome.first, strict=True):
        steps = [fleet.steps.ms(1, r.prompt + i) for i in range(r.output)]
        prefill = fleet.prefills.alone(r.prompt - 1, fleet.limits.token_budget)
        assert ttft >= prefill + fleet.prefills.pull(r.prompt - 1) + steps[0] - 1e-6
        assert span >= sum(steps[1:]) - 1e-6


@given(requests)
def test_one_task_is_served_alike_by_a_pool_and_by_its_own_workers(asked):
    asked = [Request("a", r.at, r.prompt, r.output, r.max_tokens) for r in asked]
    pool = Fleet(GROWING, PREFILL, Limits(), 2).run(asked)
    own = Fleet(GROWING, PREFILL, Limits(), {"a": 2}).run(asked)
    assert pool.last.tolist() == own.last.tolist()


@given(requests, st.integers(1, 4))
def test_leaps_are_steps_one_by_one(asked, max_batch):
    outcome = Fleet(GROWING, INSTANT, Limits(max_batch), 1).run(asked)
    first, last = one_by_one(asked, max_batch)
    assert outcome.first == pytest.approx(first) and outcome.last == pytest.approx(last)


def one_by_one(asked: list[Request], max_batch: int) -> tuple[list[float], list[float]]:
    """First and last token of requests on one worker of `GROWING`, ms; whoever has come joins when a step begins."""
    first, last, left = [math.nan] * len(asked), [math.nan] * len(asked), [r.output for r in asked]
    waiting, running, now = list(range(len(asked))), [], 0.0
    while waiting or running:
        if not running:
            now = max(now, 1e3 * asked[waiting[0]].at)
        while waiting and len(running) < max_batch and 1e3 * asked[waiting[0]].at <= now + 1e-6:
            running.append(waiting.pop(0))
        now += GROWING.base(len(running)) + GROWING.per_token * sum(asked[i].prompt + asked[i].output - left[i] for i in running)
        for i in list(running):
            first[i] = now if left[i] == asked[i].output else first[i]
            left[i] -= 1
            if not left[i]:
                last[i] = now
                running.remove(i)
    return first, last


@given(st.integers(1, 64), st.integers(1, 10_000), st.integers(1, 200))
def test_a_leap_knows_how_many_of_its_steps_have_ended(batch, tokens, steps):
    leap = Leap(GROWING, 3.0, batch, tokens, steps)
    exact = sum(GROWING.base(batch) + GROWING.per_token * (tokens + batch * i) for i in range(steps))
    assert leap.end(steps) == pytest.approx(3.0 + exact)
    for i in {0, steps // 2, steps}:
        assert leap.whole_steps(leap.end(i)) == leap.started_steps(leap.end(i)) == i
    assert leap.whole_steps(leap.end(1) - 0.1) == 0 and leap.started_steps(leap.end(1) - 0.1) == 1


def test_a_saturated_worker_gives_a_full_batch_a_step():
    outcome = Fleet(CONSTANT, INSTANT, Limits(max_batch=8), 1).run(poisson(1000, 800, output=10))
    assert outcome.tokens_per_s == pytest.approx(8 / 0.010, rel=0.02)


def test_waiting_is_that_of_an_m_d_1_queue():
    """Batches of one and steps of one time: mean wait = load * service / (2 * (1 - load)), Pollaczek and Khinchine."""
    service, load = 100.0, 0.6
    outcome = Fleet(CONSTANT, INSTANT, Limits(max_batch=1), 1).run(poisson(load / 0.1, 20_000, output=10))
    assert outcome.decode_busy[0] == pytest.approx(load, rel=0.02)
    assert outcome.ttfts.mean() - 10.0 == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_pooling_workers_that_were_partitioned_shortens_waiting():
    asked = poisson(16, 4000, output=10, tasks=4)
    own = Fleet(CONSTANT, INSTANT, Limits(max_batch=1), {f"task_{i}": 1 for i in range(4)}).run(asked)
    assert Fleet(CONSTANT, INSTANT, Limits(max_batch=1), 4).run(asked).ttft(95) < own.ttft(95)


def test_a_prompt_alone_takes_its_passes_and_its_pull():
    outcome = Fleet(CONSTANT, PREFILL, Limits(token_budget=64), 1, {"a": 1}).run([Request("a", 0.0, 101, 3, 3)])
    passes = 2 * 5 + 0.5 * 100 + 0.001 * (100 * 101 / 2)
    assert outcome.ttft(50) == pytest.approx(passes + 0.02 * 100 + 10) and outcome.tpot(50) == pytest.approx(10)


def test_a_request_larger_than_the_pool_is_refused():
    with pytest.raises(ValueError, match="kv-tokens: 16, but a prompt and its max-tokens together take 17"):
        Fleet(CONSTANT, INSTANT, Limits(kv_tokens=16), 1).run([Request("a", 0.0, 8, 1, 10)])


def test_goodput_counts_requests_within_both_limits():
    outcome = Fleet(CONSTANT, INSTANT, Limits(max_batch=1), 1).run([Request("a", 0.0, 1, 10, 10), Request("a", 0.0, 1, 10, 10)])
    assert outcome.goodput(Slo(50, 20)) == pytest.approx(1 / 0.2) and outcome.goodput(Slo(50, 5)) == 0
    assert outcome.goodput(Slo(200, 20)) == pytest.approx(2 / 0.2)


@pytest.mark.parametrize("values", [(0, 1, 95), (1, 0, 95), (math.nan, 1, 95), (1, 1, 100)])
def test_an_slo_out_of_its_limits_is_refused(values):
    with pytest.raises(ValueError, match="ttft-ms|tpot-ms|percentile"):
        Slo(*values)
