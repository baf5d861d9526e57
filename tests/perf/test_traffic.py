"""Requests are as the traffic says, and traffic that cannot be is refused by field."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sun_perf.simulation.traffic import Lengths, Lognormal, Traffic, named, read_lengths
from sun_perf.workload import zipf

CONSTANT = (Lognormal("prompt", 10, 10), Lognormal("output", 5, 5))


def test_lognormal_lengths_have_the_mean_and_the_percentile_asked_for():
    drawn = Lognormal("prompt", 200, 500).draw(np.random.default_rng(0), 200_000, 10**6)
    assert drawn.mean() == pytest.approx(200, rel=0.01) and np.percentile(drawn, 95) == pytest.approx(500, rel=0.02)


def test_arrivals_tasks_and_seed():
    traffic = Traffic(50, named(zipf(4, 1.2)), CONSTANT, 8)
    asked = traffic.requests(20_000, 1)
    assert asked == traffic.requests(20_000, 1) != traffic.requests(20_000, 2)
    assert 20_000 / asked[-1].at == pytest.approx(50, rel=0.03)
    assert [np.mean([r.task == task for r in asked]) for task in traffic.shares] == pytest.approx(zipf(4, 1.2), abs=0.02)
    assert {(r.prompt, r.output, r.max_tokens) for r in asked} == {(10, 5, 8)}


def test_measured_lengths_stay_together_and_belong_to_their_task(tmp_path):
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"num_input_tokens": 100, "num_output_tokens": 9, "task": "a"}\n{"num_input_tokens": 7, "num_output_tokens": 3}\n')
    asked = Traffic(1, {"a": 1, "b": 1}, read_lengths(path), 8).requests(500, 0)
    assert {(r.prompt, r.output) for r in asked if r.task == "a"} == {(100, 8)}  # cut at max_tokens
    assert {(r.prompt, r.output) for r in asked if r.task == "b"} == {(100, 8), (7, 3)}
    assert read_lengths(path)[1] == Lengths(7, 3)


@pytest.mark.parametrize("line, message", [
    ("", "is empty"), ("{}", "line 1: .*num_input_tokens"), ('{"num_input_tokens": 0, "num_output_tokens": 1}', "line 1: .* must be at least 1")])
def test_bad_lengths_are_refused_by_line(tmp_path, line, message):
    path = tmp_path / "lengths.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_lengths(path)


@pytest.mark.parametrize("make, field", [
    (lambda: Traffic(0, {"a": 1}, CONSTANT, 8), "rate"),
    (lambda: Traffic(math.nan, {"a": 1}, CONSTANT, 8), "rate"),
    (lambda: Traffic(1, {}, CONSTANT, 8), "shares"),
    (lambda: Traffic(1, {"a": -1}, CONSTANT, 8), "shares"),
    (lambda: Traffic(1, {"a": 1}, CONSTANT, 0), "max-tokens"),
    (lambda: Lognormal("prompt", 0, 5), "prompt-mean"),
    (lambda: Lognormal("output", 10, 5), "output-p95"),
    (lambda: Lognormal("output", 10, 50), "output-p95: got 50, must be from the mean .10. to 39"),
    (lambda: zipf(0, 1), "tasks")])
def test_impossible_traffic_is_refused_by_field(make, field):
    with pytest.raises(ValueError, match=field):
        make()
