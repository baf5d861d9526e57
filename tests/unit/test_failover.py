"""A lost worker costs its requests a pause: another goes on from the same KV and tokens, and the text is that of an undisturbed run."""

from __future__ import annotations

import random
import threading

import pytest

from sun.decode.cpu import CpuExecutor
from sun.decode.engine import REPLAY_ROWS
from sun.handoff.shm import Shm, published
from sun.local import LocalFleet
from sun.model.loading import load_decode
from sun.router import placement
from sun.router.errors import Gone
from sun.router.router import Limits

from .harness import OPEN_ENDED, TEXT, Answer, Bench, eventually, files

LENGTH = 90
SAMPLED = {"temperature": 1.0, "seed": 11, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 2}
MORE = {"max_tokens": LENGTH, "ignore_eos": True}


# The worker's part: it replays what another has sampled.


@pytest.fixture(scope="module", params=["torch", "cpu, two threads"])
def bench(request, base_dir, repository):
    """A prefill module and a decode worker, with either executor."""
    bench = Bench(base_dir, repository / "prefill_plain" / "1")
    if request.param != "torch":
        bench.engine.executor = CpuExecutor(load_decode(base_dir)[1], bench.pool, threads=2)
    yield bench
    bench.close()


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("done", [1, 2, REPLAY_ROWS, REPLAY_ROWS + 1, LENGTH - 1])
def test_a_sequence_goes_on_as_if_its_worker_had_sampled_all_of_it(bench, done, sampling):
    prompt = [5, 9, 17, 3]
    bench.admit("whole", prompt, **MORE, **sampling)
    bench.admit("other", [8, 2], **MORE)
    whole = bench.answers()["whole"]
    bench.admit("rest", prompt, generated=whole[:done], **MORE, **sampling)
    bench.admit("other", [8, 2], **MORE)
    assert bench.answers()["rest"] == whole[done:]
    assert bench.pool.free_tokens == bench.pool.budget


def test_a_prompt_of_one_token_is_replayed_too(bench):
    bench.admit("whole", [7], **MORE)
    whole = bench.answers()["whole"]
    bench.admit("rest", [7], generated=whole[:40], **MORE)
    assert bench.answers()["rest"] == whole[40:]


@pytest.mark.parametrize(("generated", "reason"), [([1] * 8, "generated: 8 tokens, but max_tokens is 8"), ([1, -1], "generated: token ids")])
def test_what_cannot_have_been_generated_is_refused(bench, generated, reason):
    with pytest.raises(ValueError, match=reason):
        bench.admit("x", [7, 8], generated=generated)


# The router's part: it notices, and moves the sequence.


