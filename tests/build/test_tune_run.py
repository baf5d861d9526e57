"""Runs: what they make is what is served, and one that is cut off goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sun.model.manifest import BaseManifest, TaskManifest
from sun.model.weights import load_lora
from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.evaluate import engine_answers, test_set as conversations_of
from sun_build.contestants import Contestant
from sun_build.tasks import add_task, describe_weights
from sun_build.tune.data import Example
from sun_build.tune.journal import Journal, Report, read_steps
from sun_build.tune.loss import collate
from sun_build.tune.modules import TwoModules, frozen
from sun_build.tune.run import begin, sources_of, tune
from sun_build.tune.settings import TuneSettings
from sun_client.cli import app
from sun_client.tuning import Tuning
from tests.unit import tiny

SMALL = TuneSettings(steps=6, batch=2, rank=2, alpha=4, lr=0.02, save_every=2)


def changed(**values) -> TuneSettings:
    return TuneSettings(**{**SMALL.__dict__, **values})


def killed_at(last: int) -> Report:
    """A report that ends the run after a step, as a kill does: with what was saved until then."""
    def report(step: int, loss: float, rate: float) -> None:
        if step == last:
            raise InterruptedError

    return report


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_steps(out / "steps.jsonl") if "loss" in row]


def sun(*words: str):
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


@pytest.mark.parametrize("options", [
    ["--adapter", "lora", "--rank", "4", "--lr", "0.02", "--precision", "fp32"], ["--adapter", "none", "--lr", "0.005", "--precision", "bf16"],
    ["--adapter", "lora", "--rank", "4", "--lr", "0.02", "--decode", "int4", "--accumulate", "2", "--batch", "2", "--checkpointing"],
], ids=["lora", "all weights", "int4, accumulated"])
def test_what_sun_tune_makes_is_what_is_served(root, base_dir, data, tmp_path, options):
    out = tmp_path / "yes"
    done = sun("tune", "--data", str(data), "--out", str(out), "--root", str(root), "--steps", "60", "--batch", "4", "--metric", "exact", *options)
    assert done.exit_code == 0, done.output
    assert len(losses(out)) == 60 and (out / "loss.png").stat().st_size > 5000
    manifest = add_task(root / "model_repository", base_dir, "yes", out)
    assert manifest == TaskManifest.load(out)
    scheme = "int4" if "int4" in options else "fp32"
    prompts = PromptFormat.load(base_dir, PromptSettings())
    prefill = tiny.load(out) if "none" in options else tiny.with_adapter(base_dir, out)
    decode = frozen(base_dir, scheme)
    test = conversations_of(data, "exact")
    answers = engine_answers(base_dir, Contestant("sun", out, scheme=scheme), test)
    for conversation, answer in zip(test, answers, strict=True):
        expected = tiny.reference(prefill, decode, prompts.encode(conversation.messages[:1]), 96)
        expected = expected[: expected.index(tiny.EOS)] if tiny.EOS in expected else expected
        assert answer == prompts.tokenizer.decode(expected, skip_special_tokens=True)
    assert answers == ["yes"] * 4
    against = ["--against", "qsun", "--scheme", "int4"] if scheme == "int4" else []
    assert "exact 1.000 [1.000, 1.000] (4 of 4)" in sun("eval", "--task", "yes", "--data", str(data), "--root", str(root), *against).output


def test_the_ordinary_baseline_answers_with_its_own_decode_module_and_is_worse_with_the_bases(root, base_dir, data, tmp_path):
    full = tmp_path / "full"
    sun("tune", "--method", "full", "--adapter", "none", "--data", str(data), "--out", str(full), "--root", str(root), "--steps", "40", "--batch", "4", "--lr", "0.003")
    add_task(root / "model_repository", base_dir, "yes", full)
    out = tmp_path / "answers.jsonl"
    table = sun("eval", "--task", "yes", "--data", str(data), "--root", str(root), "--metric", "exact", "--against", "base,full", "--full", str(full),
                "--out", str(out)).output.splitlines()
    shares = {line.split(": ")[1]: line for line in table if line.startswith("yes: ")}
    assert list(shares) == ["base", "full", "naive"]
    assert "exact 1.000" in shares["full"] and "exact 0.000" in shares["base"] and "exact 1.000" not in shares["naive"]
    assert [json.loads(line)["right"] for line in (tmp_path / "answers.full.jsonl").read_text().splitlines()] == [True] * 4


def test_a_merged_lora_of_the_baseline_is_a_whole_model(base_dir, rows, tmp_path):
    tune(base_dir, rows, [], tmp_path / "out", changed(method="full", adapter="lora"))
    model = tiny.load(tmp_path / "out")
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, tiny.load(base_dir).model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_a_resumed_run_has_the_losses_and_the_weights_of_an_unbroken_one(base_dir, rows, tmp_path, dropout):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tune(base_dir, rows, rows[:1], whole, changed(dropout=dropout, eval_every=2))

    with pytest.raises(InterruptedError):
        tune(base_dir, rows, rows[:1], broken, changed(dropout=dropout, eval_every=2), report=killed_at(5))
    with pytest.raises(ValueError, match="holds a run already"):
        tune(base_dir, rows, rows[:1], broken, changed(dropout=dropout, eval_every=2))
    with pytest.raises(ValueError, match="another lr, seed"):
        tune(base_dir, rows, rows[:1], broken, changed(dropout=dropout, eval_every=2, lr=0.01, seed=3), resume=True)
    taken = []
    tune(base_dir, rows, rows[:1], broken, changed(dropout=dropout, eval_every=2), resume=True, report=lambda step, loss, rate: taken.append(step))
    assert taken == [5, 6]
    assert losses(broken) == losses(whole)
    for name in ("adapter_model.safetensors",):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert not (broken / "checkpoints").exists()


def test_dropout_leaves_inputs_out_of_an_adapter(base_dir, rows, tmp_path):
    runs = {dropout: tmp_path / str(dropout) for dropout in (0.0, 0.5)}
    for dropout, out in runs.items():
        tune(base_dir, rows, [], out, changed(dropout=dropout))
    first, *later = zip(*map(losses, runs.values()), strict=True)
    assert first[0] == first[1], "an adapter begins as nothing"
    assert all(plain != dropped for plain, dropped in later)


@pytest.mark.parametrize("other", ["set of examples", "set of held-out examples", "teacher"])
def test_a_run_is_resumed_with_what_it_began_with_only(base_dir, rows, tmp_path, other):
    out, teacher, settings = tmp_path / "out", tiny.checkpoint(tmp_path / "teacher", seed=3), changed(distill=0.5, eval_every=2)

    with pytest.raises(InterruptedError):
        tune(base_dir, rows[:2], rows[2:], out, settings, teacher, report=killed_at(1))
    train, held_out = (rows[1:3] if other == "set of examples" else rows[:2]), rows[3:] if other == "set of held-out examples" else rows[2:]
    if other == "teacher":
        tiny.checkpoint(teacher, seed=4)
    with pytest.raises(ValueError, match=f"has another {other}; give it the same"):
        tune(base_dir, train, held_out, out, settings, teacher, resume=True)
    (out / "tune_sources.json").unlink()  # as a run of an earlier version has it
    assert tune(base_dir, train, held_out, out, settings, teacher, resume=True)["held_out_loss"] is not None


def test_a_run_that_has_ended_is_not_trained_over(base_dir, rows, tmp_path):
    tune(base_dir, rows, [], tmp_path / "out", SMALL)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="has ended; --overwrite starts anew"):
        tune(base_dir, rows, [], tmp_path / "out", SMALL, resume=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_an_overwritten_run_leaves_nothing_to_be_served_in_place_of_the_new_one(root, base_dir, rows, tmp_path):
    out = tmp_path / "out"
    tune(base_dir, rows, [], out, SMALL)
    describe_weights(base_dir, out, "old")
    tune(base_dir, rows, [], out, changed(adapter="none", seed=1), overwrite=True)
    assert not (out / "task.json").exists()
    assert add_task(root / "model_repository", base_dir, "new", out).weights == "full"
    with pytest.raises(ValueError, match="holds the base or the teacher"):
        tune(base_dir, rows, [], out, changed(distill=0.5), teacher=out, overwrite=True)
    tune(base_dir, rows, [], out, SMALL, overwrite=True)
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors", "task.json", "README.md"])
def test_a_folder_that_holds_what_no_run_left_there_is_refused(base_dir, rows, tmp_path, name, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which is not of a run of sun tune"):
        begin(out, SMALL, sources_of(base_dir, rows, [], None), resume=False, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_there_must_be_a_run_to_resume_and_it_is_not_overwritten(base_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="there is no run to resume in"):
        tune(base_dir, rows, [], tmp_path / "out", SMALL, resume=True)
    with pytest.raises(ValueError, match="give one of them"):
        tune(base_dir, rows, [], tmp_path / "out", SMALL, resume=True, overwrite=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [None, '{"epoch": 0.'], ids=["no state", "half a state"])
def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(base_dir, rows, tmp_path, left):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tune(base_dir, rows, [], whole, SMALL)

    with pytest.raises(InterruptedError):
        tune(base_dir, rows, [], broken, SMALL, report=killed_at(5))
    state = broken / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    state.unlink() if left is None else state.write_text(left)
    taken = []
    tune(base_dir, rows, [], broken, SMALL, resume=True, report=lambda step, loss, rate: taken.append(step))
    assert taken == [3, 4, 5, 6] and losses(broken) == losses(whole)


def test_a_run_that_diverges_ends_with_the_step_and_leaves_no_weights_to_serve(base_dir, rows, tmp_path):
    with pytest.raises(RuntimeError, match=r"step \d+: the loss is nan; training has diverged: take a lower --lr"):
        tune(base_dir, rows, [], tmp_path / "out", changed(lr=1e30, steps=20))
    with pytest.raises(RuntimeError, match="the last step's weights are no numbers"):
        tune(base_dir, rows, [], tmp_path / "last", changed(lr=1e39, steps=1, warmup=0))
    assert not list(tmp_path.glob("*/adapter_model.safetensors"))


def test_patience_needs_held_out_examples(base_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="patience: waits for a lower held-out loss"):
        tune(base_dir, rows, [], tmp_path / "out", changed(patience=2))


def test_a_run_goes_on_with_smaller_batches_after_memory_ran_out(base_dir, rows, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tune(base_dir, rows, [], whole, changed(batch=4, save_every=100))
    forward, calls = TwoModules.forward, []

    def short(self, **batch):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no more")
        return forward(self, **batch)

    monkeypatch.setattr(TwoModules, "forward", short)
    with pytest.raises(RuntimeError, match="out of memory: step 3 is saved; go on with --resume"):
        tune(base_dir, rows, [], broken, changed(batch=4, save_every=100))
    tune(base_dir, rows, [], broken, changed(batch=2, accumulate=2, save_every=100), resume=True)
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-3)


def test_the_weights_with_the_lowest_held_out_loss_are_kept_and_patience_ends_the_run(base_dir, rows, tmp_path):
    result = tune(base_dir, rows[:2], rows[2:], tmp_path / "out", changed(steps=60, lr=0.3, eval_every=2, patience=3, schedule="cosine"))
    held = [row["held_out_loss"] for row in read_steps(tmp_path / "out" / "steps.jsonl") if "held_out_loss" in row]
    assert len(held) < 30 and min(held[-3:]) >= min(held) == pytest.approx(result["held_out_loss"], abs=1e-4)
    model = TwoModules(tiny.with_adapter(base_dir, tmp_path / "out"), frozen(base_dir, "fp32")).eval()
    assert model(**collate(rows[2:]))["loss"].item() == pytest.approx(min(held), rel=2e-2)  # the adapter is kept in float16


def test_patience_outlasts_a_resume_and_the_card_says_the_steps_that_were_taken(root, data, tmp_path, monkeypatch):
    def options(out: Path) -> list[str]:
        return ["tune", "--data", str(data), "--root", str(root), "--steps", "60", "--batch", "2", "--rank", "2", "--lr", "0.3", "--held-out", "2",
                "--eval-every", "1", "--patience", "3", "--out", str(out)]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said = sun(*options(whole)).output
    taken = len(losses(whole))
    assert taken < 60 and f"{taken} steps" in said and f"steps {taken} of 60," in (whole / "README.md").read_text()
    write = Journal._write

    def killed(self, row: dict) -> None:
        if row["step"] == taken and self.path.parent == broken:
            raise InterruptedError
        write(self, row)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Journal, "_write", killed)
        sun(*options(broken))
    sun(*options(broken), "--resume")
    assert losses(broken) == losses(whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_held_out_loss_is_that_of_each_token_whatever_the_batch(base_dir, tmp_path, precision):
    held_out = [Example([5, 9, 7, 3][: 2 + i % 3], [11, 12, 13, 14, 15, 257][i:]) for i in range(5)]
    model = TwoModules.load(base_dir, SMALL).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = sum(model(**collate([e]), num_items_in_batch=1)["loss"].item() for e in held_out) / sum(len(e.response) for e in held_out)
    for batch in (1, 2, 4):
        out = tmp_path / str(batch)
        result = tune(base_dir, held_out, held_out, out, changed(batch=batch, accumulate=4 // batch, steps=1, lr=0.0, precision=precision))
        assert result["held_out_loss"] == pytest.approx(loss, rel=1e-4 if precision == "fp32" else 4e-4)


def test_a_conversation_is_held_out_as_a_whole(base_dir, tmp_path):
    def row(*answers: str) -> str:
        return json.dumps({"messages": [m for a in answers for m in ({"role": "user", "content": "?"}, {"role": "assistant", "content": a})]})

    source = tmp_path / "d.jsonl"
    source.write_text("\n".join([row("one"), row("two", "three"), row("four", "five")]))
    tuning = Tuning("t", base_dir, BaseManifest.load(base_dir), str(source), tmp_path / "out", None, SMALL)
    assert [[len(side) for side in tuning.read(count)[:2]] for count in (0, 1, 2, 3, 4)] == [[5, 0], [3, 2], [3, 2], [1, 4], [1, 4]]
    with pytest.raises(ValueError, match="5 examples fit into max_tokens and the last 5, by whole conversations, are held out; none is left"):
        tuning.read(5)


@pytest.mark.parametrize("every", [4, 100])
def test_the_last_step_is_looked_at_whatever_the_interval(base_dir, rows, tmp_path, every):
    result = tune(base_dir, rows[:2], rows[2:], tmp_path / "out", changed(eval_every=every))
    looks = [row["step"] for row in read_steps(tmp_path / "out" / "steps.jsonl") if "held_out_loss" in row]
    assert looks[-1] == SMALL.steps and result["held_out_loss"] is not None


def test_distillation_pulls_towards_the_teacher(base_dir, rows, tmp_path):
    teacher = tmp_path / "teacher"
    tune(base_dir, rows, [], teacher, changed(method="full", adapter="none", steps=30, lr=0.003, batch=4))
    tune(base_dir, rows, [], tmp_path / "student", changed(distill=1.0, steps=30, batch=4), teacher=teacher)
    assert losses(tmp_path / "student")[-1] < 0.5 * losses(tmp_path / "student")[0]
    with pytest.raises(ValueError, match="teacher"):
        tune(base_dir, rows, [], tmp_path / "x", changed(distill=0.5))


def test_ctrl_c_saves_the_step_and_resume_ends_the_run(root, base_dir, data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sun_client.cli", "tune", "--data", str(data), "--out", str(out), "--root", str(root), "--steps", "400", "--batch", "2",
               "--rank", "2", "--save-every", "1000"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(read_steps(out / "steps.jsonl")) < 3 and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "--resume" in said, said
    stopped = len(losses(out))
    assert 3 <= stopped < 400
    assert not (out / "adapter_model.safetensors").exists()
    done = sun("tune", "--data", str(data), "--out", str(out), "--root", str(root), "--steps", "400", "--batch", "2", "--rank", "2", "--resume")
    assert done.exit_code == 0 and f"step {stopped + 1} of" not in done.output.split("Training on")[0]
    assert len(losses(out)) == 400


@pytest.mark.parametrize(("values", "words"), [
    ({"method": "half"}, "method: got 'half'"), ({"adapter": "ia3"}, "adapter"), ({"decode": "int3"}, "decode scheme"), ({"schedule": "sine"}, "schedule"),
    ({"steps": 0}, "steps: got 0"), ({"distill": 2}, "distill"), ({"warmup": 1}, "warmup"), ({"dropout": 1}, "dropout: got 1"), ({"dropout": 0.1, "adapter": "none"}, "for adapter lora"), ({"method": "full", "decode": "int4"}, "with method full"),
    ({"method": "full", "whole_prompt": True}, "whole_prompt: is for method sun"),
    ({"lr": float("nan")}, "lr: got nan"), ({"lr": float("inf")}, "lr: got inf"), ({"lr": -1.0}, "lr: got -1.0"), ({"export_rank": 1, "adapter": "none"}, "export_rank: is for an adapter"),
])
def test_bad_settings_are_refused_by_name(values, words):
    with pytest.raises(ValueError) as error:
        changed(**values)
    assert words in str(error.value)


@pytest.mark.parametrize(("values", "rate"), [
    ({}, 2e-3), ({"batch": 4}, 5e-4), ({"batch": 2, "accumulate": 2}, 5e-4), ({"batch": 64}, 2e-3), ({"batch": 4, "lr": 0.01}, 0.01),
    ({"adapter": "none"}, 1e-3), ({"adapter": "none", "batch": 4}, 4e-4),
    ({"adapter": "none", "method": "full"}, 4e-4), ({"adapter": "none", "method": "full", "batch": 4}, 4e-4),
])
def test_the_rate_unless_it_is_given_is_what_was_best_for_so_many_examples_a_step(values, rate):
    assert TuneSettings(**values).peak_lr == pytest.approx(rate)


@pytest.mark.parametrize(("epochs", "batch", "steps"), [("2", "2", 4), ("2.5", "2", 5), ("0.1", "2", 1), ("3", "8", 3)])
def test_epochs_are_as_many_steps_as_show_all_examples_so_often(root, data, tmp_path, epochs, batch, steps):
    said = sun("tune", "--data", str(data), "--out", str(tmp_path / "out"), "--root", str(root), "--epochs", epochs, "--batch", batch, "--rank", "2").output
    assert len(losses(tmp_path / "out")) == steps and f"step {steps} of {steps}" in said, said


def test_epochs_and_steps_are_one_or_the_other(root, data, tmp_path):
    with pytest.raises(ValueError, match="--epochs: takes the place of --steps"):
        sun("tune", "--data", str(data), "--out", str(tmp_path / "out"), "--root", str(root), "--epochs", "2", "--steps", "3")


def test_an_adapter_cut_down_is_the_best_of_its_rank(base_dir, rows, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(base_dir, rows, [], whole, changed(rank=6, alpha=12))
    tune(base_dir, rows, [], cut, changed(rank=6, alpha=12, export_rank=2))
    config = json.loads((cut / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, BaseManifest.load(base_dir).source)
    for (name, (down, up)), (_, (low_down, low_up)) in zip(load_lora(whole).items(), load_lora(cut).items(), strict=True):
        assert low_down.shape[0] == low_up.shape[1] == 2, name
        change, low = up @ down, low_up @ low_down
        best = torch.linalg.svdvals(change)[2:].square().sum().sqrt()
        assert torch.linalg.norm(change - low).item() == pytest.approx(best.item(), rel=0.05, abs=2e-3)
    assert add_task(repository(tmp_path), base_dir, "cut", cut).weights == "lora"


def repository(folder: Path) -> Path:
    (folder / "models").mkdir()
    return folder / "models"
