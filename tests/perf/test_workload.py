"""The requests of a run: their mix, lengths and arrivals are what was asked for, and the same for the same seed."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_perf.workload import Lengths, draw, poisson, zipf

alphas = st.floats(0, 4)
seeds = st.integers(0, 2**32)
lengths = st.builds(
    lambda low, more, most, sigma: Lengths(low + more, sigma, low, low + more + most),
    st.integers(1, 50), st.integers(0, 50), st.integers(0, 50), st.floats(0, 3))


@given(st.integers(1, 64), alphas)
def test_zipf_shares_sum_to_one_and_never_rise(count, alpha):
    shares = zipf(count, alpha)
    assert len(shares) == count and sum(shares) == pytest.approx(1)
    assert all(a >= b > 0 for a, b in zip(shares, shares[1:], strict=False)) or count == 1


@given(st.integers(1, 64))
def test_zipf_without_skew_is_uniform(count):
    assert zipf(count, 0) == pytest.approx([1 / count] * count)


@given(st.integers(2, 64), alphas)
def test_zipf_gives_the_kth_task_a_share_of_k_to_minus_alpha(count, alpha):
    shares = zipf(count, alpha)
    assert shares[0] / shares[-1] == pytest.approx(count**alpha)


@given(lengths, seeds)
def test_requests_have_the_asked_lengths_and_follow_from_the_seed(of, seed):
    requests = draw(["a", "b", "c"], 1.2, 20, seed, of, of)
    assert requests == draw(["a", "b", "c"], 1.2, 20, seed, of, of)
    assert all(of.low <= len(r.prompt.split()) <= of.high and of.low <= r.tokens <= of.high and r.task in "abc" for r in requests)
    assert all(r.sampling["max_tokens"] == r.tokens and r.sampling["ignore_eos"] for r in requests)


def test_another_mix_leaves_lengths_as_they_are():
    of = Lengths(10, 1, 1, 100)
    flat, skewed = (draw(["a", "b", "c", "d"], alpha, 200, 1, of, of) for alpha in (0, 2))
    assert [(r.prompt, r.tokens) for r in flat] == [(r.prompt, r.tokens) for r in skewed]
    assert Counter(r.task for r in skewed)["a"] > 2 * Counter(r.task for r in flat)["a"]


def test_lengths_are_around_their_median():
    drawn = [r.tokens for r in draw(["a"], 0, 2000, 5, Lengths(1, 0, 1, 1), Lengths(40, 0.5, 1, 1000))]
    assert statistics.median(drawn) == pytest.approx(40, rel=0.05) and statistics.mean(drawn) > 42


@given(st.floats(0.01, 1000), seeds)
def test_arrivals_come_at_their_rate(rate, seed):
    gaps = poisson(2000, rate, seed)
    assert all(gap >= 0 for gap in gaps) and gaps == poisson(2000, rate, seed)
    assert statistics.mean(gaps) == pytest.approx(1 / rate, rel=0.15)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.25), "exponential: as wide as its mean"


@given(st.floats(0.01, 100), st.floats(0.01, 100), seeds)
def test_arrivals_at_another_rate_are_the_same_ones_stretched(rate, other, seed):
    assert poisson(5, rate, seed) == pytest.approx([gap * other / rate for gap in poisson(5, other, seed)])


@pytest.mark.parametrize("make", [
    lambda: Lengths(5, 0.5, 6, 9), lambda: Lengths(5, 0.5, 0, 9), lambda: Lengths(10, 0.5, 1, 9), lambda: Lengths(5, -1, 1, 9),
    lambda: zipf(0, 1), lambda: zipf(3, -1), lambda: zipf(3, float("nan")), lambda: poisson(3, 0, 1), lambda: poisson(3, float("inf"), 1)])
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match="lengths: |tasks: |poisson: "):
        make()
