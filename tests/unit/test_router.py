"""The router: every request ends exactly once, with its text or with a reason, and leaves nothing behind."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time

import msgspec
import pytest

from sun.local import LocalFleet
from sun.messages import Ack, Load
from sun.router.policy import Pack, Partitioned
from sun.router.request import GenerateRequest, Handover
from sun.router.router import Limits

from . import tiny
from .harness import OPEN_ENDED, PATIENCE_S, TEXT, Answer, eventually, files


def encode(prompts, text: str = TEXT) -> list[int]:
    return prompts.encode([{"role": "user", "content": text}])


# What a request gets.


def test_streamed_and_whole_answers_are_the_same(serve):
    service = serve()
    for sampling in ({}, {"temperature": 1.2, "seed": 3}, {"ignore_eos": True, "max_tokens": 40}):
        streamed = service.ask(TEXT, stream=True, **sampling)
        whole = service.ask(TEXT, **sampling)
        assert streamed.whole == whole.whole and len(whole.pieces) == 1
        assert len(streamed.pieces) > 1 and [p.finish_reason for p in streamed.pieces[:-1]] == [None] * (len(streamed.pieces) - 1)


def test_the_answer_is_the_decoded_tokens(serve, prompts):
    answer = serve().ask(TEXT, max_tokens=30, ignore_eos=True, seed=1, temperature=1.0, returns=()).whole
    assert answer.finish_reason == "length" and answer.num_input_tokens == len(encode(prompts)) and len(answer.token_ids) == 30
    assert answer.text == prompts.tokenizer.decode(answer.token_ids, skip_special_tokens=True)


def test_text_that_is_only_streamed_comes_in_pieces_of_text(serve):
    pieces = serve().ask(TEXT, stream=True, max_tokens=30, ignore_eos=True, returns=()).wait().pieces
    assert all(piece.text for piece in pieces[:-1]) and sum(len(piece.token_ids) for piece in pieces) == 30


def test_every_piece_tells_the_prompts_tokens(serve, prompts):
    pieces = serve().ask(TEXT, stream=True).wait().pieces
    assert {piece.num_input_tokens for piece in pieces} == {len(encode(prompts))}


def find_stop(service, seed: int) -> tuple[str, str]:
    """An answer's text, and two characters of its middle."""
    text = service.ask(TEXT, temperature=1.0, seed=seed, max_tokens=60, ignore_eos=True).whole.text
    middle = next(i for i in range(len(text) // 3, len(text) - 1) if "\ufffd" not in text[i : i + 2])
    return text, text[middle : middle + 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_answer_ends_before_a_stop_string_and_the_worker_stops_too(serve, shm, stream, seed):
    service = serve(transport=shm)
    text, stop = find_stop(service, seed)
    answer = service.ask(TEXT, stream=stream, temperature=1.0, seed=seed, stop=[stop], ignore_eos=True, max_tokens=400).whole
    assert answer.text == text.split(stop)[0] and answer.finish_reason == "stop" and len(answer.token_ids) <= 60
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_no_stop_string_ends_the_answer_before_min_tokens(serve):
    service = serve()
    text, stop = find_stop(service, 1)
    answer = service.ask(TEXT, temperature=1.0, seed=1, stop=[stop], ignore_eos=True, min_tokens=60, max_tokens=60).whole
    assert answer.text == text and answer.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(serve):
    service = serve()
    free = service.ask(TEXT, ignore_eos=True, max_tokens=30, temperature=1.0, seed=1).whole
    stop = free.token_ids[20]
    at = free.token_ids.index(stop)
    answer = service.ask(TEXT, ignore_eos=True, max_tokens=30, temperature=1.0, seed=1, stop_token_ids=[stop]).whole
    assert answer.finish_reason == "stop" and answer.token_ids == free.token_ids[: at + 1]
    assert answer.text == service.router.prompts.tokenizer.decode(free.token_ids[:at], skip_special_tokens=True)


def test_logprobs_are_one_entry_a_token(serve):
    answer = serve().ask(TEXT, logprobs=2, returns=("logprobs",), ignore_eos=True).whole
    assert [entry["token_id"] for entry in answer.logprobs] == answer.token_ids and all(len(entry["top"]) == 2 for entry in answer.logprobs)
    json.dumps(answer.logprobs)


def test_the_input_is_echoed_before_the_answer(serve):
    service = serve()
    plain = service.ask(TEXT).whole.text
    answer = Answer()
    service.router.submit(GenerateRequest(
        messages=[{"role": "user", "content": TEXT}], task="plain", echo=TEXT, sampling={"temperature": 0, "max_tokens": 8}), answer)
    assert answer.whole.text == TEXT + plain


def test_a_tasks_defaults_hold_where_the_request_says_nothing(serve):
    service = serve()
    answer = Answer()
    service.router.submit(GenerateRequest(messages=[{"role": "user", "content": TEXT}], task="terse", sampling={}), answer)
    assert len(answer.whole.token_ids) == 3
    assert len(service.ask(TEXT, "terse", max_tokens=5).whole.token_ids) == 5


def test_without_a_seed_answers_differ_and_with_one_they_repeat(serve):
    service = serve()
    texts = [service.ask(TEXT, temperature=1.5, max_tokens=20, ignore_eos=True).whole.text for _ in range(3)]
    assert len(set(texts)) == 3
    texts = [service.ask(TEXT, temperature=1.5, max_tokens=20, ignore_eos=True, seed=5).whole.text for _ in range(3)]
    assert len(set(texts)) == 1


# What is refused.


@pytest.mark.parametrize(("request_", "code", "reason"), [
    ({"task": "poetry"}, "NOT_FOUND", r"^task: 'poetry' is not known; .*full, lora, plain, terse"),
    ({"task": "../plain"}, "NOT_FOUND", "^task: "),
    ({"task": None}, "INVALID_ARG", r"^task: is missing; .*full, lora, plain, terse"),
    ({"text": "x" * tiny.CONTEXT}, "INVALID_ARG", rf"^text_input: the prompt has \d+ tokens, the limit is {tiny.CONTEXT - 1}"),
    ({"max_tokens": tiny.CONTEXT}, "INVALID_ARG", r"^sampling_parameters\.max_tokens: 512 .* at most \d+ here"),
    ({"temperature": -1}, "INVALID_ARG", r"^sampling_parameters\.temperature"),
    ({"colour": "red"}, "INVALID_ARG", "^sampling_parameters.*colour"),
])
def test_a_bad_request_is_refused_naming_the_field(serve, request_, code, reason):
    service = serve()
    error = service.ask(**{"text": TEXT, **request_}).error
    assert error.code == code
    assert re.search(reason, str(error))
    service.idle()


def test_the_most_tokens_that_a_refusal_names_are_taken(serve, prompts):
    most = tiny.CONTEXT - len(encode(prompts)) + 1
    service = serve()
    assert f"at most {most} here" in str(service.ask(TEXT, max_tokens=most + 1).error)
    assert len(service.ask(TEXT, max_tokens=most, ignore_eos=True).whole.token_ids) == most


def test_a_conversation_that_the_template_refuses_is_the_clients_error(serve):
    answer = Answer()
    serve().router.submit(GenerateRequest(messages=[{"role": "tool", "content": "42"}], task="plain", sampling={}), answer)
    assert answer.error.code == "INVALID_ARG" and "tools are not spoken here" in str(answer.error)


def test_requests_over_the_limit_are_refused_at_once_and_others_taken_when_room_is(serve):
    service = serve(limits=Limits(max_inflight=4, max_tokens=tiny.CONTEXT))
    gate = service.gate()
    held = [service.ask(TEXT) for _ in range(3)]
    refused = service.ask(TEXT)
    assert refused.done.is_set() and refused.error.code == "UNAVAILABLE" and str(refused.error).startswith("max_inflight: 3 requests of task 'plain'")
    held.append(service.ask(TEXT, "lora"))
    refused = service.ask(TEXT, "lora")
    assert refused.done.is_set() and refused.error.code == "UNAVAILABLE" and str(refused.error).startswith("max_inflight: 4")
    gate.open()
    assert all(answer.whole.text for answer in held)
    service.idle()
    assert service.ask(TEXT).whole


def test_a_default_of_max_tokens_is_a_wish_and_a_clients_own_a_demand(serve, prompts):
    service, text = serve(limits=Limits(max_tokens=512)), "x" * 400
    room = 512 - len(encode(prompts, text)) + 1
    assert 0 < room < 128, "the default of max_tokens"

    def ask(**sampling) -> Answer:
        answer = Answer()
        service.router.submit(GenerateRequest(
            [{"role": "user", "content": text}], {"ignore_eos": True, **sampling}, task="plain", returns=frozenset({"token_ids"})), answer)
        return answer

    assert len(ask().whole.token_ids) == room
    assert f"it can be at most {room} here" in str(ask(max_tokens=room + 1).error)
    assert str(ask(min_tokens=room + 1).error).startswith("sampling_parameters.min_tokens: ")
    small = serve(limits=Limits(max_tokens=512), kv_tokens=500)
    eventually(lambda: small.router.pool.largest == 500)
    service = small
    assert len(ask().whole.token_ids) == room - 12, "of a worker's pool, too"


def test_a_prompt_longer_than_every_pool_is_refused_by_what_it_is(serve):
    service = serve(limits=Limits(max_tokens=512), kv_tokens=60)
    eventually(lambda: service.router.pool.largest == 60)
    answer = Answer()
    service.router.submit(GenerateRequest([{"role": "user", "content": "x" * 200}], {}, task="plain"), answer)
    assert "are over this worker's limit of 60 tokens" in str(answer.error) and "min_tokens" not in str(answer.error)


# Prompts that a prefill module has run already.


def handed_over(service, prompts, change: dict = {}, task: str | None = None, prefilled: str = "lora", **sampling) -> Answer:
    prompt = encode(prompts)
    shipment = service.fleet.prefill(prefilled, prompt[:-1])
    shipment = [json.dumps(json.loads(shipment[0]) | change).encode(), *shipment[1:]]
    answer = Answer()
    service.router.submit(GenerateRequest(
        messages=[{"role": "user", "content": TEXT}], sampling={"temperature": 0, "max_tokens": 8, **sampling}, task=task,
        handover=Handover(prompt, shipment)), answer)
    return answer


def test_a_handed_over_prompt_gives_the_tasks_answer(serve, prompts, shm):
    service = serve(transport=shm)
    assert handed_over(service, prompts).whole.text == service.ask(TEXT, "lora").whole.text
    assert handed_over(service, prompts, task="lora").whole.finish_reason
    service.idle()
    eventually(lambda: files(shm) == 0)


def test_a_prompt_that_ran_in_int8_is_taken_over_as_its_tasks(serve, prompts, shm):
    service = serve(transport=shm, prefill_scheme="int8")
    assert service.fleet.prefills["lora"].task.weights_digest.startswith("int8:sha256:")
    assert handed_over(service, prompts).whole.text == service.ask(TEXT, "lora").whole.text
    error = handed_over(service, prompts, {"weights_digest": "int8:sha256:older"}).error
    assert str(error).startswith("ticket.weights_digest: int8:sha256:older is not task 'lora'")
    service.idle()
    eventually(lambda: files(shm) == 0)


@pytest.mark.parametrize(("change", "task", "reason"), [
    ({}, "plain", "^task: is 'plain', but the ticket is of task 'lora'"),
    ({"task": "poetry"}, None, "^task: 'poetry' is not known"),
    ({"task": "plain"}, None, r"^ticket\.weights_digest: "),
    ({"weights_digest": "sha256:older"}, None, r"^ticket\.weights_digest: sha256:older is not task 'lora'.*prefill the prompt again"),
    ({"version": 9}, None, r"^ticket\.version: "),
    ({"base_digest": "sha256:other"}, None, r"^ticket\.base_digest: "),
    ({"tokens": 3}, None, r"^ticket\.tokens: "),
])
def test_a_ticket_that_does_not_fit_is_refused_naming_the_field(serve, prompts, shm, change, task, reason):
    service = serve(transport=shm)
    error = handed_over(service, prompts, change, task).error
    assert error.code in ("INVALID_ARG", "NOT_FOUND")
    assert re.search(reason, str(error))
    service.idle()


def test_a_forged_location_harms_only_its_own_request(serve, prompts, shm):
    service = serve(transport=shm)
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    other = service.ask(TEXT, max_tokens=40, ignore_eos=True)
    gate.wait_entered(1)
    forged = handed_over(service, prompts, {"location": "../../../etc/passwd"})
    assert "ticket.location" in str(forged.error)
    eventually(lambda: engine.stats().waiting == 0)
    gate.open()
    assert len(other.whole.token_ids) == 40
    service.idle()


# Which worker gets it.


def test_partitioned_workers_never_decode_two_tasks_in_their_steps(serve):
    service = serve(workers=3, policy=Partitioned())
    answers = [service.ask(TEXT, ("plain", "lora", "full")[i % 3]) for i in range(18)]
    assert all(answer.whole.text is not None for answer in answers)
    seen = {worker: {task for record in engine.stats().steps for task in record.tasks} for worker, engine in service.fleet.decodes.items()}
    assert sorted(map(tuple, seen.values())) == [("full",), ("lora",), ("plain",)]


class Scripted(LocalFleet):
    """A fleet whose workers take everything, report what load they like, and are silent until released."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.reported, self.picked, self.released = {"decode_0": 500, "decode_1": 20, "decode_2": 300}, [], threading.Event()

    def admit(self, worker, admit, shipment):
        self.picked.append(worker)
        return Ack(load=Load(self.reported[worker], 1, 1000, time.monotonic_ns()))

    def stats(self, worker):
        stats = super().stats(worker)
        return msgspec.structs.replace(stats, load=msgspec.structs.replace(stats.load, at=0))  # older than whatever it reported

    def abort(self, worker, ids):
        return Ack(load=Load(self.reported[worker], 1, 1000, time.monotonic_ns()))

    def listen(self, worker, router):
        assert self.released.wait(PATIENCE_S)
        return iter(())


def test_any_task_goes_to_the_worker_with_the_least_reported_load(serve):
    service = serve(fleet=Scripted, workers=3)
    fleet, answers = service.fleet, []

    def ask(task: str) -> str:
        """The worker that the next request goes to, once its load is known."""
        count = len(fleet.picked)
        answers.append(service.ask(TEXT, task))
        eventually(lambda: len(fleet.picked) > count and service.router.pool.loads[fleet.picked[-1]].tokens == fleet.reported[fleet.picked[-1]])
        return fleet.picked[-1]

    assert sorted(ask(task) for task in ("plain", "lora", "full")) == ["decode_0", "decode_1", "decode_2"], "all were idle"
    fleet.reported["decode_1"] = 400
    assert ask("plain") == "decode_1"
    fleet.reported["decode_2"] = 450
    assert ask("plain") == "decode_2"
    fleet.reported["decode_1"] = 600
    assert [ask("full"), ask("lora"), ask("plain")] == ["decode_1", "decode_2", "decode_2"]
    fleet.released.set()
    assert all(answer.wait().errors for answer in answers)


def test_a_sequence_goes_to_a_worker_whose_pool_can_hold_it(serve):
    service = serve(workers=2, kv_tokens=400, limits=Limits(max_tokens=500))
    service.shrink("decode_0", 100)
    for _ in range(4):
        assert len(service.ask(TEXT, **OPEN_ENDED | {"max_tokens": 200}).whole.token_ids) == 200
    assert "this worker's limit of" in str(service.ask(TEXT, max_tokens=450).error), "too large for all: one says so"


def test_room_that_a_cancelled_sequence_had_is_used_again(serve):
    service = serve(workers=2, kv_tokens=460)
    cancelled = service.ask(TEXT, stream=True, **OPEN_ENDED)
    assert cancelled.begun.wait(PATIENCE_S)
    cancelled.gone = True
    cancelled.wait()
    eventually(lambda: all(load.room == 460 for load in service.router.pool.loads.values()))


def test_packed_requests_share_one_worker_until_its_batch_is_full_and_go_back_to_it_when_it_is_not(serve):
    service = serve(workers=3, policy=Pack(2))
    gates = [service.gate(f"decode_{i}") for i in range(3)]

    def counts() -> list[int]:
        return [stats.running + stats.waiting for stats in (engine.stats() for engine in service.fleet.decodes.values())]

    answers = []
    for expected in ([1, 0, 0], [2, 0, 0], [2, 1, 0]):
        answers.append(service.ask(TEXT, **OPEN_ENDED))
        eventually(lambda expected=expected: counts() == expected)
    answers[0].gone = True
    assert answers[0].error.code == "CANCELLED"
    gates[0].allow(3)
    eventually(lambda: counts() == [1, 1, 0])
    answers.append(service.ask(TEXT, **OPEN_ENDED))
    eventually(lambda: counts() == [2, 1, 0])
    for gate in gates:
        gate.open()
    assert all(len(answer.whole.token_ids) == 400 for answer in answers[1:])


def test_requests_spread_over_idle_workers_and_avoid_a_loaded_one(serve):
    service = serve(workers=2)
    gates = [service.gate(f"decode_{i}") for i in range(2)]
    long = service.ask(TEXT, **OPEN_ENDED)
    eventually(lambda: sorted(engine.stats().load.tokens for engine in service.fleet.decodes.values()) == [0, 400])
    loaded = next(name for name, engine in service.fleet.decodes.items() if engine.stats().load.tokens)
    short = [service.ask(TEXT, max_tokens=20, ignore_eos=True) for _ in range(6)]
    eventually(lambda: sum(engine.stats().load.tokens for engine in service.fleet.decodes.values()) == 520)
    assert service.fleet.decodes[loaded].stats().load.tokens == 400
    for gate in gates:
        gate.open()
    assert all(len(answer.whole.token_ids) == 20 for answer in short) and len(long.whole.token_ids) == 400


# All at once.


def test_two_hundred_random_requests_end_exactly_once_and_leave_nothing(serve, shm):
    service = serve(workers=2, transport=shm, kv_tokens=700, max_batch=6, token_budget=48, limits=Limits(max_inflight=60, max_tokens=300))
    rng, interval = random.Random(4), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        answers = []
        for i in range(200):
            if rng.random() < 0.8 and len(answers) > 40:
                answers[rng.randrange(len(answers) - 40, len(answers) - 20)].wait()
            answers.append(service.ask(
                "word " * rng.randint(1, 12), rng.choice(["plain", "lora", "full", "terse", "poetry"]), stream=rng.random() < 0.5,
                deadline_s=rng.choice([None, None, None, 0.001]), **rng.choice([
                    {}, {"temperature": 1.0}, {"temperature": 2.0, "seed": i, "stop": ["a", "e", " "]}, {"max_tokens": 200},
                    {"max_tokens": 9999}, {"top_p": 7}, {"ignore_eos": True, "max_tokens": 40},
                    {"logprobs": 3, "repetition_penalty": 1.2}])))
            if rng.random() < 0.15:
                rng.choice(answers).gone = True
        for answer in answers:
            answer.wait()
    finally:
        sys.setswitchinterval(interval)
    service.idle()
    eventually(lambda: files(shm) == 0)
    assert [answer.ends for answer in answers] == [1] * 200
    codes = {error.code for answer in answers for error in answer.errors}
    assert codes <= {"NOT_FOUND", "INVALID_ARG", "CANCELLED", "DEADLINE", "UNAVAILABLE"} and {"NOT_FOUND", "INVALID_ARG"} <= codes
    assert sum(not answer.errors for answer in answers) > 50
