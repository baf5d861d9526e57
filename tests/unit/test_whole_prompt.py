"""Tasks whose prefill module runs all of a prompt: the first token is chosen from what it makes of xn, and the decode module goes on from there."""

from __future__ import annotations

import shutil

import msgspec
import pytest
import torch

from sun.decode.cpu import CpuExecutor
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.handoff.inline import Inline
from sun.handoff.kv import hidden_state
from sun.handoff.ticket import parse
from sun.local import LocalFleet
from sun.model.loading import load_decode, load_prefill
from sun.model.manifest import TaskManifest, write_manifest
from sun.prefill import executors
from sun.prefill.engine import PrefillEngine
from sun.prefill.padded import PaddedExecutor
from sun.router.request import Handover
from sun_build.ensemble import ensemble_config

from ..conftest import DEVICE
from . import tiny
from .harness import TEXT, eventually, files

PROMPTS = [[(7 * i + 5 * j * j + 1) % tiny.VOCAB for j in range(1 + 9 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def whole(base_dir, adapter_dir, full_dir, tmp_path_factory):
    """A repository with an adapter and a checkpoint that run all of a prompt, and an adapter that does not."""
    repository = tmp_path_factory.mktemp("whole")
    tiny.task(repository, base_dir, "plain", "lora", adapter_dir)
    tiny.task(repository, base_dir, "lora", "lora", adapter_dir, whole_prompt=True)
    tiny.task(repository, base_dir, "full", "full", full_dir, whole_prompt=True)
    return repository


@pytest.fixture(scope="module")
def expected(base_dir, adapter_dir, full_dir):
    """A function: the tokens that plain transformers gives."""
    base, prefills = tiny.load(base_dir), {"lora": tiny.with_adapter(base_dir, adapter_dir), "full": tiny.load(full_dir)}
    return lambda task, prompt, count=8: tiny.reference_whole(prefills[task], base, prompt, count)


@pytest.mark.parametrize("task", ["lora", "full"])
def test_answers_are_those_of_plain_transformers(bench, whole, expected, task):
    it = bench(task=whole / f"prefill_{task}" / "1")
    for i, prompt in enumerate(PROMPTS):
        it.admit(str(i), prompt, task=task)
    assert it.answers() == {str(i): expected(task, prompt) for i, prompt in enumerate(PROMPTS)}
    assert it.pool.free_tokens == it.pool.budget


def test_they_share_steps_with_tasks_of_the_other_kind(bench, whole, base_dir, adapter_dir, expected):
    it, other = bench(task=whole / "prefill_lora" / "1", gated=True), bench(task=whole / "prefill_plain" / "1")
    for i, prompt in enumerate(PROMPTS):
        it.admit(f"whole {i}", prompt, task="lora")
        it.admit(f"plain {i}", prompt, other.shipment(prompt), task="plain")
    it.gate.open()
    answers = it.answers()
    base, tuned = tiny.load(base_dir), tiny.with_adapter(base_dir, adapter_dir)
    for i, prompt in enumerate(PROMPTS):
        assert answers[f"whole {i}"] == expected("lora", prompt) and answers[f"plain {i}"] == tiny.reference(tuned, base, prompt, 8)
    assert any(len(record.tasks) == 2 for record in it.engine.stats().steps)


def test_an_answer_of_one_token_needs_no_step(bench, whole, expected):
    it = bench(task=whole / "prefill_lora" / "1", gated=True)  # a step would never end
    it.admit("a", PROMPTS[3], task="lora", max_tokens=1)
    assert it.answers() == {"a": expected("lora", PROMPTS[3], 1)}


@pytest.mark.parametrize("sampled", [1, 2, 5])
def test_another_worker_goes_on_where_the_first_was_lost(bench, whole, sampled):
    lost, other = (bench(task=whole / "prefill_lora" / "1") for _ in range(2))
    shipment, sampling = lost.shipment(PROMPTS[4]), {"temperature": 1.0, "seed": 3, "task": "lora"}
    lost.admit("a", PROMPTS[4], shipment, **sampling)
    tokens = lost.answers()["a"]
    other.admit("a", PROMPTS[4], shipment, generated=tokens[:sampled], **sampling)
    assert other.answers()["a"] == tokens[sampled:]


@pytest.mark.parametrize(("token_budget", "prefix_tokens"), [(512, 0), (3, 0), (512, 512), (5, 512)])
def test_neither_chunks_nor_kept_beginnings_change_what_is_handed_over(base_dir, whole, token_budget, prefix_tokens):
    def engine(token_budget: int, prefix_tokens: int) -> PrefillEngine:
        task, module = load_prefill(base_dir, whole / "prefill_lora" / "1")
        return PrefillEngine(module, task, Inline(), token_budget, prefix_tokens=prefix_tokens)

    it, plain = engine(token_budget, prefix_tokens), engine(512, 0)
    try:
        for prompt in (PROMPTS[3], PROMPTS[3], PROMPTS[3][:16], [*PROMPTS[3][:16], 9]):
            got, known = (torch.frombuffer(bytearray(e.submit(prompt).result(60)[1]), dtype=torch.float32) for e in (it, plain))
            torch.testing.assert_close(got, known, rtol=1e-4, atol=1e-4)
    finally:
        it.close()
        plain.close()


@pytest.mark.parametrize("widens", [False, True], ids=["grouped", "widened"])
@pytest.mark.parametrize("token_budget", [512, 5])
@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_module_on_a_device_hands_over_what_the_cpus_does(bases, tmp_path, kind, scheme, token_budget, widens):
    """Without a GPU the device is the CPU."""
    tiny.task(tmp_path, bases(kind), "plain", whole_prompt=True)
    folder, handed = tmp_path / "prefill_plain" / "1", []
    for task, module in (load_prefill(bases(kind), folder), executors.load(bases(kind), folder, "cuda", scheme, DEVICE)):
        engine = PrefillEngine(module, task, Inline(), token_budget, prefix_tokens=512)
        engine.executor.widens |= widens
        try:
            shipments = [future.result(60) for future in [engine.submit(prompt) for prompt in PROMPTS]]
        finally:
            engine.close()
        handed.append([hidden_state(parse(shipment[0]), memoryview(bytearray(shipment[1]))) for shipment in shipments])
    for known, got in zip(*handed, strict=True):
        assert got.dtype is torch.float32 and (got - known).norm() < (1e-4 if scheme == "fp32" else 0.05) * known.norm()


def test_what_a_prefill_module_cannot_run_so_is_refused(base_dir, whole):
    task, module = load_prefill(base_dir, whole / "prefill_lora" / "1")
    engine = PrefillEngine(module, task, Inline())
    try:
        with pytest.raises(ValueError, match="input_ids: no tokens"):
            engine.submit([])
        with pytest.raises(ValueError, match=f"input_ids: {tiny.CONTEXT} tokens, the limit is {tiny.CONTEXT - 1}"):
            engine.submit([1] * tiny.CONTEXT)
    finally:
        engine.close()
    with pytest.raises(ValueError, match="executor: gives K and V alone; task 'lora' needs .*whole_prompt"):
        PrefillEngine(module, task, Inline(), executor=object.__new__(PaddedExecutor))


def test_a_worker_refuses_a_ticket_that_is_not_of_all_of_the_prompt(bench, whole):
    it = bench(task=whole / "prefill_lora" / "1")
    with pytest.raises(ValueError, match="ticket.tokens"):
        it.admit("a", [*PROMPTS[2], 5], it.shipment(PROMPTS[2]), task="lora")


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4", "nf4"])
def test_the_compiled_head_agrees_with_plain_torch_and_keeps_rows_apart(bases, scheme):
    base, model = load_decode(bases("wide"), scheme)
    executors = [kind(model, KVPool(base.geometry, 8)) for kind in (CpuExecutor, TorchExecutor)]
    torch.manual_seed(0)
    hidden = 4 * torch.randn(5, base.hidden)
    before = hidden.clone()
    got, known = (executor.logits(hidden).clone() for executor in executors)
    assert torch.equal(hidden, before) and (got - known).pow(2).mean().sqrt() < 0.02 * known.std()
    for i in range(5):
        assert torch.equal(executors[0].logits(hidden[i : i + 1])[0], got[i])


def test_a_router_serves_them_asked_for_by_name_or_handed_over(serve, shm, whole, expected):
    service = serve(repository=whole, transport=shm, workers=2)
    prompt = service.router.prompts.encode([{"role": "user", "content": TEXT}])
    known = expected("lora", prompt)
    answer = service.ask(TEXT, "lora", ignore_eos=True)
    assert answer.whole.token_ids == known
    handed = Handover(prompt, service.fleet.prefill("lora", prompt))
    assert service.ask(TEXT, None, more={"handover": handed}, ignore_eos=True).whole.token_ids == known
    eventually(lambda: files(shm) == 0)


@pytest.mark.parametrize("task", ["lora", "plain"])
def test_requests_notice_nothing_while_a_task_becomes_one_of_the_other_kind(serve, shm, whole, tmp_path, task):
    """Its files say so before its prefill module is loaded anew."""
    repository = tmp_path / "repository"
    shutil.copytree(whole, repository)
    service, folder = serve(repository=repository, transport=shm), repository / f"prefill_{task}" / "1"
    known = service.ask(TEXT, task, ignore_eos=True).whole.token_ids
    manifest = TaskManifest.load(folder)
    write_manifest(folder, msgspec.structs.replace(manifest, whole_prompt=not manifest.whole_prompt))
    assert service.ask(TEXT, task, ignore_eos=True).whole.token_ids == known
    eventually(lambda: files(shm) == 0)


@pytest.mark.parametrize("task", ["lora", "plain"])
def test_nor_when_the_new_module_is_loaded_just_after_the_old_one_had_the_prompt(serve, shm, whole, tmp_path, task):
    repository = tmp_path / "repository"
    shutil.copytree(whole, repository)
    folder = repository / f"prefill_{task}" / "1"
    manifest = msgspec.structs.replace(old := TaskManifest.load(folder), whole_prompt=not old.whole_prompt)

    class Loading(LocalFleet):
        calls = 0

        def prefill(self, name: str, ids: list[int]) -> list[bytes]:
            self.calls += 1
            if self.calls == 2:
                self.prefills[name].hidden = tiny.SIZE["hidden_size"] if manifest.whole_prompt else 0
            return super().prefill(name, ids)

    write_manifest(folder, manifest)
    known = serve(repository=repository, transport=shm).ask(TEXT, task, ignore_eos=True).whole.token_ids
    write_manifest(folder, old)
    service = serve(repository=repository, transport=shm, fleet=Loading)
    write_manifest(folder, manifest)
    assert service.ask(TEXT, task, ignore_eos=True).whole.token_ids == known and service.fleet.calls == 3
    eventually(lambda: files(shm) == 0)


def test_the_ensemble_gives_the_prefill_module_all_of_the_prompt():
    assert 'key: "input_ids" value: "prompt_ids"' in ensemble_config("a", whole_prompt=True)
    assert 'key: "input_ids" value: "input_ids"' in ensemble_config("a")
