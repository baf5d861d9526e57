"""The whole pipeline against plain transformers: same tokens as prefill model plus base model, alone or in company."""

from __future__ import annotations

import pytest
import torch

from sun.handoff.inline import Inline
from sun.handoff.shm import Shm

from . import tiny
from .harness import eventually

TEXTS = ("hello", "Was ist ein Schlüssel?", "👩‍👩‍👧 and 日本語", "x" * 90)
TASKS = ("plain", "lora", "full")


@pytest.fixture(scope="module")
def modules(base_dir, adapter_dir, full_dir):
    """task -> its prefill model in plain transformers."""
    plain = tiny.load(base_dir)
    return {"plain": plain, "lora": tiny.with_adapter(base_dir, adapter_dir), "full": tiny.load(full_dir)}


def encode(prompts, text: str) -> list[int]:
    return prompts.encode([{"role": "user", "content": text}])


@pytest.mark.parametrize("task", TASKS)
def test_greedy_tokens_are_those_of_the_tasks_prefill_and_the_bases_decode(serve, prompts, modules, task):
    service = serve()
    answers = {text: service.ask(text, task, max_tokens=24, ignore_eos=True) for text in TEXTS}
    for text, answer in answers.items():
        assert answer.whole.token_ids == tiny.reference(modules[task], modules["plain"], encode(prompts, text), 24)


def test_the_tasks_prefill_weights_change_the_answer(modules, prompts):
    prompt = encode(prompts, TEXTS[0])
    answers = {task: tuple(tiny.reference(modules[task], modules["plain"], prompt, 24)) for task in TASKS}
    assert len(set(answers.values())) == 3, "the references do not tell the tasks apart, so the parity tests show nothing"


def test_with_the_bases_own_weights_the_answer_is_the_bases_generate(serve, prompts, modules):
    prompt = encode(prompts, TEXTS[1])
    expected = modules["plain"].generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(prompt):]
    assert serve().ask(TEXTS[1], max_tokens=24, ignore_eos=True).whole.token_ids == expected.tolist()


@pytest.mark.parametrize(("kind", "lora"), [
    ("llama3", False), ("llama3", True), ("yarn", False), ("mistral", False), ("qwen2", False), ("qwen2", True),
    ("qwen3", False), ("qwen3", True),
])
def test_every_supported_architecture_gives_the_tokens_of_transformers(serve, prompts, bases, tmp_path, kind, lora):
    base_dir = bases(kind)
    weights = tiny.adapter(tmp_path / "adapter", base_dir) if lora else None
    tiny.task(tmp_path / "repository", base_dir, "it", "lora" if lora else "identity", weights)
    decode = tiny.load(base_dir)
    prefill = tiny.with_adapter(base_dir, weights) if lora else decode
    service = serve(base=base_dir, repository=tmp_path / "repository")
    text = "It was a dark and stormy night; " * 4  # past the 64 positions from which llama3's scaling matters
    answer = service.ask(text, "it", max_tokens=24, ignore_eos=True)
    assert answer.whole.token_ids == tiny.reference(prefill, decode, encode(prompts, text), 24)


def test_tied_and_untied_embeddings_are_both_among_the_bases_tested(bases):
    from sun.model.weights import map_checkpoint
    assert "lm_head.weight" not in map_checkpoint(bases("llama"))
    assert "lm_head.weight" in map_checkpoint(bases("llama3"))


@pytest.mark.parametrize("transport", ["inline", "shm"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.95, "seed": 11, "frequency_penalty": 0.4, "logprobs": 2}])
def test_an_answer_is_the_same_alone_and_among_fifteen_others(serve, tmp_path, transport, sampling):
    carrier = Inline() if transport == "inline" else Shm(tmp_path / "kv", publisher=True)
    service = serve(transport=carrier)
    alone = service.ask("the one", "lora", max_tokens=30, ignore_eos=True, **sampling).whole
    gate, engine = service.gate(), service.fleet.decodes["decode_0"]
    others = [service.ask(f"other {i} " * (i + 1), TASKS[i % 3], temperature=1.0, seed=i, max_tokens=10 + 3 * i) for i in range(15)]
    answer = service.ask("the one", "lora", max_tokens=30, ignore_eos=True, **sampling)
    gate.wait_entered(1)  # the first step may have only some of them; the next has all
    eventually(lambda: engine.stats().running == 16)
    gate.open()
    among = answer.whole
    assert (among.text, among.token_ids) == (alone.text, alone.token_ids) and len(among.token_ids) == 30
    assert [entry["token_id"] for entry in among.logprobs] == [entry["token_id"] for entry in alone.logprobs]
    assert all(other.wait().errors == [] for other in others)
    assert {"plain": 5, "lora": 6, "full": 5} in [record.tasks for record in engine.stats().steps]
    if transport == "shm":
        service.idle()
        eventually(lambda: [entry.name for entry in carrier.owner.iterdir()] == [".lock"])
        carrier.close()


def test_the_workers_and_the_transport_do_not_matter(serve, tmp_path):
    first = serve(workers=2, token_budget=5)
    carrier = Shm(tmp_path / "kv", publisher=True)
    second = serve(workers=1, transport=carrier, max_batch=2, kv_tokens=300)
    texts = [f"{i} bottles of beer" for i in range(10)]
    answers = [
        [service.ask(text, TASKS[i % 3], max_tokens=16, temperature=0.8, seed=i) for i, text in enumerate(texts)]
        for service in (first, second)]
    assert [a.whole.token_ids for a in answers[0]] == [a.whole.token_ids for a in answers[1]]
    carrier.close()
