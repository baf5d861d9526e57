"""The engine gives an executor that cannot continue whole prompts only; padded ones go in batches of similar length within the model's limits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import parse
from sun.model.loading import load_prefill
from sun.prefill.engine import PrefillEngine
from sun.prefill.executor import TorchExecutor
from sun.prefill.exported import ExportManifest
from sun.prefill.jobs import Chunk, Job, plan_whole
from sun.prefill.padded import PaddedExecutor, batches

from . import tiny
from .harness import PATIENCE_S, within

PROMPTS = [[(5 * i + j * j) % tiny.VOCAB for j in range(length)] for i, length in enumerate((40, 1, 90, 8, 41, 300))]


def jobs(sizes: list[int]) -> deque[Job]:
    """Prompts of these lengths, of which nothing has run."""
    return deque(Job(torch.zeros(size, dtype=torch.int64), Future()) for size in sizes)


class Whole:
    """Torch, but for prompts that begin at their first token."""

    continues, max_tokens = False, 100
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, inner: TorchExecutor):
        self.inner, self.sizes = inner, []

    def run(self, chunks: list[Chunk]) -> None:
        """See `Executor.run`."""
        assert all(chunk.job.done == 0 and chunk.until == len(chunk.job.ids) for chunk in chunks)
        self.sizes.append([chunk.size for chunk in chunks])
        self.inner.run(chunks)


@pytest.fixture
def parts(base_dir, repository):
    """Task and module of ``lora``."""
    return load_prefill(base_dir, repository / "prefill_lora" / "1")


@pytest.fixture
def whole(parts) -> Iterator[PrefillEngine]:
    """An engine with such an executor, with a small budget and a prefix cache that it must not use."""
    engine = PrefillEngine(parts[1], parts[0], Inline(), 64, prefix_tokens=1024, executor=Whole(TorchExecutor(parts[1])))
    yield engine
    within(engine.close)


def kv(engine: PrefillEngine, ids: list[int]) -> torch.Tensor:
    shipment = engine.submit(ids).result(PATIENCE_S)
    ticket = parse(shipment[0])
    with Inline().pull(ticket, shipment) as buffer:
        return verified_kv(ticket, buffer)


def test_an_executor_that_cannot_continue_gets_whole_prompts_also_the_second_time(whole, parts):
    plain = PrefillEngine(parts[1], parts[0], Inline())
    for ids in PROMPTS[:5] * 2:
        assert torch.allclose(kv(whole, ids), kv(plain, ids), rtol=1e-4, atol=1e-4)
    assert whole.executor.sizes == [[len(ids)] for ids in PROMPTS[:5] * 2] and whole.cache.found == 0
    within(plain.close)


def test_a_prompt_longer_than_the_executor_runs_is_refused_naming_the_limit(whole):
    with pytest.raises(ValueError, match="^input_ids: 300 tokens, the limit is 100$"):
        whole.submit(PROMPTS[5])


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(1, 60))
def test_whole_prompts_keep_the_budget_and_their_order_and_the_oldest_always_runs(sizes, budget):
    waiting = jobs(sizes)
    chunks = plan_whole(waiting, budget)
    assert [chunk.job for chunk in chunks] == list(waiting)[: len(chunks)] and all(chunk.size == chunk.job.left for chunk in chunks)
    assert len(chunks) == 1 or sum(chunk.size for chunk in chunks) <= budget
    assert len(chunks) == len(sizes) or sum(sizes[: len(chunks) + 1]) > budget


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_hold_every_prompt_once_within_the_limit_and_less_padding_than_tokens(sizes, most):
    chunks = [Chunk(job, job.left) for job in jobs(sizes)]
    made = list(batches(chunks, most))
    assert sorted(id(chunk) for batch in made for chunk in batch) == sorted(map(id, chunks))
    assert all(len(batch) <= most and 2 * min(c.size for c in batch) >= max(c.size for c in batch) for batch in made)


def test_what_an_exported_model_gives_must_have_the_tickets_shape(parts, tmp_path):
    task, model = parts
    ExportManifest(format="onnx", task=task.name, base_digest=task.base_digest, weights_digest=task.weights_digest, dtype="fp32", lora="none",
                   opset=18, max_batch=2, max_tokens=50).save(tmp_path)
    executor = PaddedExecutor(lambda ids: [torch.zeros(len(ids), 2, 2, 2, ids.shape[1], 7)], tmp_path, model.base, task)
    engine = PrefillEngine(model, task, Inline(), executor=executor)
    with pytest.raises(RuntimeError, match=r"gave \[1, 2, 2, 2, 8, 7\] torch.float32, expected \[1, 2, 2, 2, 8, 12\]"):
        engine.submit(PROMPTS[3]).result(PATIENCE_S)
    with pytest.raises(ValueError, match="limit is 50"):
        engine.submit(PROMPTS[2])
    within(engine.close)
