"""The adapters of whole prompts that come with the repository answer through router, prefill and decode engine as plain transformers does."""

from __future__ import annotations

import pytest

from sun_build.contestants import Contestant
from sun_build.evaluate import engine_answers
from sun_build.tune.data import Conversation
from tests.server.conftest import REPO
from tests.server.prompts import PROMPTS
from tests.server.reference import Reference
from tests.server.test_parity import TIE

BASE, COUNT = REPO / "build" / "base", 4


@pytest.mark.parametrize("task", ["banking", "bash"])
def test_answers_are_the_references(task):
    folder, prompts = REPO / "build" / "whole_prompt" / task, PROMPTS[task][:COUNT]
    reference = Reference(BASE, folder, whole_prompt=True)
    conversations = [Conversation(prompt, [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}], {}) for prompt in prompts]
    for prompt, text in zip(prompts, engine_answers(BASE, Contestant(task, folder), conversations), strict=True):
        tokens = [*reference.tokenizer(text, add_special_tokens=False).input_ids, reference.tokenizer.eos_token_id]
        assert len(tokens) > 1 and max(reference.short_of(prompt, tokens)) < TIE
