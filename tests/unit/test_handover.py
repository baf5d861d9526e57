"""Requests that come with a ticket, as the ensembles' do: they count for their ticket's task, and their KV goes however they end."""

from __future__ import annotations

import numpy as np
import pytest

from sun.router.errors import RequestError
from sun.router.request import Handover, came_with, parse_request
from sun.router.router import Limits

from .harness import OPEN_ENDED, TEXT, Answer, Service, eventually, files


def handover(service: Service, task: str) -> Handover:
    prompt = service.router.prompts.encode([{"role": "user", "content": TEXT}])
    return Handover(prompt, service.fleet.prefill(task, prompt[:-1]))


def ask(service: Service, task: str, **sampling) -> Answer:
    return service.ask(task=None, more={"handover": handover(service, task)}, **sampling)


def test_a_refused_handover_leaves_no_kv(serve, shm):
    service = serve(transport=shm, limits=Limits(max_inflight=1, max_tokens=512))
    gate = service.gate()
    running = service.ask(TEXT, **OPEN_ENDED)
    gate.wait_entered(1)
    assert [ask(service, "plain").error.code for _ in range(3)] == ["UNAVAILABLE"] * 3
    assert files(shm) == 1
    gate.open()
    assert running.whole.text is not None
    eventually(lambda: files(shm) == 0)


@pytest.mark.parametrize("sampling", ["{", '{"top_k": "many"}'])
def test_a_handover_of_a_malformed_request_leaves_no_kv(serve, shm, sampling):
    service, answer = serve(transport=shm), Answer()
    given = handover(service, "plain")
    inputs = {"text_input": np.array([b"hi"], object), "sampling_parameters": np.array([sampling.encode()], object),
              "ticket": np.array(given.shipment, object), "prompt_ids": np.array(given.prompt)}
    try:
        service.router.submit(parse_request(inputs, {}), answer)
    except RequestError as error:
        service.router.refuse(error, answer, handover=came_with(inputs))
    assert answer.error.code == "INVALID_ARG"
    eventually(lambda: files(shm) == 0)


def test_half_a_handover_is_none(serve):
    assert came_with({"ticket": np.array([b"x"], object)}) is None


def test_handovers_count_for_their_tickets_task(serve, shm):
    service = serve(transport=shm, limits=Limits(max_inflight=4, max_tokens=512))
    gate = service.gate()
    flood = [ask(service, "plain", **OPEN_ENDED) for _ in range(3)]
    eventually(lambda: service.router.inflight == 3)
    assert "task 'plain'" in str(service.ask(TEXT, "plain").error), "by name or by ticket: it is the same task"
    other = ask(service, "lora")
    gate.open()
    assert other.whole.text is not None
    for answer in flood:
        answer.wait()