class Mortal(LocalFleet):
    """A fleet whose workers can die: calls and event streams of a dead one end. ``mute`` ones only stop to answer, and go on decoding."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.dead: set[str] = set()
        self.mute: set[str] = set()

    def check(self, worker: str) -> None:
        """Raise what a call of a lost worker raises."""
        if worker in self.dead | self.mute:
            raise Gone(f"{worker}: its process died")

    def admit(self, worker, admit, shipment):
        self.check(worker)
        return super().admit(worker, admit, shipment)

    def abort(self, worker, ids):
        self.check(worker)
        return super().abort(worker, ids)

    def stats(self, worker):
        self.check(worker)
        return super().stats(worker)

    def listen(self, worker, router):
        self.check(worker)
        for step in super().listen(worker, router):
            if worker in self.dead:
                raise Gone(f"{worker}: its process died")
            yield step

    def kill(self, worker: str) -> None:
        """What it had is gone, and so is whatever it said last."""
        self.dead.add(worker)
        engine = self.decodes[worker]
        engine.abort([sequence.admit.id for sequence in engine.scheduler.sequences])


def holder(service) -> str:
    """The worker that decodes now."""
    eventually(lambda: any(engine.stats().running for engine in service.fleet.decodes.values()))
    return next(name for name, engine in service.fleet.decodes.items() if engine.stats().running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("steps", [0, 1, 40])
def test_the_text_is_that_of_an_undisturbed_run(serve, shm, sampling, steps, stream):
    service = serve(fleet=Mortal, workers=2, transport=shm)
    returns = ("token_ids", "logprobs")
    undisturbed = service.ask(TEXT, stream=stream, returns=returns, **MORE, **sampling).whole
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=stream, returns=returns, **MORE, **sampling)
    first = holder(service)
    gates[first].allow(steps)
    gates[first].wait_entered(steps + 1)
    service.fleet.kill(first)
    for gate in gates.values():
        gate.open()
    assert answer.whole == undisturbed and answer.ends == 1
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_a_moved_sequence_goes_on_after_its_tasks_module_has_gone(serve, tmp_path):
    shm = Shm(tmp_path / "kv", publisher=True)
    service = serve(transport=shm, fleet=Mortal, workers=2)
    undisturbed = service.ask(TEXT, **MORE).whole.token_ids
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=True, **MORE)
    worker = holder(service)
    gates[worker].allow(5)
    eventually(lambda: len(answer.pieces) >= 5)
    shm.close()  # as an update's old process does
    service.fleet.kill(worker)
    for gate in gates.values():
        gate.open()
    assert answer.whole.token_ids == undisturbed
    service.idle()
    eventually(lambda: not published(tmp_path / "kv"))
    Shm(tmp_path / "kv").close()
    assert not (tmp_path / "kv").exists()


def test_a_sequence_that_waits_for_a_slot_gets_it_after_its_tasks_module_has_gone(serve, tmp_path):
    shm = Shm(tmp_path / "kv", publisher=True)
    service = serve(transport=shm, max_batch=1)
    gate = service.gate()
    first = service.ask(TEXT)
    gate.wait_entered(1)
    second = service.ask(TEXT)
    eventually(lambda: service.fleet.decodes["decode_0"].stats().waiting == 1)
    shm.close()
    gate.open()
    assert first.whole.token_ids == second.whole.token_ids


def lose(service, worker: str) -> None:
    """Kill a worker, and wait until the router knows."""
    service.fleet.kill(worker)
    eventually(lambda: worker not in service.router.pool.loads)


def unlike(serve):
    """A service whose one worker with a pool for 200 tokens is lost; the other, of 100, lives."""
    service = serve(fleet=Mortal, workers=2, kv_tokens=400, limits=Limits(max_tokens=400))
    service.shrink("decode_0", 100)
    lose(service, "decode_1")
    return service


def test_a_sequence_that_only_a_lost_workers_pool_could_hold_waits_for_it(serve):
    service = unlike(serve)
    answer = service.ask(TEXT, ignore_eos=True, max_tokens=200)
    assert not answer.done.wait(1)
    service.fleet.dead.clear()
    assert len(answer.whole.token_ids) == 200


def test_a_sequence_that_no_worker_can_hold_for_long_ends_when_it_has_waited_once(serve, monkeypatch):
    monkeypatch.setattr(placement, "STRANDED_S", 1.0)
    service = unlike(serve)
    assert service.ask(TEXT, ignore_eos=True, max_tokens=200).error.code == "UNAVAILABLE"


def test_what_the_living_refuse_for_another_reason_waits_for_nobody(serve, monkeypatch):
    service = serve(fleet=Mortal, workers=2)
    eventually(lambda: service.router.pool.largest)
    lose(service, "decode_1")

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.fleet, "admit", broken)
    assert "out of memory" in str(service.ask(TEXT).error) and not service.router.placement.stranded


class Hasty(Mortal):
    """A fleet in which one worker's first tokens come before its word that it has the sequence, which never comes: it dies."""

    answer: Answer | None = None

    def admit(self, worker, admit, shipment):
        ack = super().admit(worker, admit, shipment)
        if self.answer is not None:
            answer, self.answer = self.answer, None
            eventually(lambda: len(answer.pieces) > 2)
            self.kill(worker)
            raise Gone(f"{worker}: its process died")
        return ack


def test_an_answer_never_goes_on_with_another_module_even_if_its_worker_died_before_it_said_that_it_has_it(serve, monkeypatch):
    monkeypatch.setattr(placement, "STRANDED_S", 0.5)
    service, answer = serve(fleet=Hasty, workers=2), Answer()
    service.fleet.decodes["decode_1"].module = "int8 sha256:other"
    eventually(lambda: service.router.pool.module("decode_1") == "int8 sha256:other" and service.router.pool.module("decode_0"))
    others = [service.ask(TEXT, **OPEN_ENDED) for _ in range(2)]  # so that both workers are listened to
    eventually(lambda: all(engine.stats().running for engine in service.fleet.decodes.values()))
    service.fleet.answer = answer
    service.ask(TEXT, answer=answer, stream=True, **MORE)
    assert answer.error.code == "UNAVAILABLE" and "module that began the answer" in str(answer.error)
    for other in others:
        other.gone = True


def test_of_many_requests_none_loses_or_repeats_a_token(serve, shm):
    service = serve(fleet=Mortal, workers=3, transport=shm)
    tasks = ("plain", "lora", "full")
    expected = [service.ask(f"say {i}", tasks[i % 3], **MORE).whole.token_ids for i in range(12)]
    answers = [service.ask(f"say {i}", tasks[i % 3], stream=True, **MORE) for i in range(12)]
    for victim in ("decode_1", "decode_0"):
        eventually(lambda: service.fleet.decodes[victim].stats().running)
        service.fleet.kill(victim)
        eventually(lambda: victim not in service.router.pool.loads)
    assert [answer.whole.token_ids for answer in answers] == expected
    service.idle()


