"""The router: whatever ends a request early, its client or a fault, frees what it held and harms no other."""

from __future__ import annotations

import os
import threading

import pytest

from sun.handoff.shm import published
from sun.local import LocalFleet
from sun.router.errors import RequestError
from sun.router.policy import RoundRobin
from sun.router.router import Limits

from . import tiny
from .harness import OPEN_ENDED, PATIENCE_S, TEXT, Answer, eventually, files, within


# What ends a request early.


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancel_frees_slot_and_ticket_at_once(serve, shm, stream):
    service = serve(transport=shm)
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    answer = service.ask(TEXT, stream=stream, **OPEN_ENDED)
    gate.allow(5)
    gate.wait_entered(6)
    assert files(shm) == 1
    answer.gone = True
    assert answer.error.code == "CANCELLED"
    eventually(lambda: files(shm) == 0 and engine.stats().load.tokens == 0)  # the ticket goes first, then the worker hears of it
    gate.open()
    service.idle()
    assert engine.stats().step == 6 and answer.ends == 1


def test_a_cancel_while_waiting_for_a_slot_takes_the_sequence_out(serve, shm):
    service = serve(transport=shm, max_batch=1)
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    running, waiting = service.ask(TEXT), service.ask(TEXT)
    eventually(lambda: engine.stats().waiting == 1 and engine.stats().running == 1)
    waiting.gone = running.gone = True
    assert running.error.code == waiting.error.code == "CANCELLED"
    gate.open()
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_a_cancel_during_prefill_leaves_no_ticket_and_admits_nothing(serve, shm):
    service = serve(transport=shm)
    prefill, admit, began, go = service.fleet.prefill, service.fleet.admit, threading.Event(), threading.Event()
    admitted = []

    def slow(task, ids):
        began.set()
        assert go.wait(PATIENCE_S)
        return prefill(task, ids)

    service.fleet.prefill = slow
    service.fleet.admit = lambda *args: admitted.append(args) or admit(*args)
    answer = service.ask(TEXT)
    assert began.wait(PATIENCE_S)
    answer.gone = True
    assert answer.error.code == "CANCELLED"
    go.set()
    service.fleet.prefill = prefill
    within(service.router.close)  # waits for what the cancelled one still does
    assert admitted == [] and files(shm) == 0
    service.idle()


def test_a_cancel_during_admission_frees_what_was_admitted(serve):
    service = serve()  # inline: with shm the released ticket alone would end the sequence
    gate, engine, admit = service.gate(), service.fleet.decodes["decode_0"], service.fleet.admit
    began, go, admitted, abort, aborted = threading.Event(), threading.Event(), [], service.fleet.abort, []

    def slow(*args):
        began.set()
        assert go.wait(PATIENCE_S)
        admitted.append(admit(*args))
        return admitted[0]

    service.fleet.admit = slow
    service.fleet.abort = lambda *args: aborted.append(abort(*args)) or aborted[-1]
    answer = service.ask(TEXT, **OPEN_ENDED)
    assert began.wait(PATIENCE_S)
    answer.gone = True
    assert answer.error.code == "CANCELLED"
    eventually(lambda: aborted)  # in vain: the worker does not have it yet
    go.set()
    eventually(lambda: admitted and engine.stats().load.tokens == 0)
    gate.open()
    service.idle()


def test_a_deadline_ends_the_request_with_an_error_and_frees_it(serve, shm):
    service = serve(transport=shm)
    gate = service.gate()
    error = service.ask(TEXT, deadline_s=0.01).error
    assert error.code == "DEADLINE" and str(error).startswith("deadline_s: not finished within 0.01 s")
    gate.open()
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_the_routers_own_deadline_holds_for_all(serve):
    service = serve(limits=Limits(max_tokens=tiny.CONTEXT, deadline_s=0.01))
    service.gate()
    assert service.ask(TEXT).error.code == service.ask(TEXT, deadline_s=1000.0).error.code == "DEADLINE"


def test_closing_ends_what_is_in_flight_and_takes_no_more(serve):
    service = serve()
    gate = service.gate()
    answers = [service.ask(TEXT, **OPEN_ENDED) for _ in range(4)]
    gate.allow(2)
    closing = threading.Thread(target=service.router.close)
    closing.start()
    assert {answer.error.code for answer in answers} == {"UNAVAILABLE"}
    gate.open()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and service.ask(TEXT).error.code == "UNAVAILABLE"
    service.idle()


def test_a_leaving_router_refuses_new_requests_and_answers_those_it_has_queued_ones_too(serve):
    service = serve(limits=Limits(max_tokens=tiny.CONTEXT, max_running_tokens=1))
    gate = service.gate()
    answers = [service.ask(TEXT, max_tokens=4) for _ in range(3)]
    gate.wait_entered(1)
    assert service.router.leave() == 3
    refused = service.ask(TEXT).error
    assert refused.code == "UNAVAILABLE" and "the server is stopping" in str(refused)
    gate.open()
    assert [len(answer.whole.token_ids) for answer in answers] == [4, 4, 4]
    eventually(lambda: service.router.leave() == 0)
    service.idle()


