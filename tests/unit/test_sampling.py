"""Every sampling parameter does what it says, and a token depends on its own row, seed and position alone."""

from __future__ import annotations

import math
from collections import Counter
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sun.decode import sampling
from sun.decode.engine import choose
from sun.decode.params import SamplingParams
from sun.decode.sampling import draw, logprobs, penalise, uniform
from sun.decode.sequence import Sequence
from sun.messages import Admit

from .test_ticket import TICKET

EPS = 1e-9
# Whole numbers apart, so that no test hangs on which of two equal logits comes first.
rows = st.lists(st.integers(-8, 8), min_size=1, max_size=10, unique=True).map(lambda values: torch.tensor(values, dtype=torch.float32))
temperatures = st.floats(0.2, 5.0)


def params(**values) -> SamplingParams:
    return SamplingParams(**{"seed": 0, **values})


def draw_at(logits: torch.Tensor, u: float, values: SamplingParams) -> int:
    """The token that the random number ``u`` draws."""
    with mock.patch.object(sampling, "uniform", lambda seed, position: u):
        return draw(logits, values, 0)


def drawable(logits: torch.Tensor, values: SamplingParams, steps: int = 200) -> Counter[int]:
    """Which tokens evenly spaced random numbers draw, and how often."""
    return Counter(draw_at(logits, i / steps, values) for i in range(steps))


def probabilities(logits: torch.Tensor, temperature: float) -> list[float]:
    values = logits.tolist()
    top = max(values)
    weights = [math.exp((x - top) / temperature) for x in values]
    whole = sum(weights)
    return [w / whole for w in weights]


def support(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, slack: float = 0.0) -> dict[int, float]:
    """token -> probability of all that may be drawn, by the parameters' definitions one after the other."""
    probs = probabilities(logits, temperature)
    least = min_p * max(probs) - slack
    kept = {i: p for i, p in enumerate(probs) if p >= least}
    order = sorted(kept, key=kept.__getitem__, reverse=True)[: top_k if top_k > 0 else None]
    total = sum(kept[i] for i in order)
    nucleus, mass = {}, 0.0
    for i in order:
        if mass >= top_p * total + slack:
            break
        nucleus[i] = kept[i]
        mass += kept[i]
    whole = sum(nucleus.values())
    return {i: p / whole for i, p in nucleus.items()}


@given(rows, temperatures, st.integers(-1, 12), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0, exclude_max=True))
@example(torch.tensor([0.0, -200.0]), 0.2, -1, 1.0, 0.0, math.nextafter(1.0, 0.0))
def test_only_tokens_that_the_parameters_leave_are_drawn(logits, temperature, top_k, top_p, min_p, u):
    token = draw_at(logits, u, params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert token in support(logits, temperature, top_k, top_p, min_p, slack=EPS)


@given(st.integers(0, 999), st.sampled_from([0.2, 1.0, 6.0]), st.integers(-1, 400), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.02]),
       st.floats(0.0, 1.0, exclude_max=True))
def test_the_same_holds_for_a_vocabulary_of_many_blocks(seed, spread, top_k, top_p, min_p, u):
    logits = spread * torch.randn(300, generator=torch.Generator().manual_seed(seed))
    values = params(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    left = support(logits, 0.7, top_k, top_p, min_p, slack=1e-6)
    # The tokens by weight where some are left out, else by id; u falls to the one that the shares before it, and its own, enclose.
    order = list(left) if top_k > 0 or top_p < 1 else sorted(left)
    token, below = draw_at(logits, u, values), 0.0
    for one in order:
        if one == token:
            break
        below += left[one]
    assert token in left and below - 1e-4 <= u <= below + left[token] + 1e-4


@pytest.mark.parametrize("values", [
    {}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 4, "top_p": 0.9}, {"min_p": 0.05, "top_p": 0.7},
    {"temperature": 3.0, "top_k": 5, "min_p": 0.2},
])
def test_all_tokens_that_the_parameters_leave_are_drawn_by_their_probability(values):
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.5, 0.5, -3.0])
    expected = support(logits, values.get("temperature", 1.0), values.get("top_k", -1), values.get("top_p", 1.0), values.get("min_p", 0.0))
    drawn = drawable(logits, params(**values), 1000)
    assert set(drawn) == set(expected)
    for token, probability in expected.items():
        assert abs(drawn[token] / 1000 - probability) <= 0.0021  # evenly spaced numbers miss by one at either end


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_as_frequent_as_the_temperature_makes_them_likely(temperature):
    logits, n = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5]), 2000
    counts = Counter(draw(logits, params(seed=5, temperature=temperature), position) for position in range(n))
    expected = [n * p for p in probabilities(logits, temperature)]
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom: 1 in 1000; the seed is fixed, so it never changes


