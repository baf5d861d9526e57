"""Whoever leaves frees what was held for him: the slot in the worker and the KV in shared memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import requests

from sun.handoff.shm import published
from tests.server.conftest import wait_until

ENDLESS = {"max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def test_cancel_in_mid_stream_frees_slot_and_ticket(client, idle):
    stream = client.stream("bash", "find big files", sampling=ENDLESS)
    next(stream)
    assert not idle()
    assert published()
    stream.close()
    assert wait_until(idle)


def test_cancel_of_one_leaves_the_others_alone(client, idle):
    kept = client.stream("math", "What is 2 plus 2?", sampling={**ENDLESS, "max_tokens": 60})
    gone = client.stream("bash", "find big files", sampling=ENDLESS)
    next(kept), next(gone)
    gone.close()
    assert sum(len(piece.token_ids) for piece in kept) == 59
    assert wait_until(idle)


def test_a_client_process_that_is_killed_frees_them_too(server, idle):
    code = (
        "from sun_client.client import SunClient\n"
        f"stream = SunClient('127.0.0.1:{server.ports.grpc}').stream('banking', 'hello there', sampling={ENDLESS})\n"
        "print(next(stream).text, flush=True)\n"
        "list(stream)")
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline()
    assert not idle()
    child.kill()
    child.wait()
    assert wait_until(idle)


def test_an_http_client_that_hangs_up_frees_them_too(http, idle):
    body = {"text_input": "hello", "task": "banking", "stream": True, **ENDLESS}
    response = requests.post(f"{http}/sun/generate_stream", json=body, stream=True)
    lines = response.iter_lines()  # held, because requests hangs up when it goes
    assert next(lines)
    assert not idle()
    response.close()
    assert wait_until(idle)


def test_a_deadline_ends_a_request_with_an_error_that_names_it(http, idle):
    started = time.monotonic()
    response = requests.post(f"{http}/sun/generate", json={"text_input": "hello", "task": "banking", "deadline_s": 1.0, **ENDLESS})
    assert time.monotonic() - started < 60, "3,000 tokens would take longer"
    assert response.status_code >= 400
    assert "deadline_s" in response.json()["error"]
    assert wait_until(idle)


@pytest.mark.parametrize("end", ["stop", "length"])
def test_a_finished_request_leaves_nothing(client, idle, end):
    sampling = {"max_tokens": 5, "temperature": 0} | ({"stop": ["e"]} if end == "stop" else {"ignore_eos": True})
    assert client.generate("identity", "Tell me about the sea.", sampling=sampling).finish_reason == end
    assert wait_until(idle)
