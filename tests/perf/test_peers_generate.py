"""The transformers peer on a tiny model: each way of batching answers a mixed wave as each task's own model does, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_client.root import Root
from sun_perf.peers.batched import Batched
from sun_perf.peers.generate import make
from sun_perf.peers.prompts import TASKS, Prompts
from sun_perf.peers.system import Place
from tests.unit import tiny

TOKENS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Root:
    """A checkout's folders with a tiny base and an adapter for every task but one."""
    path = tmp_path_factory.mktemp("root")
    build_base(str(tiny.checkpoint(path / "source")), path / "build" / "base", PromptSettings())
    for seed, task in enumerate(TASKS[:-1]):
        tiny.adapter(path / "build" / "tasks" / task, path / "build" / "base", seed=seed + 1)
    return Root(path)


@pytest.mark.parametrize("mode", ["separate", "mixed", "continuous"])
def test_every_row_is_its_own_models_answer(root, mode):
    adapters = {task: root.shipped / task if (root.shipped / task).is_dir() else None for task in TASKS}
    rows = [(task, list(range(1, 5 + 3 * i))) for i, task in enumerate([*TASKS, TASKS[0]])]
    made = make(mode, root.base, adapters)(rows, TOKENS)
    for (task, ids), tokens in zip(rows, made, strict=True):
        model = tiny.with_adapter(root.base, adapters[task]) if adapters[task] else tiny.load(root.base)
        with torch.no_grad():
            expected = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
        assert tokens == expected[0, len(ids):].tolist(), (mode, task)


def test_unknown_modes_are_refused(root):
    with pytest.raises(ValueError, match="mode: got 'both'"):
        make("both", root.base, {})


def test_a_wave_through_the_worker(root, tmp_path: Path):
    with Batched(Place(root, tmp_path, port=1, threads=1, most=8), "mixed") as peer:
        peer.freeze()
        peer.thaw()
        wave = peer.wave(Prompts().take(5), TOKENS)
    assert wave.tokens == 5 * TOKENS and wave.ttft_ms == []