def test_leases_of_tickets_in_use_are_kept(serve, shm):
    service = serve(transport=shm, max_batch=1)
    gate = service.gate()
    service.ask(TEXT)
    gate.wait_entered(1)
    (file,) = published(shm.root)
    stale = file.stat().st_mtime - 30
    os.utime(file, (stale, stale))
    eventually(lambda: file.stat().st_mtime > stale + 20)


# What goes wrong elsewhere.


class Deaf(LocalFleet):
    """A fleet whose first worker's event stream breaks after some steps."""

    breaks = True

    def listen(self, worker, router):
        for count, step in enumerate(super().listen(worker, router)):
            if worker == "decode_0" and self.breaks and count == 3:
                raise ConnectionError("the line is dead")
            yield step


def test_when_a_workers_events_break_others_go_on_with_its_sequences(serve, shm):
    service = serve(fleet=Deaf, workers=2, policy=RoundRobin(), transport=shm)
    gates = [service.gate(f"decode_{i}") for i in range(2)]
    answers = [service.ask(TEXT, max_tokens=40, ignore_eos=True) for _ in range(6)]
    eventually(lambda: [engine.stats().running for engine in service.fleet.decodes.values()] == [3, 3])
    for gate in gates:
        gate.open()
    texts = [answer.whole.token_ids for answer in answers]
    assert len(texts[0]) == 40 and texts == [texts[0]] * 6
    service.idle()
    eventually(lambda: files(shm) == 0)
    service.fleet.breaks = False
    assert [len(service.ask(TEXT, max_tokens=10, ignore_eos=True).whole.token_ids) for _ in range(2)] == [10, 10]


@pytest.mark.parametrize(("raised", "code"), [
    (RequestError("UNAVAILABLE", "prefill_plain: is not ready"), "UNAVAILABLE"), (ConnectionError("gone"), "INTERNAL"),
    (OSError(28, "no room for the KV"), "INTERNAL"),
])
@pytest.mark.parametrize("call", ["prefill", "admit"])
def test_a_call_that_fails_fails_its_request_and_leaves_no_load(serve, shm, call, raised, code):
    service = serve(transport=shm)
    working = getattr(service.fleet, call)

    def broken(*args):
        raise raised

    setattr(service.fleet, call, broken)
    error = service.ask(TEXT).error
    assert error.code == code and str(raised) in str(error)
    setattr(service.fleet, call, working)
    service.idle()
    eventually(lambda: files(shm) == 0)
    assert [(load.tokens, load.sequences) for load in service.router.pool.loads.values()] == [(0, 0)]
    assert service.ask(TEXT).whole.text


def test_a_step_that_fails_is_an_internal_error(serve):
    service = serve()
    executor = service.fleet.decodes["decode_0"].executor
    step = executor.step

    def broken(*args):
        executor.step = step
        raise RuntimeError("out of luck")

    executor.step = broken
    error = service.ask(TEXT).error
    assert error.code == "INTERNAL" and "out of luck" in str(error)
    assert service.ask(TEXT).whole.text


class Rude(Answer):
    """A client whose connection breaks at the first piece, or already at an error."""

    def send(self, piece):
        self.done.set()
        raise BrokenPipeError("the client is gone")

    def fail(self, error):
        self.errors.append(error)
        self.done.set()
        raise BrokenPipeError("the client is gone")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_cannot_be_sent_to_harms_only_itself(serve, shm, stream):
    service = serve(transport=shm)
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    rude = service.ask(TEXT, answer=Rude(), stream=stream, max_tokens=5, ignore_eos=True)
    refused = service.ask(TEXT, task="poetry", answer=Rude())
    others = [service.ask(TEXT, stream=stream, max_tokens=30, ignore_eos=True) for _ in range(3)]
    eventually(lambda: engine.stats().running == 4)
    gate.open()
    assert [len(other.whole.token_ids) for other in others] == [30] * 3
    assert rude.done.is_set() and refused.wait().errors[0].code == "NOT_FOUND"
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_a_gone_client_does_not_keep_a_broken_worker_from_being_reported(serve):
    service = serve(fleet=Deaf)
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    service.ask(TEXT, answer=Rude(), max_tokens=40, ignore_eos=True)
    eventually(lambda: engine.stats().running == 1)
    other = service.ask(TEXT, max_tokens=40, ignore_eos=True)
    eventually(lambda: engine.stats().running == 2)
    gate.open()
    assert other.error.code == "INTERNAL"
    service.idle()
