"""The decode worker: one batch for all tasks, exact books, and one sequence's trouble is nobody else's."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager

import pytest

from sun.decode import outbox as outbox_module
from sun.handoff.inline import Inline
from sun.handoff.shm import Shm
from sun.handoff.ticket import TicketError

from . import tiny
from .harness import PATIENCE_S, Bench

PROMPT = [72, 101, 108, 108, 111, 5]


@pytest.fixture(scope="module")
def plain(base_dir):
    """The base in plain transformers."""
    return tiny.load(base_dir)


def greedy(plain, prompt: list[int], count: int = 8) -> list[int]:
    return tiny.reference(plain, plain, prompt, count)


def prompts(count: int) -> list[list[int]]:
    return [[(11 * i + 3 * j * j) % tiny.VOCAB for j in range(2 + 5 * i % 17)] for i in range(count)]


def empty(bench: Bench) -> bool:
    return not bench.scheduler.sequences and bench.pool.free_tokens == bench.pool.budget


def retold(shipment: list[bytes], **fields) -> list[bytes]:
    """A shipment whose ticket says something else."""
    return [json.dumps(json.loads(shipment[0]) | fields).encode(), *shipment[1:]]


def flipped(shipment: list[bytes]) -> list[bytes]:
    """A shipment with one bit of KV changed."""
    kv = bytearray(shipment[1])
    kv[len(kv) // 2] ^= 1
    return [shipment[0], bytes(kv)]


def test_a_prompt_of_one_token_is_decoded_from_an_empty_kv(bench, plain):
    it = bench()
    it.admit("a", [42])
    assert it.answers() == {"a": greedy(plain, [42])}


def test_sequences_in_reused_slots_and_over_the_batch_limit_get_their_own_tokens(bench, plain):
    it = bench(kv_tokens=90, max_batch=3)
    for i, prompt in enumerate(prompts(12)):
        it.admit(str(i), prompt, max_tokens=5 + i)
    answers = it.answers()
    assert answers == {str(i): greedy(plain, prompt, 5 + i) for i, prompt in enumerate(prompts(12))}
    assert max(sum(record.tasks.values()) for record in it.engine.stats().steps) == 3 and empty(it)


def test_sequences_of_all_tasks_share_a_step_and_the_record_says_so(bench, repository):
    it = bench(gated=True)
    other = bench(task=repository / "prefill_lora" / "1")
    it.admit("a", PROMPT)
    it.gate.wait_entered(1)
    it.admit("b", PROMPT, other.shipment(PROMPT), task="lora")
    it.admit("c", PROMPT)
    it.settle(lambda: len(it.scheduler.running) == 3)
    it.gate.open()
    answers = it.answers()
    assert answers["a"] == answers["c"] != answers["b"]
    records = it.engine.stats().steps
    assert records[0].tasks == {"plain": 1} and records[1].tasks == {"plain": 2, "lora": 1}
    assert [record.step for record in records] == list(range(1, len(records) + 1)) and all(record.ms >= 0 for record in records)
    assert [record.step for record in it.engine.stats(after=3).steps] == [record.step for record in records][3:]


@pytest.mark.parametrize(("params", "end", "length"), [
    ({"ignore_eos": True, "max_tokens": 6}, "length", 6),
    ({"ignore_eos": True, "max_tokens": 1}, "length", 1),
])
def test_a_sequence_ends_at_max_tokens(bench, params, end, length):
    it = bench()
    it.admit("a", PROMPT, **params)
    events = it.events()
    assert [event.finish for event in events] == [None] * (length - 1) + [end]


def test_a_stop_token_ends_the_sequence_unless_min_tokens_bans_it(bench, plain):
    tokens = greedy(plain, PROMPT)
    at = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    it = bench()
    it.admit("a", PROMPT, stop_token_ids=[tokens[at]])
    events = it.events()
    assert [event.token for event in events] == tokens[: at + 1] and events[-1].finish == "stop"
    it.admit("b", PROMPT, stop_token_ids=[tokens[at]], min_tokens=8)
    later = it.answers()["b"]
    assert len(later) == 8 and later[:at] == tokens[:at] and tokens[at] not in later


def test_the_end_of_turn_token_ends_the_sequence_unless_it_is_to_be_ignored(bench):
    it = bench()
    base = it.engine.base
    assert base.eos_ids == [tiny.EOS]
    it.engine.executor.inner.model.head.weight = it.engine.executor.inner.model.head.weight.clone()
    it.engine.executor.inner.model.head.weight[:] = 0  # all tokens alike; greedy takes the first ...
    it.admit("a", PROMPT, ignore_eos=False)
    assert {event.finish for event in it.events()} == {None, "length"}
    it.engine.base.eos_ids[:] = [0]  # ... which now ends the turn
    try:
        it.admit("b", PROMPT, ignore_eos=False)
        assert [(event.token, event.finish) for event in it.events()] == [(0, "stop")]
        it.admit("c", PROMPT, ignore_eos=True)
        assert it.answers() == {"c": [0] * 8}
    finally:
        it.engine.base.eos_ids[:] = [tiny.EOS]


def test_logprobs_come_with_the_tokens_when_asked_for(bench):
    it = bench()
    it.admit("a", PROMPT, logprobs=3)
    it.admit("b", PROMPT)
    for event in it.events():
        if event.id == "a":
            assert len(event.top) == 3 and event.top[0] == (event.token, pytest.approx(event.logprob, abs=1e-6)) and event.logprob <= 0
        else:
            assert event.logprob is None and event.top is None


def test_an_abort_in_mid_stream_frees_the_slot_and_disturbs_nobody(bench, plain):
    it = bench(gated=True)
    it.admit("a", PROMPT)
    it.gate.wait_entered(1)
    it.admit("b", PROMPT[:3])
    it.settle(lambda: len(it.scheduler.running) == 2)
    it.gate.allow(3)
    it.gate.wait_entered(4)  # three steps are done; the fourth, with both, is held
    ack = it.engine.abort(["a", "unknown"])
    assert ack.load.tokens == 8 - 2
    it.gate.open()
    events = it.events()
    assert [e.token for e in events if e.id == "b"] == greedy(plain, PROMPT[:3])
    assert [e.token for e in events if e.id == "a"] == greedy(plain, PROMPT)[:3] and not any(e.finish for e in events if e.id == "a")
    it.settle(lambda: empty(it))
    it.scheduler.check_integrity()


def test_an_abort_of_a_waiting_sequence_takes_it_out_at_once(bench):
    it = bench(gated=True, max_batch=1)
    it.admit("a", PROMPT)
    it.gate.wait_entered(1)
    it.admit("b", PROMPT)
    it.admit("c", PROMPT)
    assert (it.engine.stats().running, it.engine.stats().waiting) == (1, 2)
    assert it.engine.abort(["b"]).load.tokens == 16
    assert (it.engine.stats().running, it.engine.stats().waiting) == (1, 1)
    it.gate.open()
    assert set(it.answers()) == {"a", "c"} and empty(it)


class Slow(Inline):
    """A transport whose pull waits."""

    def __init__(self):
        self.pulling, self.go = threading.Event(), threading.Event()

    @contextmanager
    def pull(self, ticket, shipment):
        self.pulling.set()
        assert self.go.wait(PATIENCE_S)
        with super().pull(ticket, shipment) as buffer:
            yield buffer


def test_an_abort_while_the_kv_is_pulled_frees_the_slot(bench):
    slow = Slow()
    it = bench(transport=slow)
    it.admit("a", PROMPT)
    assert slow.pulling.wait(PATIENCE_S) and it.engine.stats().waiting == 1
    assert it.engine.abort(["a"]).load.tokens == 0
    slow.go.set()
    assert it.events() == [] and it.engine.stats().step == 0
    it.settle(lambda: empty(it))


def test_running_sequences_step_on_while_a_kv_is_pulled(bench, plain):
    slow = Slow()
    it = bench(transport=slow, gated=True)
    slow.go.set()
    it.admit("a", PROMPT, max_tokens=100)
    it.gate.wait_entered(1)
    slow.go.clear()
    it.admit("b", PROMPT)
    it.gate.open()
    it.settle(lambda: not it.scheduler.running)  # all hundred steps of the first, the second's KV still on its way
    assert it.engine.stats().waiting == 1
    slow.go.set()
    answers = it.answers()
    assert len(answers["a"]) == 100 and answers["b"] == greedy(plain, PROMPT)


def test_a_kv_that_fails_verification_fails_its_sequence_only(bench, plain):
    it = bench()
    it.admit("good", PROMPT)
    it.admit("changed", PROMPT, flipped(it.shipment(PROMPT)))
    it.admit("cut", PROMPT, [(s := it.shipment(PROMPT))[0], s[1][:-4]])
    it.admit("also good", PROMPT[::-1])
    errors, tokens = {}, {}
    for event in it.events():
        if event.error is not None:
            assert event.finish == "error" and event.token is None
            errors[event.id] = event.error
        else:
            tokens.setdefault(event.id, []).append(event.token)
    assert "ticket.checksum" in errors["changed"] and "ticket.tokens" in errors["cut"] and len(errors) == 2
    assert tokens == {"good": greedy(plain, PROMPT), "also good": greedy(plain, PROMPT[::-1])} and empty(it)


def test_a_kv_that_is_gone_fails_its_sequence_only(bench, plain, tmp_path):
    shm = Shm(tmp_path / "kv", publisher=True)
    it = bench(transport=shm)
    shipment = it.shipment(PROMPT)
    (shm.owner / json.loads(shipment[0])["location"].split("/")[1]).unlink()
    it.admit("gone", PROMPT, shipment)
    it.admit("outside", PROMPT, retold(it.shipment(PROMPT), location="../../etc/passwd"))
    it.admit("good", PROMPT)
    events = it.events()
    assert {e.id: e.error.split(":")[1].strip() for e in events if e.error} == {"gone": "ticket.location", "outside": "ticket.location"}
    assert [e.token for e in events if e.id == "good"] == greedy(plain, PROMPT) and empty(it)
    shm.close()


@pytest.mark.parametrize(("fields", "task", "name"), [
    ({"version": 2}, "plain", "version"), ({"base_digest": "sha256:other"}, "plain", "base_digest"),
    ({"dtype": "float16"}, "plain", "dtype"),
    ({"tokens": 4}, "plain", "tokens"), ({"tokens": 6}, "plain", "tokens"), ({"task": "lora"}, "plain", "task"), ({}, "lora", "task"),
    ({"geometry": {"layers": 3, "kv_heads": 2, "head_dim": 12, "rope": {"kind": "default", "inv_freq": []}}}, "plain", "geometry"),
    ({"transport": "pigeon"}, "plain", "transport"), ({"checksum": 5}, "plain", "checksum"),
    ({"weights_digest": None}, "plain", "weights_digest"),
])
def test_a_ticket_that_does_not_fit_is_refused_on_admission_naming_the_field(bench, fields, task, name):
    it = bench()
    with pytest.raises(TicketError, match=name):
        it.admit("a", PROMPT, retold(it.shipment(PROMPT), **fields), task=task)
    assert empty(it) and it.engine.stats().load.tokens == 0


def test_an_admission_without_a_ticket_is_refused(bench):
    with pytest.raises(TicketError, match="^ticket: missing"):
        bench().admit("a", PROMPT, [])


@pytest.mark.parametrize("prompt", [[], [-1, 3], [3, tiny.VOCAB]])
def test_a_prompt_that_the_base_cannot_read_is_refused(bench, prompt):
    with pytest.raises(ValueError, match="^prompt: "):
        bench().admit("a", prompt, [b"unread"])


def test_an_admission_over_the_pool_or_the_context_is_refused_naming_max_tokens(bench):
    it = bench(kv_tokens=20)
    with pytest.raises(ValueError, match=r"^max_tokens: .*\(6\).*\(16\).*limit of 20"):
        it.admit("a", PROMPT, max_tokens=16)
    it.admit("b", PROMPT, max_tokens=15)
    assert len(it.answers()["b"]) == 15
    large = bench(kv_tokens=4 * tiny.CONTEXT)
    with pytest.raises(ValueError, match=f"^max_tokens: .*limit of {tiny.CONTEXT}"):
        large.admit("a", PROMPT, max_tokens=tiny.CONTEXT - len(PROMPT) + 2)


def test_a_sequence_may_fill_the_whole_context(bench, plain):
    it = bench()
    count = tiny.CONTEXT - len(PROMPT) + 1
    it.admit("a", PROMPT, max_tokens=count)
    assert it.answers()["a"] == greedy(plain, PROMPT, count)


def test_an_id_that_is_being_decoded_is_refused_and_one_that_ended_is_free(bench):
    it = bench(gated=True)
    it.admit("a", PROMPT)
    with pytest.raises(ValueError, match="^id: 'a'"):
        it.admit("a", PROMPT)
    it.gate.open()
    assert len(it.answers()["a"]) == 8
    it.admit("a", PROMPT)
    assert len(it.answers()["a"]) == 8


def test_sampling_without_a_seed_is_refused_and_disturbs_nobody(bench, plain):
    it = bench(gated=True)
    it.admit("good", PROMPT)
    it.gate.wait_entered(1)
    with pytest.raises(ValueError, match="^seed: "):
        it.admit("bad", PROMPT, temperature=1.0)
    it.gate.open()
    assert it.answers() == {"good": greedy(plain, PROMPT)}


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), MemoryError("out of luck")])
def test_a_step_that_fails_ends_its_sequences_with_an_error_and_the_worker_goes_on(bench, plain, error):
    it = bench()
    step = it.gate.inner.step

    def broken(*args):
        it.gate.inner.step = step
        raise error

    it.gate.inner.step = broken
    it.admit("a", PROMPT)
    event, = it.events()
    assert event.finish == "error" and "out of luck" in event.error
    it.admit("b", PROMPT)
    assert it.answers() == {"b": greedy(plain, PROMPT)} and empty(it)


def test_the_load_is_the_tokens_that_may_still_come(bench):
    it = bench(gated=True)
    assert it.admit("a", PROMPT, max_tokens=5).load.tokens == 5
    it.gate.wait_entered(1)
    assert it.admit("b", PROMPT, max_tokens=3, router="other").load.tokens == 8
    it.settle(lambda: len(it.scheduler.running) == 2)
    it.gate.open()
    loads = [step.load.tokens for steps in it.engine.outbox.listen("r") for step in steps]
    assert loads == [7, 5, 3, 1, 0]
    stats = it.engine.stats()
    assert (stats.load.tokens, stats.running, stats.waiting, stats.free_tokens) == (0, 0, 0, stats.budget_tokens)


def test_each_router_hears_of_its_own_sequences(bench):
    it = bench()
    for router in ("r", "s"):
        it.admit(f"of {router}", PROMPT, router=router)
    assert {e.id for e in it.events("r")} == {"of r"} and {e.id for e in it.events("s")} == {"of s"}


def test_sequences_of_a_router_that_never_listens_are_dropped_and_others_go_on(bench, plain, monkeypatch):
    it = bench(gated=True)
    it.admit("lost", PROMPT, router="dead", max_tokens=400)
    it.gate.wait_entered(1)
    monkeypatch.setattr(outbox_module, "ABANDONED_S", -1.0)  # from here on, whoever is not listening is dead
    it.gate.allow()
    it.settle(lambda: empty(it))
    monkeypatch.undo()
    it.gate.open()
    it.admit("good", PROMPT)
    assert it.answers() == {"good": greedy(plain, PROMPT)}
    assert it.engine.stats().step == 9


def test_closing_ends_what_is_here_with_an_error_and_takes_no_more(bench):
    it = bench(gated=True, max_batch=1)
    shipment = it.shipment(PROMPT)
    it.admit("running", PROMPT, max_tokens=300)
    it.gate.wait_entered(1)
    it.admit("waiting", PROMPT)
    closing = threading.Thread(target=it.engine.close)
    closing.start()
    it.settle(lambda: it.engine._closed)
    it.gate.open()
    ends = {event.id: event.error for event in it.events() if event.finish}
    assert set(ends) == {"running", "waiting"} and all("shutting down" in error for error in ends.values())
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and empty(it)
    with pytest.raises(RuntimeError, match="shutting down"):
        it.admit("late", PROMPT, shipment)
