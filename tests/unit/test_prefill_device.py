"""A prefill module on a device gives the CPU module's KV, up to the rounding of its format. Without a GPU the device is the CPU."""

from __future__ import annotations

import pytest
import torch

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import Ticket, parse
from sun.model.loading import load_prefill
from sun.model.manifest import TaskManifest
from sun.prefill.engine import PrefillEngine
from sun.prefill.executors import load

from ..conftest import DEVICE
from . import tiny
from .harness import PATIENCE_S, within

PROMPTS = [[(7 * i + j * j) % tiny.VOCAB for j in range(length)] for i, length in enumerate((1, 2, 37, 3, 64, 9))]
BF16 = 0.02
"""Largest difference of bf16's K and V to float32's, root mean square, as a share of theirs: each layer adds roundings of 2^-9 to what it is given."""


@pytest.fixture
def engines(base_dir, repository):
    """Makes engines: of the CPU's module for scheme None, else of one on the device."""
    made = []

    def make(scheme: str | None, task: str = "lora", base=base_dir, repository=repository, transport=None, **settings) -> PrefillEngine:
        folder = repository / f"prefill_{task}" / "1"
        manifest, module = load_prefill(base, folder) if scheme is None else load(base, folder, "cuda", scheme, DEVICE)
        made.append(PrefillEngine(module, manifest, transport or Inline(), **settings))
        return made[-1]

    yield make
    for engine in made:
        within(engine.close)


def run(engine: PrefillEngine, prompts: list[list[int]] = PROMPTS) -> list[tuple[Ticket, torch.Tensor]]:
    """Tickets and KV of prompts that are queued together."""
    answers = []
    for future in [engine.submit(ids) for ids in prompts]:
        shipment = future.result(PATIENCE_S)
        ticket = parse(shipment[0])
        with Inline().pull(ticket, shipment) as buffer:
            answers.append((ticket, verified_kv(ticket, buffer).clone()))
    return answers


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm()) if got.numel() else 0.0


def compare(got: PrefillEngine, plain: PrefillEngine, prompts: list[list[int]] = PROMPTS) -> None:
    for (ticket, kv), (other, expected) in zip(run(got, prompts), run(plain, prompts), strict=True):
        assert kv.shape == expected.shape and ticket.tokens == other.tokens
        if ticket.dtype == "bfloat16":
            assert kv.dtype is torch.bfloat16 and ticket.nbytes == other.nbytes // 2 and off_by(kv, expected) < BF16
        else:
            torch.testing.assert_close(kv, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["plain", "lora", "full"])
def test_every_kind_of_task_has_the_cpus_kv(engines, scheme, task):
    compare(engines(scheme, task), engines(None, task))


@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama3"])
def test_every_architecture_has_the_cpus_kv(engines, bases, tmp_path, scheme, kind):
    tiny.task(tmp_path, bases(kind), "plain")
    compare(*(engines(each, "plain", bases(kind), tmp_path) for each in (scheme, None)))


@pytest.mark.parametrize("widens", [False, True], ids=["grouped", "widened"])
@pytest.mark.parametrize("token_budget", [3, 512])
@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
def test_chunks_and_shared_beginnings_give_the_same_kv(engines, scheme, token_budget, widens):
    engine = engines(scheme, token_budget=token_budget, prefix_tokens=1024)
    engine.executor.widens = widens
    prompts = [[*PROMPTS[4][:41], *PROMPTS[i]] for i in (0, 2, 5)]
    for _ in range(2):
        compare(engine, engines(None), prompts)
    assert engine.cache.found >= sum(len(ids) // 8 * 8 for ids in prompts), "beginnings were not used"


@pytest.mark.parametrize("scheme", ["fp32", "bf16"])
def test_what_lies_elsewhere_than_the_pass_writes_is_copied_there(engines, scheme):
    engine = engines(scheme)
    # The CPU by another name: neither a pass nor its results are moved, but what is published must be.
    engine.executor.device = torch.device(DEVICE, 0)
    compare(engine, engines(None), [*PROMPTS, []])


def test_a_bf16_modules_tickets_say_so_and_are_the_tasks(engines, repository):
    task = TaskManifest.load(repository / "prefill_lora" / "1")
    ((ticket, _),) = run(engines("bf16"), PROMPTS[:1])
    assert (ticket.dtype, ticket.weights_digest) == ("bfloat16", f"bf16:{task.weights_digest}") and task.made(ticket.weights_digest)
    ((ticket, _),) = run(engines("fp32"), PROMPTS[:1])
    assert (ticket.dtype, ticket.weights_digest) == ("float32", task.weights_digest)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sequence_is_decoded_from_it(engines, bench, dtype):
    it = bench()
    it.admit("cpu", [5] * 20, max_tokens=4)
    expected = it.answers()["cpu"]
    within(it.prefill.close)
    it.prefill = engines(dtype, "plain", transport=it.transport)
    it.admit("device", [5] * 20, max_tokens=4)
    got = it.answers()["device"]
    assert len(got) == len(expected) == 4 and (dtype == "bf16" or got == expected)


@pytest.mark.parametrize(("executor", "scheme", "reason"), [
    ("tpu", "fp32", "executor: got 'tpu', expected one of torch, onnx, triton, cuda, tensorrt"), ("cuda", "int8", "scheme: got 'int8', executor cuda has fp32, bf16"),
    ("torch", "bf16", "prefill scheme: got 'bf16', expected one of fp32, int8")])
def test_an_executor_or_scheme_that_there_is_not_is_refused_by_name(base_dir, repository, executor, scheme, reason):
    with pytest.raises(ValueError, match=reason):
        load(base_dir, repository / "prefill_lora" / "1", executor, scheme)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_without_a_gpu_it_is_said_why(base_dir, repository):
    with pytest.raises(RuntimeError, match="executor: cuda does not run here: torch .* CUDA"):
        load(base_dir, repository / "prefill_lora" / "1", "cuda", "bf16", "cuda:0")


class Recorder:
    """An executor on a device that is not there; keeps what it is to run."""

    continues, max_tokens, device, dtype = True, 0, torch.device("meta"), torch.bfloat16

    def __init__(self):
        self.passes = []

    def run(self, chunks):
        self.passes += [(chunk.job.done, chunk.until, *chunk.job.kv.shape, chunk.job.kv.dtype, chunk.job.kv.device) for chunk in chunks]


@pytest.mark.parametrize(("token_budget", "tokens"), [(100, 100), (1 << 20, tiny.CONTEXT - 2)])
def test_on_a_device_the_largest_pass_has_run_before_the_first_prompt(base_dir, repository, token_budget, tokens):
    task, model = load_prefill(base_dir, repository / "prefill_lora" / "1")
    on_device, on_cpu = Recorder(), Recorder()
    on_cpu.device = torch.device("cpu")
    for executor in (on_device, on_cpu):
        within(PrefillEngine(model, task, Inline(), token_budget, executor=executor).close)
    geometry = model.geometry
    kv = (geometry.layers, 2, geometry.kv_heads, tokens, geometry.head_dim, torch.bfloat16, torch.device("meta"))
    assert on_device.passes == [(0, tokens, *kv), (tokens // 2, tokens, *kv)] and on_cpu.passes == []
