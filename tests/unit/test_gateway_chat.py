"""Bodies of /v1/chat/completions: what `sun` is asked for them, and how its pieces become OpenAI's objects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.decode.params import sampling_params
from sun_client.errors import SunError
from sun_client.gateway.answers import Answer
from sun_client.gateway.chat import IGNORED, NEUTRAL, SAMPLING, ChatRequest, parse
from sun_client.gateway.errors import ApiError, api_error
from sun_client.wire import Piece

MESSAGES = [{"role": "user", "content": "hello"}]
BODY = {"model": "bash", "messages": MESSAGES}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
FIELDS = [*SAMPLING, *IGNORED, *NEUTRAL, "model", "messages", "n", "stream", "stream_options", "logprobs", "top_logprobs", "max_completion_tokens",
          "deadline_s", "priority_class"]


def refusal(**fields) -> ApiError:
    """The error for the good body with these fields."""
    with pytest.raises(ApiError) as caught:
        parse({**BODY, **fields})
    return caught.value


def test_a_body_becomes_sampling_keys_by_their_own_names():
    asked = parse({**BODY, "temperature": 0, "stop": "x", "max_tokens": 5, "max_completion_tokens": 7, "top_k": 3, "user": "me", "seed": None, "tools": [],
                   "response_format": {"type": "text"}, "deadline_s": 2, "priority_class": "low", "logprobs": True, "top_logprobs": 2})
    assert asked.task == "bash" and asked.messages == MESSAGES
    assert asked.sampling == {"temperature": 0, "stop": "x", "max_tokens": 7, "top_k": 3, "logprobs": 2}
    assert asked.parameters == {"deadline_s": 2.0, "priority_class": "low"}


@pytest.mark.parametrize("field, value, param", [
    ("model", None, "model"), ("model", 5, "model"), ("messages", [], "messages"), ("messages", ["x"], "messages[0]"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"), ("messages", [{"content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
    ("messages", [{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ("n", 0, "n"), ("n", True, "n"), ("n", 17, "n"), ("stream", 1, "stream"), ("stream_options", {}, "stream_options"),
    ("top_logprobs", 2, "top_logprobs"), ("logprobs", 2, "logprobs"), ("tools", [{}], "tools"), ("tool_choice", "auto", "tool_choice"),
    ("response_format", {"type": "json_object"}, "response_format"), ("functions", [{}], "functions"), ("audio", {}, "audio"),
    ("logit_bias", {"1": 2}, "logit_bias"), ("deadline_s", "soon", "deadline_s"), ("temprature", 1, "temprature"),
])
def test_what_cannot_be_done_is_refused_by_the_fields_name(field, value, param):
    error = refusal(**{field: value})
    assert (error.status, error.param) == (400, param) and error.message.startswith(f"{param}: ")
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}


def test_parts_null_and_developer_become_plain_messages():
    asked = parse({"model": "m", "messages": [
        {"role": "developer", "content": "short"}, {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": None}, {"role": "user", "content": "c"}]})
    assert asked.messages == [{"role": "system", "content": "short"}, {"role": "user", "content": "a\nb"},
                              {"role": "assistant", "content": ""}, {"role": "user", "content": "c"}]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), JSON)
def test_any_json_is_a_request_or_a_400_that_names_a_field(fields, anything):
    for body in ({**BODY, **fields}, anything):
        try:
            assert isinstance(parse(body), ChatRequest)
        except ApiError as error:
            assert error.status == 400 and error.param


def test_openais_ranges_are_taken_whole_and_its_settings_without_an_effect_ignored():
    asked = parse({**BODY, "top_p": 0, "seed": -1, "verbosity": "low", "prompt_cache_options": {}, "temperature": 1})
    params = sampling_params(asked.sampling)
    assert params.seed == 2**63 - 1 and 0 < params.top_p < 1e-6
    assert parse({**BODY, "seed": -(2**63)}).sampling["seed"] == 0
    assert [asked.choice(i)["seed"] for i in range(2)] == [2**63 - 1, 0]


def test_choices_with_a_seed_have_seeds_of_their_own():
    asked = parse({**BODY, "n": 3, "seed": 2**63 - 1})
    assert [asked.choice(i)["seed"] for i in range(3)] == [2**63 - 1, 0, 1]
    assert "seed" not in parse({**BODY, "n": 2}).choice(1)


@pytest.mark.parametrize("code, text, expected", [
    ("INVALID_ARG", "sampling_parameters.top_p: too large", (400, "top_p", None)),
    ("INVALID_ARG", "sampling_parameters.max_tokens: 9 on top of a prompt of 5 tokens is over the limit", (400, "max_completion_tokens", "context_length_exceeded")),
    ("INVALID_ARG", "text_input: the prompt has 9 tokens, the limit is 5", (400, "messages", "context_length_exceeded")),
    ("INVALID_ARG", "messages[1].role: expected one of", (400, "messages[1].role", None)),
    ("NOT_FOUND", "task: 'x' is not known", (404, "model", "model_not_found")),
    ("PERMISSION_DENIED", "task: this key may ask bash", (403, "model", "permission_denied")),
    ("UNAUTHENTICATED", "api_key: a valid key is needed", (401, None, "invalid_api_key")),
    ("UNAVAILABLE", "max_inflight: full; retry after 3 s", (429, None, "rate_limit_exceeded")),
    ("UNAVAILABLE", "the router is shutting down", (503, None, "unavailable")),
    ("DEADLINE", "deadline_s: not finished within 1 s", (504, None, "deadline_exceeded")),
    ("INTERNAL", "TypeError: x", (500, None, "internal_error")), ("UNKNOWN", "sun is not ready", (503, None, "unavailable")),
])
def test_the_servers_errors_keep_their_meaning(code, text, expected):
    error = api_error(SunError(text, code), {"max_tokens": "max_completion_tokens"})
    assert (error.status, error.param, error.code) == expected
    assert error.headers == ({"Retry-After": "3"} if error.status == 429 else {})


def pieces(texts: list[str]) -> list[Piece]:
    """An answer's pieces, one token each."""
    return [Piece(text, [i], [], 7, "stop" if i == len(texts) - 1 else None) for i, text in enumerate(texts)]


@given(st.lists(st.lists(st.text(), min_size=1), min_size=1, max_size=3), st.booleans())
def test_chunks_say_what_the_whole_answer_says(choices, include_usage):
    asked = ChatRequest("bash", MESSAGES, {}, {}, n=len(choices), stream=True, include_usage=include_usage)
    streamed, whole, chunks = Answer(asked, "id"), Answer(asked, "id"), []
    for index, texts in enumerate(choices):
        for piece in pieces(texts):
            chunks += streamed.chunks(index, piece)
            whole.add(index, piece)
    chunks += streamed.last()
    answer = whole.whole()
    for index, texts in enumerate(choices):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"] and mine[-1]["delta"] == {}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "".join(texts) == answer["choices"][index]["message"]["content"]
    assert [chunk["usage"] for chunk in chunks if chunk.get("usage")] == ([answer["usage"]] if include_usage else [])
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": sum(map(len, choices)), "total_tokens": 7 + sum(map(len, choices))}


def test_logprobs_are_openais():
    asked = parse({**BODY, "logprobs": True, "top_logprobs": 1})
    answer = Answer(asked, "id")
    entry = {"token_id": 5, "token": "é", "logprob": -0.5}
    answer.add(0, Piece("é", [5], [{**entry, "top": [entry]}], 3, "length"))
    shown = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    assert answer.whole()["choices"][0]["logprobs"] == {"content": [{**shown, "top_logprobs": [shown]}], "refusal": None}
