"""A request's tensors and parameters are read field by field, and a bad one is refused with its name."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.router.errors import RequestError
from sun.router.request import INPUTS, MAX_ERROR, MAX_TEXT_BYTES, RETURNS, GenerateRequest, parse_request

DTYPES = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT64": np.int64}


def tensors(**inputs) -> dict[str, np.ndarray]:
    """Inputs as Triton's Python backend gives them: arrays, strings as bytes."""
    arrays = {}
    for name, value in inputs.items():
        values = value if isinstance(value, list) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        arrays[name] = np.array(values, dtype=DTYPES[INPUTS[name]])
    return arrays


def parse(parameters: dict | None = None, **inputs) -> GenerateRequest:
    return parse_request(tensors(**{"text_input": "hi", "task": "a", **inputs}), parameters or {})


def refused(parameters: dict | None = None, **inputs) -> str:
    with pytest.raises(RequestError) as error:
        parse(parameters, **inputs)
    assert error.value.code == "INVALID_ARG"
    return str(error.value)


def test_a_text_is_one_user_message_and_all_else_is_at_its_default():
    assert parse(text_input="héllo 🙂") == GenerateRequest(messages=[{"role": "user", "content": "héllo 🙂"}], sampling={}, task="a")


def test_messages_are_taken_as_they_are():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    request = parse_request(tensors(messages=json.dumps(messages)), {})
    assert request.messages == messages and request.task is None


def test_every_optional_output_is_given_only_when_asked_for():
    for name in RETURNS:
        assert parse(**{f"return_{name}": True}).returns == {name}
        assert parse(**{f"return_{name}": False}).returns == frozenset()


def test_sampling_comes_as_json_or_as_parameters_of_the_request():
    assert parse(sampling_parameters='{"top_k": 3, "seed": 1}').sampling == {"top_k": 3, "seed": 1}
    assert parse({"top_k": 4, "temperature": 0.5}, sampling_parameters='{"top_k": 3}').sampling == {"top_k": 4, "temperature": 0.5}


def test_tritons_own_parameters_are_no_sampling():
    assert parse({"triton_enable_empty_final_response": True}).sampling == {}


def test_a_tasks_defaults_are_overridden_key_by_key():
    params = parse(sampling_parameters='{"top_k": 3}').params({"top_k": 9, "max_tokens": 5})
    assert (params.top_k, params.max_tokens) == (3, 5)


def test_a_missing_seed_is_drawn_and_a_given_one_is_kept():
    seeds = {parse().params({}).seed for _ in range(20)}
    assert len(seeds) == 20 and None not in seeds
    assert parse({"seed": 7}).params({}).seed == 7 and parse().params({"seed": 8}).seed == 8


def test_the_input_is_echoed_only_when_asked_for():
    assert parse(exclude_input_in_output=True).echo == parse().echo == ""
    assert parse(exclude_input_in_output=False).echo == "hi"
    assert "exclude_input_in_output" in refused(exclude_input_in_output=False, stream=True)


def test_a_deadline_is_no_sampling_parameter():
    request = parse({"deadline_s": 2.5})
    assert request.deadline_s == 2.5 and request.sampling == {}


def test_who_asks_and_why_is_no_sampling_parameter():
    trace = {"traceparent": "00-a-b-01", "tracestate": "x=y"}
    request = parse_request(tensors(text_input="hi"), {"api_key": "sun-k", "id": "web-7", **trace}, "web-7")
    assert (request.api_key, request.id, request.trace, request.sampling) == ("sun-k", "web-7", trace, {})
    assert "sun-k" not in repr(request)


@pytest.mark.parametrize(("given", "key"), [
    ({"authorization": "Bearer sun-k"}, "sun-k"), ({"authorization": "bearer sun-k "}, "sun-k"), ({"authorization": "Basic sun-k"}, None),
    ({"authorization": "Bearer sun-other", "api_key": "sun-k"}, "sun-k"), ({"authorization": 7}, None), ({}, None),
])
def test_a_key_comes_as_a_parameter_or_a_forwarded_header(given, key):
    request = parse(given)
    assert request.api_key == key and request.sampling == {}


