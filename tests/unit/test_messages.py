"""What routers and workers say to each other survives JSON, and what they do not say is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.decode.params import SamplingParams
from sun.messages import (
    Abort, Ack, Admit, Drain, GetStats, Load, Stats, StepEvents, StepRecord, TokenEvent, decode_reply, decode_request, encode,
)

ADMIT = Admit(id="a", router="r", task="t", prompt=[1, 2], params=SamplingParams(seed=2**63 - 1, stop=["é"]))
ids = st.text(max_size=8)
tokens = st.integers(0, 2**31)
numbers = st.floats(allow_nan=False, allow_infinity=False)
params = st.builds(
    SamplingParams, temperature=st.floats(0, 100), seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(st.text("aé🙂", min_size=1), max_size=2))
requests = st.one_of(
    st.builds(Admit, id=ids, router=ids, task=ids, prompt=st.lists(tokens, max_size=5), params=params, module=ids),
    st.builds(Abort, ids=st.lists(ids, max_size=3)), st.builds(GetStats, after=st.integers(0)),
    st.builds(Drain, key=ids, on=st.booleans(), evict=st.booleans()))
events = st.builds(
    TokenEvent, id=ids, token=st.none() | tokens, logprob=st.none() | numbers,
    top=st.none() | st.lists(st.tuples(tokens, numbers), max_size=2), finish=st.none() | ids, error=st.none() | ids)
loads = st.builds(Load, tokens, tokens, st.integers(-(2**31), 2**31), st.integers(0, 2**63 - 1))
replies = st.one_of(
    st.builds(Ack, load=loads, draining=st.booleans(), module=ids),
    st.builds(StepEvents, step=tokens, load=loads, events=st.lists(events, max_size=3)),
    st.builds(Stats, running=tokens, waiting=tokens, load=loads, free_tokens=tokens, budget_tokens=tokens, step=tokens,
              steps=st.lists(st.builds(StepRecord, step=tokens, ms=numbers, tasks=st.dictionaries(ids, tokens, max_size=2)), max_size=2),
              draining=st.booleans(), module=ids))


@given(requests)
def test_a_request_survives_json(request_):
    assert decode_request(encode(request_)) == request_


@given(replies)
def test_a_reply_survives_json(reply):
    assert decode_reply(encode(reply)) == reply


def test_a_message_is_json_that_a_person_can_write():
    assert decode_request(b'{"type": "stats"}') == GetStats()
    assert decode_request(b'{"type": "abort", "ids": ["a"]}') == Abort(ids=["a"])
    assert json.loads(encode(ADMIT))["params"]["stop"] == ["é"]


def test_an_event_without_extras_is_short():
    step = StepEvents(step=1, load=Load(2, 1, -3, 7), events=[TokenEvent(id="a", token=3)])
    assert encode(step) == b'{"type":"step","step":1,"load":{"tokens":2,"sequences":1,"room":-3,"at":7},"events":[{"id":"a","token":3}]}'


@pytest.mark.parametrize(("change", "name"), [
    ({"prompt": "hi"}, "prompt"), ({"prompt": [1, "2"]}, "prompt"), ({"id": 7}, "id"), ({"colour": 1}, "colour"),
    ({"params": {"temperature": -1}}, "temperature"),
    ({"params": {"max_tokens": 0}}, "max_tokens"), ({"params": {"temprature": 1}}, "temprature"),
    ({"params": {"min_tokens": 500}}, "min_tokens"),
    ({"type": "shout"}, "shout"),
])
def test_a_bad_field_of_a_request_is_named(change, name):
    with pytest.raises(ValueError, match=name):
        decode_request(json.dumps(json.loads(encode(ADMIT)) | change).encode())


@pytest.mark.parametrize("field", ["id", "router", "task", "prompt", "params"])
def test_a_missing_field_of_a_request_is_named(field):
    with pytest.raises(ValueError, match=field):
        decode_request(json.dumps({k: v for k, v in json.loads(encode(ADMIT)).items() if k != field}).encode())


@given(st.binary(max_size=100))
def test_random_bytes_are_no_request_and_nothing_worse(data):
    with pytest.raises(ValueError):
        decode_request(data)
