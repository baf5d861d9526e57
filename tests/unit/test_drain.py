"""A worker that drains lets what it has end and takes nothing new; an answer that has begun never goes on with another module."""

from __future__ import annotations

import msgspec
import pytest

from sun import key
from sun.decode.params import SamplingParams
from sun.key import check_key
from sun.messages import Admit

from .harness import OPEN_ENDED, PATIENCE_S, TEXT, eventually
from .test_failover import MORE, SAMPLED, Mortal, holder

PROMPT = [5, 9, 17, 3]


# The worker's part.


def test_a_draining_worker_ends_what_it_has_and_takes_nothing_until_told(bench):
    it = bench(gated=True)
    it.admit("a", PROMPT)
    it.gate.wait_entered(1)
    assert it.engine.drain().draining and it.engine.stats().draining
    assert it.admit("b", PROMPT).draining
    it.gate.open()
    assert {name: len(tokens) for name, tokens in it.answers().items()} == {"a": 8}
    assert it.engine.stats().idle
    assert not it.engine.drain(on=False).draining and not it.admit("b", PROMPT).draining
    assert len(it.answers()["b"]) == 8


def test_a_worker_is_idle_when_its_sequences_have_ended_and_their_routers_know(bench):
    it = bench(gated=True)
    it.admit("a", PROMPT)
    it.gate.wait_entered(1)
    it.engine.drain()
    assert not it.engine.wait_idle(0.01)
    it.gate.open()
    it.settle(lambda: not it.scheduler.sequences)
    assert not it.engine.wait_idle(0.01), "nobody has listened yet"
    assert len(it.answers()["a"]) == 8 and it.engine.wait_idle(PATIENCE_S)


def test_evicted_sequences_leave_without_a_word_wherever_they_are(bench):
    it = bench(gated=True, max_batch=1)
    it.admit("runs", PROMPT)
    it.gate.wait_entered(1)
    it.admit("waits", PROMPT)
    it.engine.drain(evict=True)
    it.gate.open()
    assert it.events() == []
    it.settle(lambda: not it.scheduler.sequences)
    assert it.engine.stats().idle


def test_what_another_module_began_is_refused(bench):
    it = bench()
    it.engine.module = "int8 sha256:1"
    admit = Admit(id="a", router="r", task="plain", prompt=PROMPT, generated=[4, 4], params=SamplingParams(temperature=0.0, max_tokens=8))
    with pytest.raises(RuntimeError, match="module: fp32 sha256:1 began the sequence, this worker has int8 sha256:1"):
        it.engine.admit(msgspec.structs.replace(admit, module="fp32 sha256:1"), it.shipment(PROMPT))
    it.engine.admit(msgspec.structs.replace(admit, module="int8 sha256:1"), it.shipment(PROMPT))
    assert set(it.answers()) == {"a"}


@pytest.mark.parametrize(("theirs", "given", "reason"), [("", "", "takes none"), ("secret", "", "is not"), ("secret", "guess", "is not"), ("", "guess", "takes none")])
def test_a_key_that_is_not_the_servers_is_refused(monkeypatch, theirs, given, reason):
    monkeypatch.setenv(key.VARIABLE, theirs)
    with pytest.raises(PermissionError, match=reason):
        check_key(given)
    monkeypatch.setenv(key.VARIABLE, "secret")
    check_key("secret")


# The router's part.


def test_new_requests_pass_over_a_draining_worker(serve):
    service = serve(workers=2)
    service.fleet.decodes["decode_0"].drain()
    assert all(service.ask(TEXT).whole.token_ids for _ in range(6))
    assert service.fleet.decodes["decode_0"].stats().step == 0
    service.idle()


def test_while_all_workers_drain_requests_wait_for_one_that_takes_them(serve):
    service = serve(workers=2)
    for engine in service.fleet.decodes.values():
        engine.drain()
    answer = service.ask(TEXT)
    eventually(lambda: service.router.placement.stranded)
    assert not answer.done.is_set()
    service.fleet.decodes["decode_1"].drain(on=False)
    assert answer.whole.token_ids
    service.idle()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_an_evicted_answer_goes_on_elsewhere_with_the_same_text(serve, sampling):
    service = serve(workers=2)
    undisturbed = service.ask(TEXT, **MORE, **sampling).whole
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=True, **MORE, **sampling)
    first = holder(service)
    gates[first].allow(20)
    gates[first].wait_entered(21)
    service.fleet.decodes[first].drain(evict=True)
    for gate in gates.values():
        gate.open()
    assert answer.whole.token_ids == undisturbed.token_ids and answer.ends == 1
    service.idle()


def split(service) -> None:
    """Let the second worker run another module than the first, as in the middle of a replacement, and the router know."""
    service.fleet.decodes["decode_1"].module = "other"
    eventually(lambda: service.router.pool._modules.get("decode_1") == "other" and "decode_0" in service.router.pool._modules)


@pytest.mark.parametrize("how", ["evicted", "killed"])
def test_an_answer_that_has_begun_waits_for_its_module_and_fails_naming_it(serve, monkeypatch, how):
    monkeypatch.setattr("sun.router.placement.STRANDED_S", 0.2)
    service = serve(fleet=Mortal, workers=2)
    split(service)
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=True, **OPEN_ENDED)
    first = holder(service)
    gates[first].allow(3)
    gates[first].wait_entered(4)
    assert answer.begun.wait(10)
    if how == "killed":
        service.fleet.kill(first)
    else:
        service.fleet.decodes[first].drain(evict=True)
    for gate in gates.values():
        gate.open()
    assert answer.error.code == "UNAVAILABLE" and service.fleet.decodes[first].module in str(answer.error)
    assert service.ask(TEXT, **MORE).whole.token_ids, "the other worker serves"
    service.idle()


def test_an_answer_that_has_begun_goes_on_when_its_module_is_back(serve):
    service = serve(fleet=Mortal, workers=2)
    whole = service.ask(TEXT, **MORE).whole.token_ids
    split(service)
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=True, **MORE)
    first = holder(service)
    gates[first].allow(3)
    gates[first].wait_entered(4)
    assert answer.begun.wait(10), "an answer without a token may go on anywhere"
    service.fleet.kill(first)
    eventually(lambda: service.router.placement.stranded)
    # Not before: what was left of the answer could come from it until the router has noticed its death.
    for gate in gates.values():
        gate.open()
    service.fleet.dead.discard(first)
    assert answer.whole.token_ids == whole
    service.idle()


def test_a_prompt_that_has_no_token_yet_may_go_to_any_module(serve):
    service = serve(fleet=Mortal, workers=2)
    split(service)
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, **MORE)
    first = holder(service)
    service.fleet.kill(first)
    for gate in gates.values():
        gate.open()
    assert len(answer.whole.token_ids) == MORE["max_tokens"]
    service.idle()
