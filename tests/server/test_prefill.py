"""What is wrong with one prefill module, its tickets or its queue harms no other task, and its own requests no longer than needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from sun.handoff.shm import published
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.config_file import set_parameter
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.metrics import read, total
from sun_client.server import Server
from tests.server.conftest import REPO, free_ports, make_root, wait_until
from tests.server.test_bad_input import grpc_error
from tests.server.test_faults import Watched
from tests.unit import tiny

MODEL = '''
import sys
import threading
from pathlib import Path

sys.path.append({backends!r})
from sun_prefill.model import TritonPythonModel as Prefill

class TritonPythonModel(Prefill):
    """Its passes do not end while the file is there when they begin."""

    def initialize(self, args):
        super().initialize(args)
        run = self.engine.executor.run

        def stuck(chunks):
            if Path({hang!r}).exists():
                Path({hang!r} + ".begun").touch()
                threading.Event().wait()
            run(chunks)

        self.engine.executor.run = stuck
'''
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


LIMIT, WAITING = 200, 300
"""Tokens of tickets that the task `plain` may have, and of one task's requests that may wait."""


class Tiny(Watched):
    """A watched server of a tiny base, whose task `stuck` hangs while the file ``hang`` is there."""

    def __init__(self, server: Server, hang: Path):
        super().__init__(server)
        self.hang = hang

    def answer(self, task: str, **how) -> list[int]:
        """The tokens of an answer."""
        with SunClient(f"127.0.0.1:{self.server.ports.grpc}") as client:
            return client.generate(task, "tell me", sampling=GREEDY, timeout=120, **how).token_ids

    def waiting(self) -> float:
        """Requests of the task `stuck` without a worker."""
        return total(read(f"127.0.0.1:{self.server.ports.metrics}"), "sun_num_requests_waiting", task="stuck")

    def prefill(self, prompt: list[int]) -> requests.Response:
        """What the module of the task `plain` says to a prompt when it is asked itself."""
        url = f"http://127.0.0.1:{self.server.ports.http}/v2/models/prefill_plain/infer"
        return requests.post(url, json={"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [len(prompt)], "data": prompt}]})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """It."""
    tmp_path = tmp_path_factory.mktemp("tiny")
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    root, hang = make_root(tmp_path / "root", tmp_path / "base", ("sun", "decode_0")), tmp_path / "hang"
    for task in ("plain", "stuck"):
        tiny.task(root / "model_repository", tmp_path / "base", task)
    folder = root / "model_repository" / "prefill_stuck"
    (folder / "1" / "model.py").write_text(MODEL.format(hang=str(hang), backends=str(REPO / "backends")))
    for task, backend, parameters in (("stuck", "python", {"hang_s": 3}), ("plain", "sun_prefill", {"max_ticket_tokens": LIMIT})):
        config = root / "model_repository" / f"prefill_{task}" / "config.pbtxt"
        config.write_text(f'backend: "{backend}"\n')
        for name, value in parameters.items():
            set_parameter(config, name, str(value))
    set_parameter(root / "model_repository" / "sun" / "config.pbtxt", "max_task_queued_tokens", str(WAITING))
    with Server(root, free_ports()) as server:
        yield Tiny(server, hang)
        server.stop(drain_s=0)  # Triton waits for calls of the dead
    assert server.leftovers() == []


def test_a_prefill_that_hangs_ends_itself_and_its_requests_go_on_when_it_is_back(served):
    expected = {task: served.answer(task) for task in ("plain", "stuck")}
    served.hang.touch()
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(served.answer, "stuck") for _ in range(3)]
        assert wait_until(served.hang.with_name("hang.begun").exists)
        assert served.answer("plain") == expected["plain"]
        served.hang.unlink()
        served.healed("prefill_stuck")
        assert [answer.result() for answer in held] == [expected["stuck"]] * 3
    log = served.server.log.read_text()
    assert "Timeout" in log and "in stuck" in log


def test_what_waits_is_bounded_by_task_and_the_rest_refused_at_once_with_when_to_come_back(served):
    expected = served.answer("stuck")
    with SunClient(f"127.0.0.1:{served.server.ports.grpc}") as client:
        fits = WAITING // (client.generate("stuck", "tell me", sampling=GREEDY).num_input_tokens + GREEDY["max_tokens"])
    served.server.control.unload("prefill_stuck")
    with ThreadPoolExecutor(fits) as pool:
        assert pool.submit(served.answer, "stuck", deadline_s=0.3).exception().code == "DEADLINE"
        held = [pool.submit(served.answer, "stuck") for _ in range(fits)]
        assert wait_until(lambda: served.waiting() == fits)
        with pytest.raises(SunError, match=f"max_task_queued_tokens: .*'stuck'.* over the limit of {WAITING}; retry after") as refused:
            served.answer("stuck")
        assert refused.value.code == "UNAVAILABLE" and refused.value.retry_after_s >= 1
        assert served.answer("plain")
        served.server.control.load("prefill_stuck")
        assert [answer.result() for answer in held] == [expected] * fits


def test_kv_that_has_changed_since_its_prefill_gives_no_token(served):
    prompt, before = [5, 9, 7, 30], published()
    (part,) = served.prefill(prompt[:-1]).json()["outputs"]
    (path,) = set(published()) - set(before)
    with path.open("r+b") as kv:
        first = kv.read(1)[0]
        kv.seek(0)
        kv.write(bytes([first ^ 1]))
    error = grpc_error(served.server.ports.grpc, {
        "text_input": "tell me", "ticket": part["data"][0], "prompt_ids": np.array(prompt), "sampling_parameters": json.dumps(GREEDY)})
    assert error is not None and "checksum" in error
    assert wait_until(lambda: not path.exists()), "it must go with its request, and not with its lease, which is three times as long"
    assert served.answer("plain")


def test_tickets_that_nobody_claims_are_bounded_and_harm_no_other_task(served):
    answers = [served.prefill([1] * (LIMIT // 4)) for _ in range(6)]
    assert [answer.status_code for answer in answers[:4]] == [200] * 4
    for answer in answers[4:]:
        assert answer.status_code == 503 and "no room for the KV of 50 tokens (shm): max_ticket_tokens: " in answer.json()["error"]
    with pytest.raises(SunError, match="prefill_plain: .*no room for the KV.*max_ticket_tokens") as refused:
        served.answer("plain")
    assert refused.value.code == "UNAVAILABLE"
    assert served.answer("stuck")
