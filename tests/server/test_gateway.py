"""OpenAI's API in front of the server: what it answers is what gRPC does, and whoever leaves frees what was held for him."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import requests

from sun_client.server import Server
from tests.server.conftest import SHIPPED, free_ports, gateway, wait_until

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me about the sea."}]
BODY = {"model": "identity", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
SAMPLING = {"temperature": 0, "max_tokens": 12}
ENDLESS = {**BODY, "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    """Where the gateway is."""
    with gateway(f"127.0.0.1:{server.ports.grpc}") as address:
        yield address


@pytest.fixture
def chat(address: str) -> str:
    """Where it takes chat completions."""
    return f"{address}/v1/chat/completions"


def events(response: requests.Response) -> list[dict]:
    """The chunks of a stream, which must end as it should."""
    lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def test_whole_and_streamed_it_is_the_text_of_grpc(client, server, chat):
    expected = client.generate("identity", messages=MESSAGES, sampling=SAMPLING)
    answer = requests.post(chat, json=BODY).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None} and choice["finish_reason"] == expected.finish_reason
    usage = {"prompt_tokens": expected.num_input_tokens, "completion_tokens": expected.num_output_tokens,
             "total_tokens": expected.num_input_tokens + expected.num_output_tokens}
    assert answer["usage"] == usage
    *chunks, last = events(requests.post(chat, json={**BODY, "stream": True, "stream_options": {"include_usage": True}}, stream=True))
    assert len(chunks) > 4 and "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    assert last["usage"] == usage and chunks[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    assert wait_until(lambda: answer["id"] in server.request_log.read_text() and last["id"] in server.request_log.read_text())


def test_choices_stop_and_logprobs(client, chat):
    text = client.generate("identity", messages=MESSAGES, sampling=SAMPLING).text
    stop = text[5:9]
    answer = requests.post(chat, json={**BODY, "n": 2, "stop": stop}).json()
    assert [(choice["index"], choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]] == [
        (index, text.split(stop)[0], "stop") for index in range(2)]
    answer = requests.post(chat, json={**BODY, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 5, "max_tokens": None}).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"] == 5
    assert "".join(entry["token"] for entry in content) == answer["choices"][0]["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
    drawn = {**BODY, "temperature": 1, "n": 2, "seed": 5, "max_tokens": 8}
    first, second = (requests.post(chat, json=drawn).json()["choices"] for _ in range(2))
    assert first[0]["message"] != first[1]["message"] and first == second


@pytest.mark.parametrize("more, status, param, code", [
    ({"top_p": 2}, 400, "top_p", None), ({"max_completion_tokens": 100_000}, 400, "max_completion_tokens", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", None), ({"model": "poetry"}, 404, "model", "model_not_found"),
    ({"tools": [{"type": "function"}]}, 400, "tools", None), ({"priority_class": "urgent"}, 400, "priority_class", None),
])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_has_its_status_and_names_the_field(chat, more, status, param, code, stream):
    response = requests.post(chat, json={**BODY, **more, "stream": stream})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


def test_a_deadline_is_a_status_of_its_own_or_the_last_event_of_what_has_begun(chat):
    late = {**BODY, "deadline_s": 0.01, "max_tokens": 2000, "ignore_eos": True}
    response = requests.post(chat, json=late)
    assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    events = requests.post(chat, json={**late, "stream": True}).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_models_are_the_tasks(address):
    assert [model["id"] for model in requests.get(f"{address}/v1/models").json()["data"]] == sorted((*SHIPPED, "identity"))
    assert requests.get(f"{address}/health").status_code == 200


def test_a_client_that_leaves_frees_slot_and_ticket(chat, idle):
    response = requests.post(chat, json={**ENDLESS, "n": 2}, stream=True)
    lines = response.iter_lines()  # held, because requests hangs up when it goes
    assert next(lines) and not idle()
    response.close()
    assert wait_until(idle)
    with pytest.raises(requests.Timeout):
        requests.post(chat, json={**ENDLESS, "stream": False}, timeout=0.5)
    assert wait_until(idle)


def test_the_command_serves_and_on_sigterm_lets_its_streams_end(server, client):
    port = free_ports().http
    command = [sys.executable, "-m", "sun_client.cli", "gateway", "--port", str(port), "--url", f"127.0.0.1:{server.ports.grpc}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert f"http://127.0.0.1:{port}/v1" in child.stdout.readline()
        response = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={**BODY, "ignore_eos": True, "max_tokens": 40, "stream": True}, stream=True)
        child.send_signal(signal.SIGTERM)
        assert sum("content" in chunk["choices"][0]["delta"] for chunk in events(response)) > 10
        assert child.wait(20) == 0


def test_openais_own_client(address, client):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    expected = client.generate("identity", messages=MESSAGES, sampling=SAMPLING).text
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as asking:
        assert "identity" in [model.id for model in asking.models.list()]
        answer = asking.chat.completions.create(**BODY, logprobs=True)
        assert answer.choices[0].message.content == expected and answer.choices[0].logprobs.content
        chunks = list(asking.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 5}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage == answer.usage
        with pytest.raises(openai.NotFoundError, match="poetry"):
            asking.chat.completions.create(**{**BODY, "model": "poetry"})
        with pytest.raises(openai.BadRequestError) as caught:
            asking.chat.completions.create(**BODY, top_p=2)
        assert caught.value.param == "top_p"
