"""A prefill module in int8: its own reference's KV, under a digest of its own that the router knows."""

from __future__ import annotations

import pytest
import torch

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import parse
from sun.model.codes import COARSE, FINE, Codes
from sun.model.loading import load_prefill, merged
from sun.model.manifest import TaskManifest
from sun.model.weights import Linear, load_lora, map_checkpoint
from sun.prefill.engine import PrefillEngine
from sun.prefill.integer import IntegerLinear

from . import tiny
from .harness import PATIENCE_S, within

PROMPT = [(11 * i + i * i) % tiny.VOCAB for i in range(70)]


@pytest.fixture
def int8(base_dir, repository):
    """Makes engines of a task's prefill module in int8."""
    made = []

    def make(task: str = "lora", base=base_dir, repository=repository, **settings) -> PrefillEngine:
        manifest, module = load_prefill(base, repository / f"prefill_{task}" / "1", "int8")
        made.append(PrefillEngine(module, manifest, Inline(), **settings))
        return made[-1]

    yield make
    for engine in made:
        within(engine.close)


def kv(engine: PrefillEngine, ids: list[int] = PROMPT) -> torch.Tensor:
    shipment = engine.submit(ids).result(PATIENCE_S)
    ticket = parse(shipment[0])
    with Inline().pull(ticket, shipment) as buffer:
        return verified_kv(ticket, buffer).clone()


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("codes", [Codes(FINE, split=True), Codes(COARSE, split=False, smooth=torch.exp2(torch.arange(64) % 7 - 3.0))], ids=["split", "smooth"])
@pytest.mark.parametrize("biased, alone", [(False, False), (True, False), (True, True)])
def test_a_packed_layer_is_its_reference(codes, biased, alone):
    draw = torch.Generator().manual_seed(0)
    weight, x = codes.weight(torch.randn(64, 64, generator=draw)), torch.randn(50, 64, generator=draw)
    x[7] = 0
    linear = Linear(weight, torch.randn(64, generator=draw) if biased else None, codes=codes)
    torch.testing.assert_close(IntegerLinear(linear, "int8", alone)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_kv_is_that_of_the_quantised_module_run_plainly(int8, bases, tmp_path, monkeypatch, kind):
    tiny.task(tmp_path, bases(kind), "it", "lora", tiny.adapter(tmp_path / "adapter", bases(kind)))
    got = kv(int8("it", bases(kind), tmp_path))
    monkeypatch.setattr("sun.prefill.integer.pack_linears", lambda model, alone: None)
    # An input that lies between two codes may fall to either side by the last bit of a sum.
    assert off_by(got, kv(int8("it", bases(kind), tmp_path))) < 0.02


def test_it_is_near_the_tasks_float32_and_not_it(int8, base_dir, repository):
    for task in ("plain", "lora", "full"):
        manifest, module = load_prefill(base_dir, repository / f"prefill_{task}" / "1")
        engine = PrefillEngine(module, manifest, Inline())
        assert 1e-4 < off_by(kv(int8(task)), kv(engine)) < 0.1
        within(engine.close)


def test_an_adapter_is_merged_into_the_weights_that_it_names(base_dir, adapter_dir):
    tensors, lora = map_checkpoint(base_dir), load_lora(adapter_dir)
    some = dict(list(lora.items())[:3])
    made, x = merged(tensors, some), torch.randn(3, 48)
    changed = {name for name in tensors if not torch.equal(made[name], tensors[name])}
    assert changed == {f"model.{name}.weight" for name in some}
    for name, adapter in some.items():
        if adapter[0].shape[1] == 48:
            weight = tensors[f"model.{name}.weight"]
            torch.testing.assert_close(x @ made[f"model.{name}.weight"].T, Linear(weight, lora=adapter)(x), rtol=1e-4, atol=1e-4)


def test_its_tickets_say_that_they_are_not_of_the_float32_weights(int8, repository):
    engine = int8()
    task, ticket = TaskManifest.load(repository / "prefill_lora" / "1"), parse(engine.submit(PROMPT).result(PATIENCE_S)[0])
    assert ticket.weights_digest == f"int8:{task.weights_digest}" and ticket.weights_digest != task.weights_digest
    assert task.made(ticket.weights_digest) and task.made(task.weights_digest)
    assert not task.made(f"int4:{task.weights_digest}") and not task.made("int8:sha256:older") and not task.made("")


def test_a_beginning_that_is_kept_is_of_the_same_module(int8):
    """Each engine keeps what it ran itself, in its one format, and ships those very bytes again."""
    engine = int8(prefix_tokens=256)
    first, second = kv(engine), kv(engine, [*PROMPT[:40], *PROMPT[:20]])
    assert engine.cache.found == 40 and torch.equal(first[..., :40, :], second[..., :40, :])
    assert off_by(second, kv(int8(), [*PROMPT[:40], *PROMPT[:20]])) < 0.02


@pytest.mark.parametrize("scheme", ["int4", "bf16", ""])
def test_another_scheme_is_refused_naming_those_there_are(base_dir, repository, scheme):
    with pytest.raises(ValueError, match="^prefill scheme: got .*expected one of fp32, int8"):
        load_prefill(base_dir, repository / "prefill_plain" / "1", scheme)
