"""Noise in prompts: of their own text, in training alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun_build.tune.data import Example
from sun_build.tune.loss import collate
from sun_build.tune.modules import TwoModules
from sun_build.tune.noise import PromptNoise
from sun_build.tune.run import tune
from sun_build.tune.settings import TuneSettings
from tests.build.test_tune_run import changed, losses, sun
from tests.unit import tiny

BEGIN, END, BETWEEN = [1, 2], [3, 1, 4], [3, 1]
words = st.lists(st.integers(10, 99), min_size=1, max_size=6)


def prompts_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The prompts up to x(n-1), as a batch has them."""
    shared, width = batch["shared_ids"].tolist(), batch["prefill_ids"].shape[1]
    real = batch["mask"][:, len(shared) : len(shared) + width].bool()
    return [shared + ids[where].tolist() for ids, where in zip(batch["prefill_ids"], real, strict=True)]


@given(turns=st.lists(st.lists(words, min_size=1, max_size=3), min_size=2, max_size=5), alone=st.booleans(), seed=st.integers(0, 9))
def test_text_is_replaced_by_text_of_the_batch_and_a_template_is_not(turns, alone, seed):
    rows = [Example(BEGIN + [t for i, turn in enumerate(said) for t in (BETWEEN if i else []) + turn] + END, [7]) for said in turns]
    rows += [Example(BEGIN + [8] + END, [7]), Example(BEGIN + [9] + END, [7])]  # so that nothing but the template is in all of them
    batch = collate(rows[:1] if alone else rows[:-2])
    before = prompts_of(batch)
    torch.manual_seed(seed)
    noised = PromptNoise(1.0, rows)(batch)
    text = {token for prompt in before for token in prompt if token >= 10}
    for old, new in zip(before, prompts_of(noised), strict=True):
        assert [t if t < 10 else 0 for t in new] == [t if t < 10 else 0 for t in old]
        assert {t for t in new if t >= 10} <= text
    for name in batch.keys() - {"shared_ids", "prefill_ids"}:
        assert torch.equal(noised[name], batch[name])


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_share_is_of_the_text(share):
    rows = [Example(BEGIN + list(range(10 + 500 * i, 510 + 500 * i)) + END, [7]) for i in range(8)]
    batch = collate(rows)
    torch.manual_seed(0)
    pairs = [(a, b) for old, new in zip(prompts_of(batch), prompts_of(PromptNoise(share, rows)(batch)), strict=True) for a, b in zip(old, new, strict=True)]
    assert sum(a != b for a, b in pairs) / 4000 == pytest.approx(share, abs=0.03)


def test_prompts_that_are_all_one_are_left_as_they_are():
    rows = [Example([5, 9, 7], [11]), Example([5, 9, 7], [12])]
    assert prompts_of(PromptNoise(0.9, rows)(collate(rows))) == [[5, 9], [5, 9]]


@pytest.mark.parametrize("method", ["sun", "full"])
def test_a_prompt_is_read_with_noise_while_training_and_without_it_to_be_judged(base_dir, rows, method):
    settings = TuneSettings(method=method, adapter="none")
    plain = TwoModules.load(base_dir, settings).eval()
    noisy = TwoModules.load(base_dir, settings, noise=PromptNoise(0.9, rows))
    batch = collate(rows)
    with torch.no_grad():
        clean = plain(**batch)["loss"]
        assert torch.equal(noisy.eval()(**batch)["loss"], clean)
        assert not torch.equal(noisy.train()(**batch)["loss"], clean)


def test_a_teacher_reads_the_prompts_as_they_are(base_dir, rows):
    asked = []
    teacher = tiny.load(base_dir)
    teacher.get_decoder().register_forward_pre_hook(lambda module, args, values: asked.append(values["input_ids"]), with_kwargs=True)
    model = TwoModules(tiny.load(base_dir), tiny.load(base_dir), teacher, 0.5, PromptNoise(0.9, rows)).train()
    batch = collate(rows)
    model(**batch)
    assert any(torch.equal(ids, batch["prefill_ids"]) for ids in asked)


def test_a_run_with_noise_learns_from_other_prompts_and_says_so(root, data, tmp_path):
    def run(name: str, *options: str) -> list[float]:
        done = sun("tune", "--data", str(data), "--out", str(tmp_path / name), "--root", str(root), "--steps", "4", "--batch", "4", "--rank", "2", *options)
        assert done.exit_code == 0, done.output
        return losses(tmp_path / name)

    plain, noisy = run("plain"), run("noisy", "--noise", "0.5")
    assert all(a != b for a, b in zip(plain, noisy, strict=True))
    assert "noise 0.5" in (tmp_path / "noisy" / "README.md").read_text()


def test_held_out_examples_are_judged_without_noise(base_dir, rows, tmp_path):
    held = [tune(base_dir, rows[:3], rows[3:], tmp_path / str(noise), changed(noise=noise, lr=0.0, eval_every=2))["held_out_loss"] for noise in (0.0, 0.9)]
    assert held[0] == held[1]
