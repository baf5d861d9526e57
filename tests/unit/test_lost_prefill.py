"""A prefill module that dies or is away costs its requests a pause: they wait in the queue until it is back, and run once more."""

from __future__ import annotations

import threading

import pytest

from sun.local import LocalFleet
from sun.router.errors import Absent, Gone
from sun.router.router import Limits

from . import tiny
from .harness import PATIENCE_S, TEXT, eventually, files


class Fragile(LocalFleet):
    """A fleet whose prefill modules can die: prompts that ``dying`` names take their module along, for whose return a test has to say."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.dying: dict[str, int] = {}
        self.away: set[str] = set()
        self.loading: set[str] = set()
        self.begun: list[str] = []
        self.held = threading.Event()
        self.held.set()

    def prefill(self, task, ids):
        if task in self.away | self.loading:
            raise Absent(f"prefill_{task}: has no process")
        self.begun.append(task)
        assert self.held.wait(PATIENCE_S)
        if self.dying.get(task, 0):
            self.dying[task] -= 1
            self.away.add(task)
            raise Gone(f"prefill_{task}: its process died")
        return super().prefill(task, ids)

    def present(self, task):
        return task not in self.away


@pytest.fixture
def serve(serve, monkeypatch):
    """With looks for lost modules at each poll."""
    monkeypatch.setattr("sun.router.router.GAUGE_POLLS", 1)
    return serve


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_prefill_dies_runs_again_when_it_is_back(serve, shm, stream):
    service = serve(fleet=Fragile, transport=shm)
    expected = service.ask(TEXT, stream=stream).whole
    service.fleet.dying["plain"] = 1
    answer = service.ask(TEXT, stream=stream)
    eventually(lambda: "plain" in service.fleet.away)
    assert service.ask(TEXT, "lora").whole.text is not None and not answer.done.is_set()
    service.fleet.loading.add("plain")
    service.fleet.away.clear()  # its process is there, but it loads
    later = service.ask(TEXT, stream=stream)
    assert service.ask(TEXT, "lora").whole.text is not None and not answer.done.is_set()
    service.fleet.loading.clear()
    assert answer.whole == later.whole == expected and answer.ends == 1
    assert service.fleet.begun.count("plain") == 4
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_a_prompt_that_two_processes_did_not_survive_is_given_up(serve):
    service = serve(fleet=Fragile)
    service.fleet.dying["plain"] = 2
    answer = service.ask(TEXT)
    eventually(lambda: service.fleet.away)
    service.fleet.away.clear()
    assert answer.error.code == "UNAVAILABLE" and str(answer.error) == "prefill_plain: its process died; it was the second to have the prompt"
    service.fleet.away.clear()
    assert service.ask(TEXT).whole
    service.idle()


def test_a_module_that_does_not_come_back_is_told_and_costs_other_tasks_nothing(serve, monkeypatch):
    monkeypatch.setattr("sun.router.router.STRANDED_S", 0.3)
    service = serve(fleet=Fragile, limits=Limits(max_tokens=tiny.CONTEXT, starting=2))
    service.fleet.away.add("plain")
    waiting = [service.ask(TEXT) for _ in range(6)]
    assert service.ask(TEXT, "lora").whole.text is not None
    for answer in waiting:
        assert answer.error.code == "UNAVAILABLE" and str(answer.error).startswith("prefill_plain is not there, for 0.3 s now")
    assert str(service.ask(TEXT).error).startswith("prefill_plain is not there")
    service.fleet.away.clear()
    eventually(lambda: not service.ask(TEXT).wait().errors)
    assert service.ask(TEXT).whole
    service.idle()


@pytest.mark.parametrize("end", ["cancel", "deadline", "close"])
def test_a_request_that_waits_for_its_module_can_be_ended(serve, end):
    service = serve(fleet=Fragile)
    service.fleet.away.add("plain")
    answer = service.ask(TEXT, deadline_s=0.05 if end == "deadline" else None)
    if end != "deadline":
        eventually(lambda: service.router.admission.away_s(next(iter(service.router._active.values()))) > 0)
    if end == "close":
        service.router.close()
    answer.gone = end == "cancel"
    assert answer.error.code == {"cancel": "CANCELLED", "deadline": "DEADLINE", "close": "UNAVAILABLE"}[end]
    assert service.router.admission.tokens == 0
    service.idle()


def test_when_a_module_comes_back_its_requests_do_not_crowd_out_another_tasks(serve):
    service = serve(fleet=Fragile, limits=Limits(max_tokens=tiny.CONTEXT, starting=4))
    service.fleet.away.add("plain")
    waiting = [service.ask(TEXT) for _ in range(20)]
    eventually(lambda: len(service.router.admission._queue) == 20)
    service.fleet.held.clear()
    service.fleet.away.clear()
    eventually(lambda: service.fleet.begun)
    other = service.ask(TEXT, "lora")
    eventually(lambda: "lora" in service.fleet.begun)
    assert service.fleet.begun.count("plain") <= 3
    service.fleet.held.set()
    assert all(answer.whole for answer in [*waiting, other])
    service.idle()
