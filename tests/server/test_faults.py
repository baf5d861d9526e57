"""Processes are killed or stopped under load: what can go on goes on with the same text, all else ends with an error, and the supervisor heals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sun.stubs import Stubs
from sun_build.config_file import set_parameter
from sun_client.client import SunClient
from sun_client.errors import ServerError, SunError
from sun_client.replacement import Replacement
from sun_client.server import Server
from sun_client.supervisor import Supervisor
from tests.server.conftest import SHIPPED, free_ports, wait_until

PROMPT = "find big files"
SAMPLINGS = ({"temperature": 0}, {"temperature": 0.9, "seed": 5})
LENGTH = {"max_tokens": 40, "ignore_eos": True}
HEAL_S = 60.0


class Watched:
    """A server with its supervisor, which looks after it in this thread while `work` runs in others."""

    def __init__(self, server: Server):
        self.server, self.said = server, []
        self.supervisor = Supervisor(server, self.said.append)
        self.pool = ThreadPoolExecutor(16)

    def ask(self, task: str, sampling: dict, begun: threading.Event | None = None) -> Future[list[int]]:
        """The tokens of a streamed answer. begun: is set when there is one, or none will come."""
        begun = begun or threading.Event()

        def tokens() -> list[int]:
            found: list[int] = []
            try:
                with SunClient(f"127.0.0.1:{self.server.ports.grpc}") as client:
                    for piece in client.stream(task, PROMPT, sampling={**LENGTH, **sampling}, timeout=120):
                        begun.set()
                        found += piece.token_ids
            finally:
                begun.set()
            return found
        return self.pool.submit(tokens)

    def ask_all(self) -> dict[tuple[str, int], Future[list[int]]]:
        """Every task, greedy and seeded, all at once but for their prompts.

        No two prompts of a task are prefilled together: the last token of a whole prompt is never kept, it rounds by what runs with it, and a
        low-bit module may answer otherwise then, with nothing mixed.
        """
        answers = {}
        for i, sampling in enumerate(SAMPLINGS):
            begun = {task: threading.Event() for task in SHIPPED}
            answers |= {(task, i): self.ask(task, sampling, begun[task]) for task in SHIPPED}
            assert all(event.wait(HEAL_S) for event in begun.values())
        return answers

    def running(self, worker: str) -> bool:
        """Whether a worker decodes now."""
        with SunClient(f"127.0.0.1:{self.server.ports.grpc}") as client:
            return client.worker_stats(worker).running > 0

    def kill(self, *models: str) -> None:
        """SIGKILL to models' processes."""
        for model in models:
            for pid in Stubs(self.server.pid).pids(model):
                os.kill(pid, signal.SIGKILL)

    def stop(self, model: str) -> None:
        """SIGSTOP to a model's processes."""
        for pid in Stubs(self.server.pid).pids(model):
            os.kill(pid, signal.SIGSTOP)

    def until(self, holds: Callable[[], bool]) -> None:
        """Let the supervisor look until ``holds``."""
        def look() -> bool:
            self.supervisor.look()
            return holds()
        assert wait_until(look, HEAL_S), self.said

    def healed(self, *models: str) -> None:
        """Let the supervisor look until these models are said to serve again."""
        self.until(lambda: all(any(line.startswith(f"model {model}: serves again") for line in self.said) for model in models))


@pytest.fixture(scope="module")
def watched(root: Path) -> Iterator[Watched]:
    """A server of its own for the tests of this file, on the repository of all; its workers share the work evenly, so that each has something to lose."""
    config = root / "model_repository" / "sun" / "config.pbtxt"
    packing = config.read_text()
    set_parameter(config, "policy", "least_tokens")
    with Server(root, free_ports()) as server:
        watched = Watched(server)
        yield watched
        watched.pool.shutdown()
        server.stop(drain_s=0)  # Triton waits for streams of the killed
    config.write_text(packing)
    assert server.leftovers() == []


