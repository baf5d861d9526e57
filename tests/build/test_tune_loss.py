"""The loss is serving's own split, and only the prefill module learns from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from sun.model.calibration import text_logits
from sun.model.loading import load_decode
from sun.model.codes import COARSE, Codes
from sun_build.tune.checkpointing import checkpoint_layers
from sun_build.tune.data import Example
from sun_build.tune.loss import collate, distillation, handoff_logits
from sun_build.tune.modules import TwoModules, frozen, round_inputs
from sun_build.tune.settings import TuneSettings
from tests.unit import tiny

MIXED = [Example([5, 9, 7, 30, 2], [11, 12, 257]), Example([8], [40, 257]), Example([3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 257])]
SHARED = [Example([5, 9, 7, 30, 2], [11, 12, 257]), Example([5, 9, 7, 31], [40, 257]), Example([5, 9, 7], [1, 257])]
TWINS = [Example([5, 9, 7], [11, 257]), Example([5, 9, 7], [12, 13, 257])]
whole_prompt = pytest.mark.parametrize("whole_prompt", [False, True], ids=["", "whole prompts"])
ids = st.integers(0, 255)
batches = st.lists(st.builds(Example, st.lists(ids, min_size=1, max_size=9), st.lists(ids, min_size=1, max_size=6)), min_size=1, max_size=5)


def handoff_loss(prefill, decode, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a trainer minimises."""
    return TwoModules(prefill, decode)(**batch)["loss"]


def ordinary(model, batch: list[Example]) -> float:
    """transformers' own loss, prompt by prompt, without padding and without a handoff; mean over all response tokens."""
    losses = []
    for example in batch:
        tokens = torch.tensor([example.prompt + example.response])
        labels = torch.tensor([[-100] * len(example.prompt) + example.response])
        losses += [model(tokens, labels=labels).loss.item()] * len(example.response)
    return sum(losses) / len(losses)


@whole_prompt
@pytest.mark.parametrize("batch", [MIXED, SHARED, TWINS], ids=["mixed", "a common beginning", "equal prompts"])
def test_with_equal_modules_the_loss_is_the_base_models_own_on_the_same_tokens(base_dir, batch, whole_prompt):
    base = tiny.load(base_dir)
    assert handoff_loss(base, tiny.load(base_dir), collate(batch, whole_prompt)).item() == pytest.approx(ordinary(base, batch), abs=1e-5)


@whole_prompt
@given(batch=batches, beginning=st.lists(ids, max_size=5))
def test_so_it_is_for_any_batch(base_dir, whole_prompt, batch, beginning):
    batch = [Example(beginning + e.prompt, e.response) for e in batch]
    model = cached(base_dir)
    with torch.no_grad():
        assert handoff_loss(model, model, collate(batch, whole_prompt)).item() == pytest.approx(ordinary(model, batch), abs=2e-5)


MODELS: dict = {}


def cached(base_dir):
    """One loaded model for all examples of a property."""
    return MODELS.setdefault(base_dir, tiny.load(base_dir))


def test_a_fresh_run_begins_at_the_base_models_loss(base_dir):
    whole = [TuneSettings(whole_prompt=True), TuneSettings(whole_prompt=True, adapter="none")]
    for settings in (TuneSettings(), TuneSettings(adapter="none"), TuneSettings(method="full"), TuneSettings(method="full", adapter="none"), *whole):
        loss = TwoModules.load(base_dir, settings)(**collate(MIXED, settings.whole_prompt))["loss"]
        assert loss.item() == pytest.approx(ordinary(tiny.load(base_dir), MIXED), abs=1e-5)


