"""Sampling on a device picks what sampling on the CPU picks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sun.decode import engine
from sun.decode.cuda.sampling import choose

from ..conftest import DEVICE
from .test_sampling import members, sequence

whole = st.lists(st.integers(-20, 20), min_size=8, max_size=8, unique=True).map(lambda values: [float(v) for v in values])


def same(got, expected) -> None:
    """Tokens are equal; log-probabilities up to the last places of their sums."""
    assert [c.token for c in got] == [c.token for c in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5) and (one.top is None) == (other.top is None)
        if one.top:
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
            assert [v for _, v in one.top] == pytest.approx([v for _, v in other.top], abs=1e-5)


# Whole numbers apart: which of two equal logits comes first is each side's own.
@settings(max_examples=30)
@given(st.lists(st.tuples(members, whole), min_size=1, max_size=6))
def test_every_row_of_a_batch_gets_the_token_that_the_cpu_gives_it(batch):
    logits = torch.tensor([row for _, row in batch])
    sequences = [sequence(prompt, generated, {5}, **values) for (_, prompt, generated, values), _ in batch]
    given = logits.to(DEVICE)
    same(choose(given, sequences), engine.choose(logits, sequences))
    assert torch.equal(given.cpu(), logits), "the model's logits were changed"


@pytest.mark.parametrize("values", [{}, {"top_p": 0.9}, {"top_p": 0.2}, {"top_k": 2000}, {"top_k": 40, "top_p": 0.9}, {"min_p": 0.5, "temperature": 0.7}])
def test_a_vocabulary_beyond_what_is_sorted_first_is_drawn_from_in_the_same_way(values):
    ranks = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
    logits = (-0.0005 * ranks.float()).expand(2, -1).contiguous()
    for seed in range(20):
        sequences = [sequence([0], seed=seed, **values), sequence([1], [2], seed=seed, logprobs=2, **values)]
        same(choose(logits.to(DEVICE), sequences), engine.choose(logits, sequences))
