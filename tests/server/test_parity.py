"""Greedy output through the server is, token for token, what plain transformers computes with the same split."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.conftest import GREEDY, REPO, SHIPPED
from tests.server.prompts import PROMPTS
from tests.server.reference import Reference

TIE = 1e-3
"""Logits closer than this may fall either way: a batch's matrix products round differently from a single row's."""


def check(prompts: list[str], got: list[list[int]], reference: Reference) -> None:
    """Compare answers; where one differs the reference's logit gap at that token must be a tie's."""
    ties = []
    for prompt, tokens in zip(prompts, got, strict=True):
        expected, gaps = reference.answer(prompt, GREEDY["max_tokens"])
        if tokens != expected:
            at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), min(len(tokens), len(expected)))
            gap = gaps[at] if at < len(gaps) else float("inf")
            assert gap < TIE, f"{prompt!r}: token {at} differs where the logit gap is {gap:g}: {tokens} != {expected}"
            ties.append((prompt, at, gap))
    assert len(ties) <= 1, f"too many ties to be chance: {ties}"


@pytest.mark.parametrize("task", SHIPPED)
def test_thirty_prompts_a_task_equal_the_reference(client, task):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: client.generate(task, prompt, sampling=GREEDY), PROMPTS[task]))
    check(PROMPTS[task], [a.token_ids for a in answers], Reference(REPO / "build" / "base", REPO / "build" / "tasks" / task))


def test_the_identity_task_equals_the_base_models_own_generate(client):
    reference = Reference(REPO / "build" / "base")
    for prompt in [prompts[0] for prompts in PROMPTS.values()]:
        ids = reference.prompt(prompt)
        expected = reference.decode.generate(ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=GREEDY["max_tokens"])
        assert client.generate("identity", prompt, sampling=GREEDY).token_ids == expected[0, ids.shape[1] :].tolist()


def test_tasks_answer_differently_from_the_base_and_from_each_other(client):
    texts = {task: client.generate(task, "show the size of each folder", sampling=GREEDY).text for task in (*SHIPPED, "identity")}
    assert len(set(texts.values())) == len(texts)
