"""Tuning: the loss is serving's own split, only the prefill module learns, and what it learnt is what is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from sun.model.manifest import TaskManifest
from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base
from sun_build.evaluate import evaluate
from sun_build.tasks import add_task
from sun_build.tune.data import Example, batches, examples, read_conversations
from sun_build.tune.loss import collate, handoff_loss
from sun_client.cli import app
from tests.unit import tiny

BATCH = [Example([5, 9, 7, 30, 2], [11, 12, 257]), Example([8], [40, 257]), Example([3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 257])]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "build" / "base", PromptSettings())
    return folder / "build" / "base"


def test_with_equal_modules_the_loss_is_the_base_models_own_on_the_same_tokens(base_dir):
    model = tiny.load(base_dir)
    losses = []
    for example in BATCH:
        ids = torch.tensor([example.prompt + example.response])
        labels = torch.tensor([[-100] * len(example.prompt) + example.response])
        losses += [model(ids, labels=labels).loss] * len(example.response)
    assert handoff_loss(model, model, collate(BATCH)).item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_gradients_reach_the_adapter_alone_and_are_the_finite_differences(base_dir):
    torch.manual_seed(0)
    decode = tiny.load(base_dir).requires_grad_(False).double()
    prefill = get_peft_model(tiny.load(base_dir), LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)).double()
    batch = collate(BATCH)
    handoff_loss(prefill, decode, batch).backward()
    assert all(p.grad is None for p in decode.parameters())
    weight = next(p for name, p in prefill.named_parameters() if "layers.0" in name and "v_proj.lora_B" in name)
    step = 1e-4
    with torch.no_grad():
        for at in [(0, 0), (3, 1)]:
            weight[at] += step
            above = handoff_loss(prefill, decode, batch).item()
            weight[at] -= 2 * step
            below = handoff_loss(prefill, decode, batch).item()
            weight[at] += step
            # The loss is summed up in float32, which bounds how well a difference of two can be known.
            assert weight.grad[at].item() == pytest.approx((above - below) / (2 * step), abs=5e-3)
    assert weight.grad.abs().max() > 0


def test_what_sun_tune_makes_is_what_is_served(base_dir, tmp_path):
    root = base_dir.parents[1]
    (root / "model_repository").mkdir()
    data = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": "yes"}]} for word in ("a", "bb", "ccc", "dddd")]
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    runner = CliRunner()
    done = runner.invoke(app, [
        "tune", "--task", "yes", "--data", str(data), "--out", str(out), "--root", str(root), "--steps", "60", "--batch", "4",
        "--rank", "4", "--lr", "0.02", "--metric", "exact"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len((out / "steps.jsonl").read_text().splitlines()) == 60
    manifest = add_task(root / "model_repository", base_dir, "yes", out)
    assert manifest == TaskManifest.load(out)
    scored = evaluate(root / "model_repository", base_dir, "yes", data, "exact")
    prompts = PromptFormat.load(base_dir, PromptSettings())
    prefill, decode = tiny.with_adapter(base_dir, out), tiny.load(base_dir)
    for row, score in zip(rows, scored, strict=True):
        expected = tiny.reference(prefill, decode, prompts.encode(row["messages"][:1]), 96)
        expected = expected[: expected.index(tiny.EOS)] if tiny.EOS in expected else expected
        assert score.answer == prompts.tokenizer.decode(expected, skip_special_tokens=True)
    assert all(score.right for score in scored), [score.answer for score in scored]
    done = runner.invoke(app, ["eval", "--task", "yes", "--data", str(data), "--root", str(root)], catch_exceptions=False)
    assert "exact 1.000 (4 of 4)" in done.output


@pytest.mark.parametrize(("line", "words"), [
    ("{", "not JSON"), ('{"messages": 3}', "messages: expected a JSON array"), ("[]", "messages: expected a JSON array"), ('{"messages": []}', "no assistant turn"), ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "messages[1].content"),
])
def test_bad_data_is_refused_by_file_and_line(tmp_path, line, words):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "d.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_conversations(tmp_path / "d.jsonl")
    assert "d.jsonl:3" in str(error.value) and words in str(error.value)


def test_every_assistant_turn_is_an_example_with_all_before_it_as_prompt(base_dir):
    prompts = PromptFormat.load(base_dir, PromptSettings())
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    messages = [{"role": role, "content": content} for role, content in turns]
    first, second = examples([messages], prompts, 500)[0]
    assert (first.prompt, second.prompt) == (prompts.encode(messages[:1]), prompts.encode(messages[:3]))
    assert prompts.tokenizer.decode(second.response) == "ok<|im_end|>"
    assert examples([messages], prompts, len(first.prompt) + len(first.response)) == ([first], 1)


def test_batches_are_the_same_for_a_seed_and_cover_an_epoch():
    rows = [Example([i], [i]) for i in range(32)]
    one, two = batches(rows, 8, seed=3), batches(rows, 8, seed=3)
    epoch = [next(one) for _ in range(4)]
    assert epoch == [next(two) for _ in range(4)]
    assert sorted(e.prompt[0] for batch in epoch for e in batch) == list(range(32))