def test_a_key_that_is_no_text_is_refused():
    assert refused({"api_key": 7}).startswith("api_key: ")


def test_a_long_id_is_cut():
    assert len(parse_request(tensors(text_input="hi"), {}, "x" * 100_000).id) == 128


@pytest.mark.parametrize("value", [0, -1, 86400, math.nan, math.inf, "5", True, None, [1]])
def test_a_bad_deadline_is_refused(value):
    if value is None:
        assert parse({"deadline_s": None}).deadline_s is None
    else:
        assert refused({"deadline_s": value}).startswith("deadline_s: ")


def test_a_handover_comes_whole_or_not_at_all():
    request = parse(ticket=[b"ticket", b"kv"], prompt_ids=[1, 2, 3])
    assert request.handover.prompt == [1, 2, 3] and request.handover.shipment == [b"ticket", b"kv"]
    assert refused(ticket=[b"ticket"]).startswith("ticket: ")
    assert refused(prompt_ids=[1]).startswith("ticket: ")
    assert refused(ticket=[], prompt_ids=[1]).startswith("ticket: ")
    assert refused(ticket=[b"t"], prompt_ids=[]).startswith("ticket: ")
    assert parse().handover is None


@pytest.mark.parametrize(("inputs", "field"), [
    ({"text_input": ""}, "text_input"),
    ({"text_input": " \n\t"}, "text_input"),
    ({"text_input": b"\xff\xfe"}, "text_input"),
    ({"text_input": ["a", "b"]}, "text_input"),
    ({"text_input": []}, "text_input"),
    ({"text_input": "x" * (MAX_TEXT_BYTES + 1)}, "text_input"),
    ({"messages": '[{"role": "user", "content": "hi"}]'}, "messages"),
    ({"text_input": "", "messages": "[{"}, "messages"),
    ({"text_input": "", "messages": "{}"}, "messages"),
    ({"text_input": "", "messages": "[]"}, "messages"),
    ({"text_input": "", "messages": "[" * 300_000}, "messages"),
    ({"text_input": "", "messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages"),
    ({"sampling_parameters": "{"}, "sampling_parameters"),
    ({"sampling_parameters": "[]"}, "sampling_parameters"),
    ({"sampling_parameters": "3"}, "sampling_parameters"),
    ({"sampling_parameters": '{"a":' * 200_000}, "sampling_parameters"),
    ({"sampling_parameters": '{"seed": ' + "9" * 5000 + "}"}, "sampling_parameters"),
    ({"text_input": "", "messages": "9" * 5000}, "messages"),
    ({"task": b"\xff"}, "task"),
    ({"task": ["a", "b"]}, "task"),
    ({"stream": [True, False]}, "stream"),
    ({"return_logprobs": []}, "return_logprobs"),
    ({"exclude_input_in_output": [True, True]}, "exclude_input_in_output"),
])
def test_a_bad_input_is_refused_naming_it(inputs, field):
    assert refused(**inputs).startswith(field)


def test_an_error_quotes_no_more_than_its_limit():
    error = refused(text_input="", messages=json.dumps([{"role": "x" * 100_000, "content": "hi"}]))
    assert error.startswith("messages[0].role: ") and len(error) <= MAX_ERROR + 3


def test_the_largest_text_is_taken():
    assert len(parse(text_input="x" * MAX_TEXT_BYTES).messages[0]["content"]) == MAX_TEXT_BYTES


@given(st.sampled_from([name for name, kind in INPUTS.items() if kind == "TYPE_STRING"]),
       st.binary(max_size=40) | st.sampled_from([b"[NaN]", b"1e999", b"null"]))
def test_random_bytes_in_a_text_are_read_or_refused_and_nothing_worse(name, data):
    try:
        request = parse_request(tensors(**{"text_input": "hi", name: data}), {})
        request.params({})
    except RequestError as error:
        assert error.code == "INVALID_ARG"
    except ValueError as error:
        assert str(error).startswith("sampling_parameters")


def test_no_input_at_all_is_refused():
    with pytest.raises(RequestError, match="^text_input: is empty"):
        parse_request({}, {})
