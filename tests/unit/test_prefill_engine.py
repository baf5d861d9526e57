"""Prefill gives each prompt the KV of its task's model, whatever else is in the pass, and fails one prompt at a time."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.shm import Shm, published
from sun.handoff.ticket import check_fits, parse
from sun.model.loading import load_prefill
from sun.prefill.engine import Job, PrefillEngine, plan

from . import tiny
from .harness import PATIENCE_S, within

PROMPTS = [[(7 * i + j * j) % tiny.VOCAB for j in range(length)] for i, length in enumerate((1, 2, 37, 3, 64, 9))]


@pytest.fixture
def prefill(base_dir, repository):
    """Makes engines of the task ``lora`` unless told otherwise."""
    made = []

    def make(token_budget: int = 512, task: str = "lora", transport=None, prefix_tokens: int = 0) -> PrefillEngine:
        manifest, module = load_prefill(base_dir, repository / f"prefill_{task}" / "1")
        made.append(PrefillEngine(module, manifest, transport or Inline(), token_budget, prefix_tokens=prefix_tokens))
        return made[-1]

    yield make
    for engine in made:
        within(engine.close)


def kv(shipment: list[bytes]) -> torch.Tensor:
    ticket = parse(shipment[0])
    with Inline().pull(ticket, shipment) as buffer:
        return verified_kv(ticket, buffer)


@torch.no_grad()
def expected(model, ids: list[int]) -> torch.Tensor:
    """K and V by plain transformers, in a ticket's layout."""
    cache = model(torch.tensor([ids]), use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


class Held:
    """Keeps an engine's first pass until told to go on, so that what is submitted meanwhile shares the next."""

    def __init__(self, engine: PrefillEngine):
        self.began, self.go = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        self._fill = engine.model.fill
        engine.model.fill = self

    def __call__(self, ids, *rest):
        self.sizes.append(len(ids))
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        return self._fill(ids, *rest)


@pytest.mark.parametrize("task", ["plain", "lora", "full"])
def test_kv_is_that_of_the_tasks_own_model(prefill, base_dir, adapter_dir, full_dir, task):
    model = tiny.with_adapter(base_dir, adapter_dir) if task == "lora" else tiny.load(full_dir if task == "full" else base_dir)
    engine = prefill(task=task)
    for ids in PROMPTS:
        torch.testing.assert_close(kv(engine.submit(ids).result(PATIENCE_S)), expected(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token_budget", [1, 3, 7, 512])
def test_kv_does_not_depend_on_chunks_or_company(prefill, token_budget):
    alone = {tuple(ids): kv(prefill(4096).submit(ids).result(PATIENCE_S)) for ids in PROMPTS}
    engine = prefill(token_budget)
    held = Held(engine)
    futures = [engine.submit(ids) for ids in PROMPTS]
    held.go.set()
    for ids, future in zip(PROMPTS, futures, strict=True):
        whole = alone[tuple(ids)]
        assert torch.allclose(kv(future.result(PATIENCE_S)), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert max(held.sizes) <= token_budget


@pytest.mark.parametrize("token_budget", [3, 512])
def test_a_shared_beginning_is_run_once_and_gives_the_same_kv(prefill, token_budget):
    beginning = PROMPTS[4][:41]
    prompts = [[*beginning, *PROMPTS[i]] for i in (0, 2, 5)] + [beginning, beginning[:24], [*PROMPTS[4], *PROMPTS[4]]]
    engine, plain = prefill(token_budget, prefix_tokens=1024), prefill(token_budget)
    for ids in prompts * 2:
        whole = kv(plain.submit(ids).result(PATIENCE_S))
        assert torch.allclose(kv(engine.submit(ids).result(PATIENCE_S)), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    # The second time all whole blocks are there, and the first time 40 or 24 tokens of all but the first.
    assert engine.cache.found == 4 * 40 + 24 + sum(len(ids) // 8 * 8 for ids in prompts)


def test_a_ticket_names_base_task_weights_and_tokens(prefill, base):
    engine = prefill()
    ticket = parse(engine.submit(PROMPTS[2]).result(PATIENCE_S)[0])
    assert (ticket.task, ticket.weights_digest, ticket.tokens) == ("lora", engine.task.weights_digest, 37)
    check_fits(ticket, base, "lora", 38)


def test_no_tokens_give_an_empty_kv(prefill):
    shipment = prefill().submit([]).result(PATIENCE_S)
    assert parse(shipment[0]).tokens == 0 and kv(shipment).numel() == 0


def test_no_tokens_are_shipped_among_others(prefill):
    engine = prefill(4)
    held = Held(engine)
    first, empty, last = engine.submit(PROMPTS[4]), engine.submit([]), engine.submit(PROMPTS[1])
    held.go.set()
    assert [parse(f.result(PATIENCE_S)[0]).tokens for f in (first, empty, last)] == [64, 0, 2]


def test_prefill_needs_neither_the_head_nor_the_last_layers_rest(prefill):
    engine = prefill(task="plain")
    whole = kv(engine.submit(PROMPTS[2]).result(PATIENCE_S))
    model, last = engine.model, engine.model.layers[-1]
    model.head = model.final_norm = None
    last.q = last.o = last.gate = last.up = last.down = last.norm_mlp = None
    assert torch.equal(kv(engine.submit(PROMPTS[2]).result(PATIENCE_S)), whole)


def test_prompts_that_wait_together_run_together(prefill):
    engine = prefill()
    held = Held(engine)
    first = engine.submit([1, 2, 3])
    assert held.began.wait(PATIENCE_S)
    rest = [engine.submit([i] * 10) for i in range(4)]
    held.go.set()
    for future in (first, *rest):
        future.result(PATIENCE_S)
    assert held.sizes == [3, 40]


def test_a_short_prompt_need_not_wait_for_the_end_of_a_long_one(prefill):
    engine = prefill(8)
    held = Held(engine)
    long = engine.submit([1] * 200)
    assert held.began.wait(PATIENCE_S)
    short = engine.submit([2] * 4)
    order: list[str] = []
    long.add_done_callback(lambda _: order.append("long"))
    short.add_done_callback(lambda _: order.append("short"))
    held.go.set()
    long.result(PATIENCE_S)
    assert order == ["short", "long"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8), st.integers(1, 40))
def test_a_plan_keeps_its_budget_wastes_none_of_it_and_advances_the_oldest(sizes, budget):
    jobs = deque(Job(torch.zeros(a + b, dtype=torch.int64), Future(), done=a) for a, b in sizes)
    chunks = plan(jobs, budget)
    assert all(0 <= chunk.size <= chunk.job.left for chunk in chunks)
    assert [chunk.job for chunk in chunks] == list(jobs)[: len(chunks)]
    assert sum(chunk.size for chunk in chunks) == min(budget, sum(job.left for job in jobs))
    assert chunks[0].size > 0 or not jobs[0].left
    if len(jobs) > 1 and sum(job.left for job in list(jobs)[1:]) >= budget // 2:
        assert chunks[0].size <= (budget + 1) // 2, "the oldest took more than its half while others wait"


@pytest.mark.parametrize(("ids", "reason"), [
    ([-1], "token ids must be 0 to 299"), ([5, tiny.VOCAB], "token ids must be 0 to 299"), ([0] * (tiny.CONTEXT - 1), "limit is 510"),
])
def test_ids_that_the_base_does_not_have_are_refused_naming_the_limit(prefill, ids, reason):
    with pytest.raises(ValueError, match=f"^input_ids: .*{reason}"):
        prefill().submit(ids)


def test_the_longest_prompt_is_prefilled(prefill):
    assert parse(prefill().submit([0] * (tiny.CONTEXT - 2)).result(PATIENCE_S)[0]).tokens == tiny.CONTEXT - 2


def test_a_prompt_without_room_fails_alone(prefill, tmp_path, monkeypatch):
    take = os.posix_fallocate

    def small(fd: int, offset: int, size: int) -> None:
        if size > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        take(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    shm = Shm(tmp_path / "kv", publisher=True)
    engine = prefill(transport=shm)
    held = Held(engine)
    first = engine.submit([9])
    assert held.began.wait(PATIENCE_S)
    before, big, after = engine.submit([1] * 10), engine.submit([2] * 300), engine.submit([3] * 10)
    held.go.set()
    with pytest.raises(OSError, match=r"no room for the KV of 300 tokens \(shm\)") as error:
        big.result(PATIENCE_S)
    assert error.value.errno == errno.ENOSPC
    assert [parse(f.result(PATIENCE_S)[0]).tokens for f in (first, before, after)] == [1, 10, 10]
    assert len(list(shm.owner.iterdir())) == 4, "what did not fit left a file behind"
    assert parse(engine.submit([4]).result(PATIENCE_S)[0]).tokens == 1
    shm.close()


def test_a_pass_that_fails_takes_only_its_own_prompts_and_leaves_no_kv(prefill, tmp_path):
    shm = Shm(tmp_path / "kv", publisher=True)
    engine = prefill(transport=shm)
    fill = engine.model.fill

    def broken(ids, *rest):
        engine.model.fill = fill
        raise RuntimeError("out of luck")

    engine.model.fill = broken
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.submit([1, 2, 3]).result(PATIENCE_S)
    assert [entry.name for entry in shm.owner.iterdir()] == [".lock"]
    assert parse(engine.submit([1, 2, 3]).result(PATIENCE_S)[0]).tokens == 3
    shm.close()


def test_in_a_pass_that_fails_only_the_prompt_that_fails_alone_gets_the_error(prefill):
    engine = prefill()
    fill = engine.model.fill

    def short_of_memory(ids, *rest):
        if 77 in ids.tolist():
            raise MemoryError("no memory for this one")
        return fill(ids, *rest)

    engine.model.fill = short_of_memory
    held = Held(engine)
    first = engine.submit([9])
    assert held.began.wait(PATIENCE_S)
    before, bad, after = engine.submit([1] * 10), engine.submit([77] * 10), engine.submit([3] * 10)
    held.go.set()
    with pytest.raises(MemoryError, match="no memory for this one"):
        bad.result(PATIENCE_S)
    assert [parse(f.result(PATIENCE_S)[0]).tokens for f in (first, before, after)] == [1, 10, 10]
    assert torch.equal(kv(before.result()), kv(engine.submit([1] * 10).result(PATIENCE_S)))


def test_without_memory_to_map_its_kv_a_prompt_fails_alone(prefill, tmp_path, monkeypatch):
    shm = Shm(tmp_path / "kv", publisher=True)
    engine = prefill(transport=shm)

    def no_memory(*arguments):
        monkeypatch.undo()
        raise MemoryError

    monkeypatch.setattr("sun.prefill.engine.kv_tensor", no_memory)
    with pytest.raises(OSError, match=r"no room for the KV of 3 tokens \(shm\): MemoryError"):
        engine.submit([1, 2, 3]).result(PATIENCE_S)
    assert published(shm.root) == []
    assert parse(engine.submit([1, 2, 3]).result(PATIENCE_S)[0]).tokens == 3
    shm.close()


def test_without_memory_to_keep_a_beginning_prompts_are_prefilled_all_the_same(prefill, monkeypatch):
    engine = prefill(prefix_tokens=64)
    ids = list(range(24))
    whole = kv(engine.submit(ids).result(PATIENCE_S))

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(engine.cache, "add", no_memory)
    engine.submit([5] * 24).result(PATIENCE_S)
    torch.testing.assert_close(kv(engine.submit(ids).result(PATIENCE_S)), whole)
    assert engine.cache.match(ids) == []


def test_closing_finishes_what_is_queued_and_then_takes_no_more(prefill):
    engine = prefill(4)
    held = Held(engine)
    futures = [engine.submit([1] * 20) for _ in range(3)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    held.go.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive() and all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="shutting down"):
        engine.submit([1])


def test_its_progress_moves_with_every_pass_and_stands_still_in_one(prefill):
    engine = prefill(8)
    assert engine.progress() is None
    held = Held(engine)
    future = engine.submit([1] * 20)
    assert held.began.wait(PATIENCE_S)
    first = engine.progress()
    assert first is not None and engine.progress() == first
    held.go.set()
    future.result(PATIENCE_S)
    assert engine.progress() is None and engine._passes == first + 2


def test_past_what_may_be_outstanding_a_prompt_is_refused_until_tickets_are_released(prefill, tmp_path):
    shm = Shm(tmp_path / "kv", publisher=True)
    engine = prefill(transport=shm)
    shm.most = 2 * engine.model.geometry.kv_bytes(60, 4)
    tickets = [parse(engine.submit([1] * 60).result(PATIENCE_S)[0]) for _ in range(2)]
    with pytest.raises(OSError, match=r"^\[Errno \d+\] no room for the KV of 60 tokens \(shm\): max_ticket_tokens: "):
        engine.submit([1] * 60).result(PATIENCE_S)
    shm.release(tickets[0])
    assert parse(engine.submit([1] * 60).result(PATIENCE_S)[0]).tokens == 60
    shm.close()