def test_without_a_worker_requests_wait_for_one_to_come_back(serve):
    service = serve(fleet=Mortal)
    whole = service.ask(TEXT, **MORE).whole.token_ids
    gate = service.gate()
    answer = service.ask(TEXT, stream=True, **MORE)
    gate.allow(5)
    gate.wait_entered(6)
    service.fleet.kill("decode_0")
    gate.open()
    eventually(lambda: not service.router.pool.loads)
    late = service.ask(TEXT, **MORE)
    service.fleet.dead.clear()
    assert answer.whole.token_ids == late.whole.token_ids == whole


def test_without_a_worker_for_too_long_requests_end_with_an_error_that_says_so(serve, monkeypatch):
    monkeypatch.setattr("sun.router.placement.STRANDED_S", 0.1)
    service = serve(fleet=Mortal)
    service.fleet.dead.add("decode_0")
    eventually(lambda: not service.router.pool.loads)
    error = service.ask(TEXT).error
    assert error.code == "UNAVAILABLE" and str(error).startswith("no decode worker lives that could take it, for 0.1 s")
    service.idle()


def test_without_a_worker_no_more_is_prefilled_than_its_pool_would_hold_and_all_that_waits_ends_together(serve, shm, monkeypatch):
    service = serve(fleet=Mortal, transport=shm, kv_tokens=300)
    eventually(lambda: service.router.pool.budget == 300)
    service.fleet.dead.add("decode_0")
    eventually(lambda: not service.router.pool.loads)
    answers = [service.ask(TEXT, max_tokens=60, ignore_eos=True) for _ in range(20)]
    eventually(lambda: service.router.placement.stranded and service.router.admission.running_tokens > 200)
    assert 1 <= files(shm) <= 300 // 60 and service.router.admission.running_tokens <= 300
    for module in ("placement", "router"):
        monkeypatch.setattr(f"sun.router.{module}.STRANDED_S", 0.1)
    assert {(answer.error.code, str(answer.error).partition(",")[0]) for answer in answers} == {("UNAVAILABLE", "no decode worker lives that could take it")}
    eventually(lambda: files(shm) == 0)


def test_a_worker_that_hung_is_not_believed_any_more_and_drops_what_others_took_over(serve):
    service = serve(fleet=Mortal, workers=2)
    whole = service.ask(TEXT, **MORE).whole.token_ids
    gates = {name: service.gate(name) for name in service.fleet.decodes}
    answer = service.ask(TEXT, stream=True, **MORE)
    first = holder(service)
    gates[first].allow(3)
    gates[first].wait_entered(4)
    service.fleet.mute.add(first)
    eventually(lambda: first not in service.router.pool.loads)
    other = next(name for name in gates if name != first)
    gates[other].wait_entered(1)
    gates[first].allow(3)  # it speaks again, of a sequence that is another's
    gates[first].wait_entered(7)
    gates[other].open()
    assert answer.whole.token_ids == whole
    service.fleet.mute.clear()
    gates[first].open()
    service.idle()


class Losing(LocalFleet):
    """Workers that take sequences and then do not have them."""

    def admit(self, worker, admit, shipment):
        ack = super().admit(worker, admit, shipment)
        super().abort(worker, [admit.id])
        return ack


def test_a_sequence_that_every_worker_loses_is_given_up(serve):
    service = serve(fleet=Losing, workers=2)
    error = service.ask(TEXT).error
    assert error.code == "INTERNAL" and "no longer has the sequence" in str(error)
    service.idle()


def test_a_cancel_ends_a_request_that_waits_for_a_worker(serve, shm):
    service = serve(fleet=Mortal, transport=shm)
    service.fleet.dead.add("decode_0")
    eventually(lambda: not service.router.pool.loads)
    answer = service.ask(TEXT, **OPEN_ENDED)
    eventually(lambda: files(shm) == 1)
    answer.gone = True
    assert answer.error.code == "CANCELLED"
    eventually(lambda: files(shm) == 0)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_dies_and_comes_back_every_request_ends_once_and_right(serve, seed):
    rng, service = random.Random(seed), serve(fleet=Mortal, workers=2)
    expected = service.ask(TEXT, max_tokens=60, ignore_eos=True).whole.token_ids
    answers = [service.ask(TEXT, stream=True, max_tokens=60, ignore_eos=True) for _ in range(rng.randint(1, 6))]
    for _ in range(rng.randint(1, 6)):
        victim = rng.choice(["decode_0", "decode_1"])
        service.fleet.kill(victim)
        threading.Event().wait(rng.random() * 0.05)
        service.fleet.dead.discard(victim)
    for answer in answers:
        answer.wait()
        assert answer.ends == 1
        if answer.errors:  # it was where death struck too often
            assert "to have the sequence" in str(answer.error)
        else:
            assert answer.whole.token_ids == expected
    service.idle()
