"""Bad input gets an error that names the field and the limit, over gRPC and HTTP, and the next request works."""

from __future__ import annotations

import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from sun_client.client import SunClient
from sun_client.errors import SunError

GOOD = {"text_input": "hello", "task": "bash", "sampling_parameters": '{"max_tokens": 2, "temperature": 0}'}


def sampling(text: str) -> dict:
    """GOOD with these sampling parameters."""
    return {**GOOD, "sampling_parameters": text}


BAD = {
    "unknown task": ({**GOOD, "task": "poetry"}, ["task", "poetry", "banking"]),
    "no task": ({k: v for k, v in GOOD.items() if k != "task"}, ["task", "banking"]),
    "task that is a path": ({**GOOD, "task": "../bash"}, ["task"]),
    "empty prompt": ({**GOOD, "text_input": ""}, ["text_input"]),
    "blank prompt": ({**GOOD, "text_input": "  \n"}, ["text_input"]),
    "prompt too long": ({**GOOD, "text_input": "word " * 5000}, ["text_input", "4095"]),
    "prompt of 5 MB": ({**GOOD, "text_input": "x" * 5_000_000}, ["text_input", "1048576"]),
    "text and messages": ({**GOOD, "messages": '[{"role": "user", "content": "hi"}]'}, ["messages", "text_input"]),
    "messages not JSON": ({"task": "bash", "messages": "[{"}, ["messages", "JSON"]),
    "messages without role": ({"task": "bash", "messages": '[{"content": "hi"}]'}, ["messages[0].role"]),
    "messages that end with the assistant": ({"task": "bash", "messages": '[{"role": "assistant", "content": "hi"}]'}, ["messages[0].role"]),
    "max_tokens 0": (sampling('{"max_tokens": 0}'), ["max_tokens", "1"]),
    "max_tokens beyond the budget": (sampling('{"max_tokens": 100000}'), ["max_tokens", "at most"]),
    "temperature NaN": (sampling('{"temperature": NaN}'), ["temperature", "finite"]),
    "temperature below 0": (sampling('{"temperature": -1}'), ["temperature", "0"]),
    "top_p 2": (sampling('{"top_p": 2}'), ["top_p", "1.0"]),
    "top_k not a number": (sampling('{"top_k": "many"}'), ["top_k", "int"]),
    "min_tokens over max_tokens": (sampling('{"min_tokens": 9, "max_tokens": 3}'), ["min_tokens", "9", "3"]),
    "too many stops": (sampling('{"stop": ["a","b","c","d","e","f","g","h","i","j","k","l","m","n","o","p","q"]}'), ["stop", "16"]),
    "malformed JSON": (sampling('{"max_tokens": '), ["sampling_parameters", "JSON"]),
    "JSON that is no object": (sampling("[1]"), ["sampling_parameters", "object"]),
    "deep JSON": (sampling("[" * 100_000), ["sampling_parameters", "JSON"]),
    "unknown sampling key": (sampling('{"temprature": 1}'), ["temprature"]),
    "not UTF-8": ({**GOOD, "text_input": b"\xff\xfe"}, ["text_input", "UTF-8"]),
    "wrong dtype": ({**GOOD, "text_input": np.array([1], dtype=np.int32)}, ["text_input", "INT32"]),
    "wrong shape": ({**GOOD, "text_input": np.array(["a", "b"], dtype=np.object_)}, ["text_input", "2"]),
    "wrong rank": ({**GOOD, "text_input": np.array([["a"]], dtype=np.object_)}, ["text_input"]),
    "ticket alone": ({**GOOD, "ticket": b"{}"}, ["ticket", "prompt_ids"]),
    "forged ticket": ({**GOOD, "ticket": b"{}", "prompt_ids": np.array([1, 2])}, ["ticket.version"]),
}


def tensor(module, name: str, value):
    """An input of either client's module."""
    array = value if isinstance(value, np.ndarray) else np.array([value.encode() if isinstance(value, str) else value], dtype=np.object_)
    made = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def grpc_error(port: int, values: dict) -> str | None:
    """The error of a gRPC stream request, None if it was answered."""
    seen = []
    with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.start_stream(lambda result, error: seen.append(error))
        client.async_stream_infer("sun", [tensor(grpcclient, name, value) for name, value in values.items()])
        client.stop_stream()
    return seen[0] and seen[0].message()


