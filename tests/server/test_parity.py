"""Greedy output through the server is, token for token, what plain transformers computes with the same split."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sun_client.client import Answer
from tests.server.conftest import GREEDY, REPO, SHIPPED
from tests.server.prompts import PROMPTS
from tests.server.reference import Reference

TIE = 1e-3
"""Logits closer than this may fall either way: a batch's matrix products round differently from a single row's."""


def check(prompts: list[str], answers: list[Answer], reference: Reference) -> None:
    """Every token must be the reference's likeliest, or as likely but for rounding; and an answer ends where it must."""
    ties = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, eos = answer.token_ids, reference.tokenizer.eos_token_id
        assert eos not in tokens[:-1] and (len(tokens) == GREEDY["max_tokens"] or tokens[-1] == eos), (prompt, tokens)
        short = reference.short_of(prompt, tokens)
        assert max(short) < TIE, f"{prompt!r}: token {short.index(max(short))} is {max(short):g} below the reference's likeliest: {tokens}"
        ties += [(prompt, i) for i, gap in enumerate(short) if gap]
    assert len(ties) <= 1, f"too many ties to be chance: {ties}"


@pytest.mark.parametrize("task", SHIPPED)
def test_thirty_prompts_a_task_equal_the_reference(client, task):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: client.generate(task, prompt, sampling=GREEDY), PROMPTS[task]))
    check(PROMPTS[task], answers, Reference(REPO / "build" / "base", REPO / "build" / "tasks" / task))


def test_the_identity_task_equals_the_base_models_own_generate(client):
    reference = Reference(REPO / "build" / "base")
    for prompt in [prompts[0] for prompts in PROMPTS.values()]:
        ids = reference.prompt(prompt)
        expected = reference.decode.generate(ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=GREEDY["max_tokens"])
        assert client.generate("identity", prompt, sampling=GREEDY).token_ids == expected[0, ids.shape[1] :].tolist()


def test_tasks_answer_differently_from_the_base_and_from_each_other(client):
    texts = {task: client.generate(task, "show the size of each folder", sampling=GREEDY).text for task in (*SHIPPED, "identity")}
    assert len(set(texts.values())) == len(texts)
