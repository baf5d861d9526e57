"""Figures of samples whose times are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_perf.load import check
from sun_perf.perf_analyzer import inputs, read_profile
from sun_perf.samples import Sample, Slo, batch_rate, latencies, ratio, saturated_rate
from sun_perf.workload import Request


def steady(sent: float, ttft: float, tpot: float, tokens: int) -> Sample:
    """A request whose tokens come evenly; seconds."""
    return Sample("a", sent, tuple(sent + ttft + i * tpot for i in range(tokens)))


@given(st.floats(0, 1e6), st.floats(0.001, 10), st.floats(0.001, 1), st.integers(2, 50))
def test_a_steady_request_has_the_times_it_was_made_of(sent, ttft, tpot, tokens):
    sample = steady(sent, ttft, tpot, tokens)
    assert sample.ttft_ms == pytest.approx(1e3 * ttft, abs=1e-3) and sample.tpot_ms == pytest.approx(1e3 * tpot, abs=1e-3)


def test_a_single_token_has_no_time_per_further_token():
    assert steady(0, 1, 1, 1).tpot_ms is None
    assert latencies([steady(0, 1, 1, 1)], Slo()) == {"ttft_ms": {"p50": 1000, "p95": 1000}, "tpot_ms": None, "slo_share": 1}


@pytest.mark.parametrize(("ttft", "tpot", "kept"), [(1, 0.1, True), (2, 0.2, True), (2.1, 0.1, False), (1, 0.21, False)])
def test_an_slo_is_kept_only_within_both_limits(ttft, tpot, kept):
    assert Slo(2000.001, 200.001).kept(steady(0, ttft, tpot, 3)) is kept


def test_percentiles_are_over_all_requests():
    found = latencies([steady(0, 0.1 * i, 0.01, 2) for i in range(1, 101)], Slo(ttft_ms=5000.001))
    assert found["ttft_ms"] == {"p50": pytest.approx(5050), "p95": pytest.approx(9505)}
    assert found["slo_share"] == 0.5


@given(st.integers(1, 8), st.integers(4, 12), st.floats(0.01, 1))
def test_a_saturated_loop_has_the_rate_of_its_lanes(concurrency, rounds, tpot):
    # In every lane a request follows the one before at once: a token each tpot, the first included.
    samples = [steady(turn * 10 * tpot + 0.001 * tpot * lane, tpot, tpot, 10) for turn in range(rounds) for lane in range(concurrency)]
    assert saturated_rate(samples, concurrency) == pytest.approx(concurrency / tpot, rel=0.05)


def test_a_loop_without_a_saturated_part_is_refused():
    with pytest.raises(ValueError, match="5 requests are too few for a concurrency of 4; at least 6"):
        saturated_rate([steady(i, 1, 1, 4) for i in range(5)], 4)


def test_a_batch_counts_only_while_all_decode():
    early, late = steady(0, 1, 1, 11), steady(0, 5, 1, 11)
    assert batch_rate([early, late]) == pytest.approx(2)
    with pytest.raises(ValueError, match="never all decoding at once"):
        batch_rate([steady(0, 1, 1, 2), steady(0, 5, 1, 2)])


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=9))
def test_a_ratio_lies_between_its_rounds(pairs):
    found = ratio(pairs)
    assert found["low"] <= found["median"] <= found["high"] and found["n"] == len(pairs)
    assert found["low"] == pytest.approx(min(a / b for a, b in pairs), abs=1e-4)


def test_answers_to_other_work_than_was_asked_for_are_refused():
    asked = [Request("a", "x", 3), Request("a", "y", 4)]
    check([steady(0, 1, 1, 4), steady(0, 1, 1, 3)], asked)
    for got in ([steady(0, 1, 1, 3)], [steady(0, 1, 1, 3), steady(0, 1, 1, 3)]):
        with pytest.raises(RuntimeError, match="load: the answers are not of the work"):
            check(got, asked)


def test_a_perf_analyzer_profile_is_read_token_by_token():
    def response(tokens: int) -> dict:
        return {"num_output_tokens": tokens, "text_output": "x"}

    profile = {"experiments": [{"requests": [{
        "timestamp": 10**9, "request_inputs": {"task": "bash"}, "response_timestamps": [2 * 10**9, 3 * 10**9, 4 * 10**9],
        "response_outputs": [response(1), response(2), {"num_output_tokens": ""}]}]}]}
    assert read_profile(profile) == [Sample("bash", 1.0, (2.0, 3.0, 3.0))]


def test_a_request_goes_to_perf_analyzer_with_all_that_makes_it_equal_work():
    given_inputs = {name: value["content"] for name, value in inputs(Request("bash", "hello", 7)).items()}
    assert given_inputs["task"] == ["bash"] and given_inputs["text_input"] == ["hello"] and given_inputs["return_num_output_tokens"] == [True]
    assert '"max_tokens": 7' in given_inputs["sampling_parameters"][0] and '"ignore_eos": true' in given_inputs["sampling_parameters"][0]