@given(rows, st.floats(min_value=5e-324, max_value=1e-3), st.integers(0, 2**63 - 1))
@example(torch.tensor([-8.0, 8.0, 7.0]), 5e-324, 0)
def test_the_smallest_temperatures_are_as_good_as_greedy(logits, temperature, seed):
    assert draw(logits, params(temperature=temperature, seed=seed), 0) == int(logits.argmax())


@given(rows, temperatures, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_top_k_of_one_is_greedy(logits, temperature, seed, position):
    assert draw(logits, params(temperature=temperature, top_k=1, seed=seed), position) == int(logits.argmax())


@given(rows, temperatures, st.integers(0, 1000))
def test_parameters_at_their_neutral_values_change_nothing(logits, temperature, position):
    plain = draw(logits, params(temperature=temperature), position)
    for neutral in ({"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert draw(logits, params(temperature=temperature, **neutral), position) == plain


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.9), (2000, 0.9), (2000, 1.0), (1500, 0.5), (-1, 0.2), (3000, 0.98)])
@pytest.mark.parametrize("slope", [0.0005, 0.0024])
def test_a_nucleus_of_more_than_the_presorted_tokens_is_exact(top_k, top_p, slope):
    vocab = 4096
    ranks = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
    logits = -slope * ranks.double()  # the token of rank r is its own evidence
    expected = len(support(logits, 1.0, top_k, top_p, 0.0))
    last = draw_at(logits, math.nextafter(1.0, 0.0), params(top_k=top_k, top_p=top_p))
    assert abs(int(ranks[last]) + 1 - expected) <= 1
    assert int(ranks[draw_at(logits, 0.0, params(top_k=top_k, top_p=top_p))]) == 0


tokens = st.lists(st.integers(0, 9), max_size=12)


@given(st.lists(st.floats(-20, 20, width=32), min_size=10, max_size=10), tokens, tokens,
       st.floats(0.1, 5.0), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_are_those_of_their_formulas(logits, prompt, generated, repetition, presence, frequency):
    counts, expected = Counter(generated), {}
    for token, value in enumerate(logits):
        if token in prompt or token in generated:
            value = value / repetition if value > 0 else value * repetition
        if token in counts:
            value -= presence + frequency * counts[token]
        expected[token] = value
    values = params(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    given_logits = torch.tensor(logits)
    got = penalise(given_logits, values, torch.tensor(prompt, dtype=torch.int64), torch.tensor(generated, dtype=torch.int64))
    assert got.tolist() == pytest.approx(list(expected.values()), abs=1e-4)
    assert given_logits.tolist() == logits, "the model's logits were changed"


ONE_OF = st.sampled_from([{"top_k": 3}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.5}, {"min_p": 0.1}, {}])


@given(rows.filter(lambda row: len(row) > 1 and row.max() > 0), ONE_OF, st.floats(1e-45, 1e-6), st.floats(0, 1, exclude_max=True))
def test_the_smallest_repetition_penalty_leaves_a_token_of_the_vocabulary(logits, others, penalty, u):
    values = params(temperature=1.0, repetition_penalty=penalty, **others)
    seen = int(logits.argmax())
    changed = penalise(logits, values, torch.tensor([seen]), torch.tensor([], dtype=torch.int64))
    assert changed.isfinite().all() and draw_at(changed, u, values) == seen


@given(ONE_OF, st.floats(0, 1, exclude_max=True), st.sampled_from([math.nan, -math.inf, math.inf]), st.integers(1, 200))
def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary(others, u, value, vocab):
    assert 0 <= draw_at(torch.full((vocab,), value), u, params(temperature=1.0, **others)) < vocab


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6)), max_size=5))
def test_a_random_number_depends_on_seed_and_position_alone(seed, position, others):
    first = uniform(seed, position)
    for other in others:
        uniform(*other)
    torch.rand(1)
    assert uniform(seed, position) == first and 0 <= first < 1