@pytest.mark.parametrize("case", BAD)
def test_over_grpc(server, case):
    values, words = BAD[case]
    error = grpc_error(server.ports.grpc, values)
    assert error is not None
    assert [word for word in words if word not in error] == [], error
    assert grpc_error(server.ports.grpc, GOOD) is None


@pytest.mark.parametrize("case", [name for name, (values, _) in BAD.items() if all(isinstance(v, str) for v in values.values())])
def test_over_http(http, case):
    values, words = BAD[case]
    response = requests.post(f"{http}/sun/generate", json=values)
    assert 400 <= response.status_code < 600
    error = response.json()["error"]
    assert [word for word in words if word not in error] == [], error
    assert requests.post(f"{http}/sun/generate", json=GOOD).status_code == 200


@pytest.mark.parametrize("body, words", [
    (b"{", ["JSON"]),
    (b'{"text_input": "hi", "task": "bash", "temprature": 1}', ["temprature"]),
    (b'{"text_input": "hi", "task": "bash", "top_p": 2}', ["top_p", "1.0"]),
    (b'{"text_input": 5, "task": "bash"}', ["string"]),  # Triton's own parser, which names no field
    (b'{"text_input": ["a", "b"], "task": "bash"}', ["text_input", "2"]),
    (b'{"text_input": "hi", "task": "bash", "deadline_s": 0}', ["deadline_s", "86400"]),
], ids=["malformed", "unknown key", "top-level top_p", "a number for a text", "two texts", "deadline 0"])
def test_http_bodies(http, body, words):
    response = requests.post(f"{http}/sun/generate", data=body)
    assert 400 <= response.status_code < 600
    assert [word for word in words if word not in response.text] == [], response.text
    assert requests.post(f"{http}/sun/generate", json=GOOD).status_code == 200


def test_refusals_on_many_new_connections_leave_the_server_alive(server):
    for _ in range(100):
        with SunClient(f"127.0.0.1:{server.ports.grpc}") as client, pytest.raises(SunError, match="^messages: ") as error:
            client.generate("bash", "hello", messages=[])
        assert error.value.code == "INVALID_ARG"
    assert server.running and grpc_error(server.ports.grpc, GOOD) is None


@pytest.mark.parametrize("given, words", [({"priority_class": "urgent"}, "priority_class: must be one of high, normal, low"), ({"deadline_s": 0}, "deadline_s: must be more than 0")])
def test_the_clients_own_arguments_are_checked_too(client, given, words):
    with pytest.raises(SunError, match=words) as error:
        client.generate("bash", "hello", **given)
    assert error.value.code == "INVALID_ARG"


def test_a_decoupled_model_refuses_infer_and_says_so(server):
    with pytest.raises(InferenceServerException, match="decoupled"):
        httpclient.InferenceServerClient(f"127.0.0.1:{server.ports.http}").infer("sun", [tensor(httpclient, n, v) for n, v in GOOD.items()])


def test_an_ensemble_names_the_field_too(http):
    response = requests.post(f"{http}/bash/generate", json={"text_input": "hi", "sampling_parameters": '{"top_p": 2}'})
    assert response.status_code >= 400
    assert "top_p" in response.json()["error"]


@pytest.mark.parametrize("message, words", [(b"{", ["message"]), (b'{"type": "admit"}', ["message", "id"]), (b"", ["message"])])
def test_a_decode_worker_refuses_a_bad_message(server, message, words):
    seen = []
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as client:
        client.start_stream(lambda result, error: seen.append(error))
        client.async_stream_infer("decode_0", [tensor(grpcclient, "message", message)])
        client.stop_stream()
    assert [word for word in words if word not in seen[0].message()] == []


def test_a_ticket_that_the_worker_refuses_is_the_clients_own_fault(http):
    ticket = requests.post(f"{http}/prefill_math/generate", json={"input_ids": [1, 2, 3]}).json()["ticket"]
    response = requests.post(f"{http}/sun/generate", json={"text_input": "hi", "task": "math", "ticket": ticket, "prompt_ids": [1, 2, 3]})
    assert response.status_code == 400 and "ticket.tokens: got 3" in response.text
