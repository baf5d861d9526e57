"""Sampling parameters: good ones are taken, and every bad one is refused with its name."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.decode.params import MAX_LOGPROBS, MAX_STOP, MOST, SamplingParams, sampling_params

BAD = [
    *[("temperature", v) for v in (-0.1, -1, 100.1, math.nan, math.inf, -math.inf, "1", None, [1], True, 10**400)],
    *[("top_p", v) for v in (0, 0.0, -0.5, 1.01, 2, math.nan, math.inf, "0.5")],
    *[("top_k", v) for v in (-2, 1.5, math.nan, "5", None, True, MOST + 1, 2**63, 2**64)],
    *[("min_p", v) for v in (-0.1, 1.1, math.nan)],
    *[("repetition_penalty", v) for v in (0, -1, 10.1, math.nan, math.inf)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, math.nan)],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, math.nan, -math.inf)],
    *[("seed", v) for v in (-1, 2**63, 1.5, "1", True)],
    *[("max_tokens", v) for v in (0, -1, 1.5, math.inf, None, "8", True, 2**64)],
    *[("min_tokens", v) for v in (-1, 129, None, 0.5)],
    *[("stop", v) for v in ("", [""], ["x" * 257], ["x"] * (MAX_STOP + 1), [1], 1, None, {"a": 1}, "\ud800", ["a", "b\udfff"])],
    *[("stop_token_ids", v) for v in ([-1], [0] * (MAX_STOP + 1), ["a"], 1, [1.5], [math.nan], None, [2**64])],
    *[("ignore_eos", v) for v in (1, "true", None)],
    *[("logprobs", v) for v in (-1, MAX_LOGPROBS + 1, 1.5, True)],
    *[(key, 1) for key in ("best_of", "n", "Temperature", "max_new_tokens", "")],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_naming_its_parameter(name, value):
    with pytest.raises(ValueError, match=f"^sampling_parameters.*{name}"):
        sampling_params({name: value})


def test_min_tokens_over_max_tokens_is_refused_naming_both():
    with pytest.raises(ValueError, match="min_tokens is 9.*max_tokens"):
        sampling_params({"min_tokens": 9, "max_tokens": 8})
    assert sampling_params({"min_tokens": 8, "max_tokens": 8}).min_tokens == 8


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", 0), ("temperature", 100.0), ("top_p", 1), ("top_p", 1e-9), ("top_k", -1), ("top_k", 0), ("top_k", MOST), ("min_p", 0),
    ("min_p", 1), ("repetition_penalty", 10), ("presence_penalty", -2), ("frequency_penalty", 2), ("seed", 0), ("seed", 2**63 - 1),
    ("max_tokens", 1), ("max_tokens", MOST), ("min_tokens", 0), ("stop", []), ("stop", ["x" * 256] * MAX_STOP), ("stop_token_ids", [0, 10**9]),
    ("ignore_eos", True),
    ("logprobs", 0), ("logprobs", MAX_LOGPROBS), ("logprobs", None), ("seed", None),
])
def test_a_value_at_its_limit_is_taken(name, value):
    assert getattr(sampling_params({name: value}), name) == value


def test_half_a_character_is_refused_wherever_it_is():
    for values in ({"\ud800": 1}, {"temperature": "\ud800"}, {"stop": [["\ud800"]]}):
        with pytest.raises(ValueError, match="^sampling_parameters"):
            sampling_params(values)


def test_a_single_stop_string_is_a_list_of_one():
    values = {"stop": "end"}
    assert sampling_params(values).stop == ["end"] and values == {"stop": "end"}


def test_without_values_everything_is_at_its_default():
    assert sampling_params({}) == SamplingParams()
    assert not SamplingParams().penalised and SamplingParams(presence_penalty=0.1).penalised


def test_parameters_can_not_be_made_bad_past_the_check():
    for values in ({"temperature": math.nan}, {"min_tokens": 2, "max_tokens": 1}):
        with pytest.raises(ValueError):
            SamplingParams(**values)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__) | st.text(max_size=8), anything, max_size=4))
def test_any_values_are_taken_or_refused_with_a_value_error_and_nothing_worse(values):
    try:
        params = sampling_params(values)
    except ValueError as error:
        assert str(error).startswith("sampling_parameters")
        return
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params