def test_random_numbers_are_the_same_in_every_version():
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63 - 1, 8191)] == PINNED


def test_neighbouring_seeds_and_positions_are_unrelated():
    by_position, by_seed = [uniform(3, i) for i in range(1000)], [uniform(i, 3) for i in range(1000)]
    for numbers in (by_position, by_seed):
        mean = sum(numbers) / 1000
        serial = sum((a - 0.5) * (b - 0.5) for a, b in zip(numbers, numbers[1:], strict=False)) / 999 * 12
        assert abs(mean - 0.5) < 0.03 and abs(serial) < 0.1 and len(set(numbers)) == 1000


def sequence(prompt: list[int], generated: list[int] = [], stops: set[int] = frozenset(), **values) -> Sequence:
    admit = Admit(id="s", router="r", task="a", prompt=prompt, params=params(**{"max_tokens": 50, **values}))
    return Sequence(msgspec.structs.replace(admit, generated=list(generated)), TICKET, [], frozenset(stops))


def test_min_tokens_bans_the_stop_tokens_until_they_are_there():
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]])
    for temperature in (0.0, 0.5):
        early = [choose(logits, [sequence([0], [3] * n, {1, 2}, min_tokens=2, temperature=temperature)])[0].token for n in (0, 1)]
        assert not set(early) & {1, 2}
    assert choose(logits, [sequence([0], [3, 3], {1, 2}, min_tokens=2, temperature=0.0)])[0].token == 1


def test_logprobs_are_of_the_unmodified_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    choice, = choose(logits, [sequence(
        [1], [1], {3}, min_tokens=9, temperature=0.1, repetition_penalty=5.0, presence_penalty=2.0, top_k=1, logprobs=2)])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert choice.token == 2
    assert choice.logprob == pytest.approx(float(expected[2]))
    assert choice.top == [(1, pytest.approx(float(expected[1]))), (3, pytest.approx(float(expected[3])))]


def test_logprobs_of_no_alternatives_are_the_tokens_own():
    choice = logprobs(torch.tensor([0.0, 0.0]), 1, 0)
    assert choice.top == [] and choice.logprob == pytest.approx(math.log(0.5))
    assert choose(torch.tensor([[0.0, 1.0]]), [sequence([0], temperature=0.0)])[0].logprob is None


settings_of_a_row = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 0.7, 1.5]), "top_p": st.sampled_from([1.0, 0.8]), "top_k": st.sampled_from([-1, 3]),
    "min_p": st.sampled_from([0.0, 0.1]), "presence_penalty": st.sampled_from([0.0, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]), "seed": st.integers(0, 2**63 - 1), "min_tokens": st.sampled_from([0, 4]),
    "logprobs": st.sampled_from([None, 2]),
})
members = st.tuples(st.lists(st.floats(-10, 10, width=32), min_size=8, max_size=8), st.lists(st.integers(0, 7), min_size=1, max_size=5),
                    st.lists(st.integers(0, 7), max_size=5), settings_of_a_row)


@given(st.lists(members, min_size=1, max_size=6))
def test_a_row_is_chosen_in_a_batch_as_it_is_alone(batch):
    logits = torch.tensor([row for row, *_ in batch])
    sequences = [sequence(prompt, generated, {5}, **values) for _, prompt, generated, values in batch]
    before = logits.clone()
    together = choose(logits, sequences)
    assert together == [choose(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    assert torch.equal(logits, before)


PINNED = [0.011546754286331562, 0.5023796042735054, 0.3035680343067586, 0.21199435916307485]
"""A change of these would change every seeded text that anyone has kept."""
