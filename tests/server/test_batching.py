"""Requests of different tasks share decode steps, and none of them can tell."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sun.router.policy import PACK_BATCH
from tests.server.conftest import SHIPPED
from tests.server.prompts import PROMPTS

LONG = {"max_tokens": 40, "ignore_eos": True}


def test_a_request_gives_the_same_tokens_alone_and_among_fifteen_others(client):
    def ask(task: str, prompt: str, sampling: dict) -> list[int]:
        return client.generate(task, prompt, sampling={**LONG, **sampling}).token_ids

    asked = [("bash", PROMPTS["bash"][0], sampling) for sampling in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7})]
    alone = [ask(*one) for one in asked]
    others = [(SHIPPED[i % 3], PROMPTS[SHIPPED[i % 3]][i], {"temperature": 1.2, "seed": i}) for i in range(14)]
    with ThreadPoolExecutor(16) as pool:
        company = [pool.submit(ask, *other) for other in others]
        among = list(pool.map(lambda one: ask(*one), asked))
        assert all(len(future.result()) == LONG["max_tokens"] for future in company)
    assert among == alone
    assert [len(tokens) for tokens in alone] == [LONG["max_tokens"]] * 2


def test_a_workers_steps_hold_several_tasks(client):
    before = {worker: client.worker_stats(worker).step for worker in client.workers()}
    with ThreadPoolExecutor(12) as pool:
        # Long enough that the first answers still run when the last prompts are prefilled, on a busy machine too.
        list(pool.map(lambda i: client.generate(SHIPPED[i % 3], PROMPTS[SHIPPED[i % 3]][i], sampling={**LONG, "max_tokens": 64}), range(12)))
    batches = [record.tasks for worker, step in before.items() for record in client.worker_stats(worker, after=step).steps]
    assert max(map(len, batches)) == len(SHIPPED)
    # The shipped router packs: more than half go to one worker, until that has its batch.
    assert 12 // 2 < max(sum(batch.values()) for batch in batches) <= PACK_BATCH


def test_a_seed_fixes_the_text_and_no_seed_does_not(client):
    def ask(**seed: int) -> str:
        return client.generate("identity", "Tell me a story.", sampling={"temperature": 1.5, "max_tokens": 12, **seed}).text

    assert ask(seed=3) == ask(seed=3) != ask(seed=4)
    assert ask() != ask()
