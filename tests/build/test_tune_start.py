"""Runs that begin with an earlier run's weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.tasks import describe_weights
from sun_build.tune.data import Example
from sun_build.tune.loss import collate
from sun_build.tune.modules import TwoModules, frozen
from sun_build.tune.run import tune
from tests.build.test_tune_run import SMALL, changed, killed_at, losses, sun
from tests.unit import tiny

ADAPTER, WHOLE, ORDINARY = {}, {"adapter": "none", "lr": 0.005}, {"method": "full", "adapter": "none", "lr": 0.005}
STILL = {"steps": 1, "lr": 0.0, "batch": 4}


def loss_of(prefill: torch.nn.Module, decode: torch.nn.Module, rows: list[Example]) -> float:
    return TwoModules(prefill, decode).eval()(**collate(rows))["loss"].item()


@pytest.mark.parametrize(("first", "then"), [
    (ADAPTER, ADAPTER), (ADAPTER, WHOLE), (WHOLE, WHOLE), (ORDINARY, ORDINARY), (ORDINARY, {"method": "full", "adapter": "lora"}), (ADAPTER, {"decode": "int4"}),
], ids=["an adapter", "an adapter, merged", "all weights", "an ordinary fine-tune", "an adapter on that", "an adapter, then int4"])
def test_a_run_begins_where_the_one_that_it_starts_from_ended(base_dir, rows, tmp_path, first, then):
    made, again = tmp_path / "made", tmp_path / "again"
    tune(base_dir, rows, [], made, changed(**{"steps": 30, "batch": 4, **first}))
    tune(base_dir, rows, [], again, changed(**then | STILL), start=made)
    prefill = tiny.with_adapter(base_dir, made) if first is ADAPTER else tiny.load(made)
    decode = prefill if first is ORDINARY else frozen(base_dir, then.get("decode", "fp32"))
    assert losses(again) == [pytest.approx(loss_of(prefill, decode, rows), rel=1e-3)]
    assert losses(again)[0] < 0.5 * losses(made)[0], "it learnt something to start from"
    if first is then:
        name = "adapter_model.safetensors" if first is ADAPTER else "model.safetensors"
        one, other = (load_file(out / name) for out in (made, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), "a rate of 0 changes nothing"


def test_a_decode_module_that_is_not_the_base_as_it_is_stays_so(base_dir, rows, tmp_path):
    """The prefill module's start is not the decode module's."""
    tune(base_dir, rows, [], tmp_path / "made", changed(**ORDINARY, steps=30, batch=4))
    tune(base_dir, rows, [], tmp_path / "naive", changed(**WHOLE | STILL), start=tmp_path / "made")
    naive = loss_of(tiny.load(tmp_path / "made"), frozen(base_dir, "fp32"), rows)
    assert losses(tmp_path / "naive") == [pytest.approx(naive, rel=1e-3)]
    assert naive > 2 * loss_of(*[tiny.load(tmp_path / "made")] * 2, rows)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_run_of_whole_prompts_goes_on_with_its_own_weights(base_dir, rows, tmp_path, adapter):
    settings = {"adapter": adapter, "whole_prompt": True, **({"lr": 0.005} if adapter == "none" else {})}
    made, again = tmp_path / "made", tmp_path / "again"
    tune(base_dir, rows, [], made, changed(**settings, steps=30, batch=4))
    tune(base_dir, rows, [], again, changed(**settings | STILL), start=made)
    prefill = tiny.with_adapter(base_dir, made) if adapter == "lora" else tiny.load(made)
    loss = TwoModules(prefill, frozen(base_dir, "fp32")).eval()(**collate(rows, whole_prompt=True))["loss"].item()
    assert losses(again) == [pytest.approx(loss, rel=1e-3)] and loss < 0.5 * losses(made)[0]


def test_an_ordinary_fine_tunes_own_norm_is_not_what_whole_prompts_start_with(base_dir, rows, tmp_path):
    tune(base_dir, rows, [], tmp_path / "made", changed(**ORDINARY, steps=30, batch=4))
    tune(base_dir, rows, [], tmp_path / "again", changed(adapter="none", whole_prompt=True, **STILL), start=tmp_path / "made")
    norm = {folder: load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (tmp_path / "made", tmp_path / "again", base_dir)}
    assert torch.equal(norm[tmp_path / "again"], norm[base_dir]) and not torch.equal(norm[tmp_path / "made"], norm[base_dir])


def test_a_start_that_does_not_fit_is_refused_before_a_step(base_dir, rows, tmp_path):
    adapter, whole, out = tmp_path / "adapter", tmp_path / "whole", tmp_path / "out"
    tune(base_dir, rows, [], adapter, SMALL)
    tune(base_dir, rows, [], whole, changed(adapter="none"))
    for start, settings, words in (
        (whole, SMALL, "start: .*whole holds a whole checkpoint"), (adapter, changed(rank=4), "rank: got 4, and the adapter in .*adapter to start from has 2"),
        (adapter, changed(alpha=8), "alpha: got 8, and the adapter in .* has 4"), (tmp_path, SMALL, "holds neither a LoRA adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(base_dir, rows, [], out, settings, start=start)
    with pytest.raises(ValueError, match="holds the base or the teacher, or the weights to start from"):
        tune(base_dir, rows, [], adapter, SMALL, start=adapter, overwrite=True)
    build_base(str(tiny.checkpoint(tmp_path / "source", seed=5)), tmp_path / "base", PromptSettings())
    describe_weights(base_dir, adapter, "mine")
    with pytest.raises(ValueError, match="whole_prompt: got True, and the adapter in .* was trained the other way"):
        tune(base_dir, rows, [], out, changed(whole_prompt=True), start=adapter)
    with pytest.raises(ValueError, match="base_digest: start was made for base"):
        tune(tmp_path / "base", rows, [], out, SMALL, start=adapter)
    assert not out.exists()


def test_a_run_is_resumed_with_the_start_that_it_had(base_dir, rows, tmp_path):
    starts = {seed: tmp_path / str(seed) for seed in (0, 1)}
    for seed, out in starts.items():
        tune(base_dir, rows, [], out, changed(seed=seed))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tune(base_dir, rows, [], whole, changed(dropout=0.3), start=starts[0])

    with pytest.raises(InterruptedError):
        tune(base_dir, rows, [], broken, changed(dropout=0.3), start=starts[0], report=killed_at(5))
    for other in (starts[1], None):
        with pytest.raises(ValueError, match="has another start; give it the same"):
            tune(base_dir, rows, [], broken, changed(dropout=0.3), start=other, resume=True)
    tune(base_dir, rows, [], broken, changed(dropout=0.3), start=starts[0], resume=True)
    assert losses(broken) == losses(whole)


def test_sun_tune_takes_the_rank_of_the_adapter_to_start_from(root, base_dir, data, tmp_path):
    first, then = tmp_path / "first", tmp_path / "then"
    options = ["--data", str(data), "--root", str(root), "--steps", "2", "--batch", "2"]
    sun("tune", *options, "--out", str(first), "--rank", "4", "--export-rank", "3")
    assert sun("tune", *options, "--out", str(then), "--start", str(first), "--decode", "int4").exit_code == 0
    card = (then / "README.md").read_text()
    assert "rank 3, alpha 6," in card and "start first" in card and "decode int4" in card
    with pytest.raises(ValueError, match="rank: got 4, and the adapter in"):
        sun("tune", *options, "--out", str(then), "--overwrite", "--start", str(first), "--rank", "4")
    with pytest.raises(ValueError, match="--start: there is no folder"):
        sun("tune", *options, "--out", str(then), "--start", str(tmp_path / "none"))