@whole_prompt
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_gradients_reach_the_prefill_module_alone(base_dir, adapter, whole_prompt):
    model = TwoModules.load(base_dir, TuneSettings(adapter=adapter, whole_prompt=whole_prompt))
    model(**collate(MIXED, whole_prompt))["loss"].backward()
    assert all(p.grad is None for p in model.decode.parameters())
    learning = {name for name, p in model.learnt().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning
    assert any("layers.1.mlp" in name for name in learning) == whole_prompt, "K and V do not depend on the last layer's"
    assert model.prefill.get_decoder().norm.weight.grad is None, "the decode module's norm is in its place"


@pytest.mark.parametrize("settings", [{}, {"adapter": "none"}, {"decode": "int4"}, {"checkpointing": True}], ids=str)
def test_weights_that_do_not_learn_take_half_the_memory_and_change_nothing_in_bf16(base_dir, settings):
    def run(precision):
        torch.manual_seed(0)
        model = TwoModules.load(base_dir, TuneSettings(precision=precision, **settings)).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**collate(MIXED))["loss"]
        loss.backward()
        return model, loss, {name: p.grad for name, p in model.learnt().items()}

    (whole, loss, grads), (halved, halved_loss, halved_grads) = run("fp32"), run("bf16")
    assert torch.equal(loss, halved_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(halved_grads[name], grad, rtol=0, atol=0)
    assert all(p.dtype == torch.float32 for p in halved.learnt().values())
    linear = {m.weight for m in halved.decode.model.modules() if isinstance(m, torch.nn.Linear)}
    assert linear and all(w.dtype == torch.bfloat16 for w in linear)
    assert size(whole.decode) - size(halved.decode) >= sum(2 * w.numel() for w in linear)


def size(module: torch.nn.Module) -> int:
    """Bytes of its weights, each counted once."""
    return sum(p.numel() * p.element_size() for p in set(module.parameters()))


def test_an_adapter_is_tuned_over_one_copy_of_the_base(base_dir):
    model = TwoModules.load(base_dir, TuneSettings())
    assert size(model) == size(tiny.load(base_dir)) + sum(4 * p.numel() for p in model.learnt().values())


@whole_prompt
@pytest.mark.parametrize("batch", [MIXED, SHARED], ids=["mixed", "a common beginning"])
def test_gradients_are_the_finite_differences(base_dir, batch, whole_prompt):
    torch.manual_seed(0)
    decode = tiny.load(base_dir).requires_grad_(False).double()
    prefill = get_peft_model(tiny.load(base_dir), LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)).double()
    laid = collate(batch, whole_prompt)
    handoff_loss(prefill, decode, laid).backward()
    weight = next(p for name, p in prefill.named_parameters() if "layers.0" in name and "v_proj.lora_B" in name)
    step = 1e-3
    with torch.no_grad():
        for at in [(0, 0), (3, 1)]:
            weight[at] += step
            above = handoff_loss(prefill, decode, laid).item()
            weight[at] -= 2 * step
            below = handoff_loss(prefill, decode, laid).item()
            weight[at] += step
            # The loss is summed up in float32, which bounds how well a difference of two can be known.
            assert weight.grad[at].item() == pytest.approx((above - below) / (2 * step), abs=2e-3)
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("batch", [MIXED, SHARED, TWINS], ids=["mixed", "a common beginning", "equal prompts"])
def test_gradients_are_the_same_with_activations_recomputed(base_dir, batch):
    grads = []
    for recompute in (False, True):
        prefill, decode = tiny.load(base_dir).train(), frozen(base_dir, "fp32")
        if recompute:
            checkpoint_layers(prefill)
        handoff_loss(prefill, decode, collate(batch)).backward()
        grads.append({name: p.grad for name, p in prefill.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_split(base_dir):
    model = TwoModules.load(base_dir, TuneSettings())
    count = sum(len(e.response) for e in MIXED)
    whole = model(**collate(MIXED))["loss"].item()
    parts = sum(model(**collate([e]), num_items_in_batch=count)["loss"].item() for e in MIXED)
    assert parts == pytest.approx(whole, abs=1e-5)


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_it(base_dir):
    model, laid = tiny.load(base_dir), collate(MIXED)
    logits = handoff_logits(model, model, laid)
    assert distillation(logits, logits.detach(), laid["labels"]).item() == pytest.approx(0, abs=1e-5)
    assert distillation(logits.roll(1, -1), logits.detach(), laid["labels"]).item() > 1


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_quantised_decode_module_is_the_one_that_serving_has(base_dir, scheme):
    ids = torch.tensor([5, 3, 99, 41, 7, 250])
    with torch.no_grad():
        got = frozen(base_dir, scheme)(ids.unsqueeze(0)).logits[0]
    _, model = load_decode(base_dir, scheme)
    expected = text_logits(model, ids)
    # A rounded input may fall to either side by the last bit of a sum.
    tolerance = 0.05 if scheme == "int8" else 1e-3
    assert (got - expected).pow(2).mean().sqrt() < tolerance * expected.std()
    assert (got - frozen(base_dir, "fp32")(ids.unsqueeze(0)).logits[0]).abs().max() > 0.01


def test_the_gradient_passes_a_rounded_input_as_if_it_were_not_rounded():
    layer = torch.nn.Linear(4, 1, bias=False)
    round_inputs(layer, Codes(COARSE, split=False))
    x = torch.tensor([[0.013, 1.0, -0.4, 0.2]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.detach())


@pytest.mark.parametrize("columns", [{"smooth": torch.full((8,), 2.0)}, {"whole": torch.arange(8) == 3}], ids=["smoothed", "whole"])
def test_what_rounds_a_layers_inputs_goes_where_the_layer_goes(columns):
    layer = torch.nn.Linear(8, 4)
    round_inputs(layer, Codes(COARSE, split=False, **columns))
    # Where tensors of a GPU and of the CPU would meet, a tensor without storage and one of the CPU do.
    assert layer.to("meta")(torch.empty(2, 8, device="meta")).is_meta
    assert layer.state_dict().keys() == {"weight", "bias"}