@pytest.fixture(scope="module")
def expected(watched: Watched) -> dict[tuple[str, int], list[int]]:
    """The tokens of an undisturbed run."""
    return {key: future.result() for key, future in watched.ask_all().items()}


def test_a_killed_decode_workers_streams_go_on_with_the_same_text_and_it_comes_back(watched, expected):
    answers = watched.ask_all()
    assert wait_until(lambda: watched.running("decode_0"))
    watched.kill("decode_0")
    assert {key: future.result() for key, future in answers.items()} == expected
    watched.healed("decode_0")
    assert wait_until(lambda: "decode worker decode_0 is back" in watched.server.log.read_text())
    answers = watched.ask_all()
    assert wait_until(lambda: watched.running("decode_0"))
    assert {key: future.result() for key, future in answers.items()} == expected


def test_with_all_workers_killed_or_stopped_streams_wait_for_the_supervisor_and_go_on(watched, expected):
    watched.said.clear()
    answers = watched.ask_all()
    assert wait_until(lambda: watched.running("decode_0") and watched.running("decode_1"))
    watched.kill("decode_0")
    watched.stop("decode_1")
    with SunClient(f"127.0.0.1:{watched.server.ports.grpc}") as client, pytest.raises(SunError) as late:
        client.generate("bash", PROMPT, deadline_s=1.0)
    assert late.value.code == "DEADLINE"
    watched.healed("decode_0", "decode_1")
    assert {key: future.result() for key, future in answers.items()} == expected


def test_a_stopped_or_killed_prefills_requests_go_on_when_it_is_back_and_others_notice_nothing(watched, expected):
    watched.said.clear()
    long = {"math": watched.ask("math", {"temperature": 0})}
    watched.stop("prefill_bash")
    asked = watched.ask("bash", {"temperature": 0})
    assert long["math"].result() == expected["math", 0]
    watched.kill("prefill_bash")
    later = watched.ask("bash", {"temperature": 0})
    watched.healed("prefill_bash")
    assert asked.result() == later.result() == expected["bash", 0]


def test_the_decode_module_is_replaced_while_streams_go_on_and_none_mixes_two(watched, expected, root):
    configs = {path.parent.name: path for path in sorted((root / "model_repository").glob("decode_*/config.pbtxt"))}
    before = {path: path.read_text() for path in configs.values()}
    done, answers = threading.Event(), []

    def ask_on() -> None:
        while not done.is_set():
            answers.append(watched.ask_all())
            for answer in answers[-1].values():
                answer.exception()

    def replace(**values: str) -> None:
        Replacement(watched.server.control, configs, values, HEAL_S, lambda line: None).run()

    asking = watched.pool.submit(ask_on)
    try:
        with pytest.raises(ServerError, match="kv_tokens(?s:.)*decode_0 serves as before; replaced before it: none"):
            replace(kv_tokens="few")
        assert {path: path.read_text() for path in configs.values()} == before
        replace(scheme="int4")
    finally:
        done.set()
        asking.result()
        for path, text in before.items():
            path.write_text(text)  # for the other servers of this repository
    after = {key: future.result() for key, future in watched.ask_all().items()}
    assert after != expected and len(answers) > 2
    for answer in answers:
        for key, future in answer.items():
            assert future.result() in (expected[key], after[key]), "two modules in one answer"


@pytest.mark.parametrize("victim", ["router", "server"])
def test_when_router_or_server_die_streams_end_with_an_error_and_all_is_started_anew(watched, expected, victim):
    watched.said.clear()
    answer = watched.ask("math", {"max_tokens": 3000})
    assert wait_until(lambda: watched.running("decode_0") or watched.running("decode_1"))
    if victim == "router":
        watched.kill("sun")
    else:
        os.kill(watched.server.pid, signal.SIGKILL)
    watched.until(lambda: "the server serves again" in watched.said)
    assert "Started" in watched.server.earlier_log.read_text()
    with pytest.raises(SunError):
        answer.result(timeout=HEAL_S)
    assert watched.ask("math", {"temperature": 0}).result() == expected["math", 0]
