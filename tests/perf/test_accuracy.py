"""A smoke run of the accuracy table on a tiny base: every row, and going on where a run ended."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sun.model.loading import load_prefill, task_digest
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.contestants import staged
from sun_build.tasks import describe_weights
from sun_build.tune.run import SETTINGS_FILE, SOURCES_FILE
from sun_build.tune.settings import TuneSettings
from sun_client.tuning import Tuning
from sun_perf import accuracy, accuracy_plan, accuracy_report
from sun_perf.accuracy_plan import ROWS, Task
from tests.unit import tiny


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A tiny base and a made-up task in place of the real ones."""
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(6)]
    (tmp_path / "data" / "made").mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / "data" / "made" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = {"made": Task("made", "exact", 4, TuneSettings(steps=2, batch=2, eval_every=2), also=("utility",), max_tokens=4)}
    for module in (accuracy, accuracy_report):
        monkeypatch.setattr(module, "TASKS", tasks)
    for module in (accuracy, accuracy_plan):
        monkeypatch.setattr(module, "HELD_OUT", 2)
    monkeypatch.setitem(accuracy_plan.TRAININGS["sun_lora"], "rank", 16)
    monkeypatch.setattr(accuracy, "BASE", tmp_path / "base")
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "results")
    return tmp_path


def test_every_row_is_made_and_reported_and_none_is_made_twice(place, monkeypatch):
    task = accuracy.TASKS["made"]
    accuracy.make_rows(task, list(ROWS), place / "data")
    accuracy_report.write(place / "results", place / "accuracy.md")
    scores = json.loads((place / "results" / "accuracy.json").read_text())
    assert scores.keys() == {"made"} and scores["made"].keys() == ROWS.keys()
    assert all(score.keys() == {"score", "ci_low", "ci_high", "n"} and score["n"] == 4 for score in scores["made"].values())
    page = (place / "accuracy.md").read_text()
    assert all(row.title in page for row in ROWS.values())
    assert (place / "results" / "accuracy.png").stat().st_size > 10_000

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(accuracy, "evaluate", never)
    accuracy.make_rows(task, list(ROWS), place / "data")
    (place / "accuracy.md").write_text(page + "Why it is so.\n")
    accuracy_report.write(place / "results", place / "accuracy.md")
    assert (place / "accuracy.md").read_text() == page + "Why it is so.\n"


def test_a_row_of_other_settings_is_made_again(place, monkeypatch):
    task, row = accuracy.TASKS["made"], ROWS["base"]
    accuracy.make_rows(task, ["base"], place / "data")
    assert accuracy.done(task, row) and accuracy_report.load(place / "results")
    monkeypatch.setattr(accuracy_plan, "HELD_OUT", 1)
    assert not accuracy.done(task, row) and not accuracy_report.load(place / "results"), "nor is it reported beside rows that it does not compare with"


def test_a_row_made_in_another_precision_compares_and_is_said_to_be(place, monkeypatch):
    task, row = replace(accuracy.TASKS["made"], settings=replace(accuracy.TASKS["made"].settings, precision="bf16")), ROWS["full"]
    monkeypatch.setitem(accuracy_report.TASKS, "made", task)
    monkeypatch.setattr(accuracy_plan, "fast_precision", lambda: "fp32")
    accuracy.make_rows(task, ["full"], place / "data")
    assert json.loads(accuracy.result_path("made", "full").read_text())["settings"]["training"]["precision"] == "fp32"
    monkeypatch.setattr(accuracy_plan, "fast_precision", lambda: "bf16")
    assert accuracy.done(task, row)
    monkeypatch.setattr(Tuning, "train", None)
    accuracy.make_rows(task, ["naive"], place / "data")
    assert json.loads(accuracy.result_path("made", "naive").read_text())["settings"]["training"]["precision"] == "fp32", "the training's, not this machine's"
    accuracy_report.write(place / "results", place / "accuracy.md")
    assert "0.0004 (fp32)" in (place / "accuracy.md").read_text()


def test_a_training_that_was_cut_off_goes_on_and_its_seconds_are_those_of_all_its_parts(place, monkeypatch):
    clock, train = [0], Tuning.train

    def interrupted(self, *_, **__):
        clock[0] += 100
        self.out.mkdir(parents=True)
        (self.out / SETTINGS_FILE).write_text(json.dumps(asdict(self.settings)))

    def whole(self, *rows, resume, overwrite):
        clock[0] += 20
        assert resume and not overwrite
        return train(self, *rows, overwrite=True)

    monkeypatch.setattr(accuracy.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Tuning, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accuracy.train(accuracy.TASKS["made"], "sun_lora", place / "data")
    monkeypatch.setattr(Tuning, "train", whole)
    assert accuracy.train(accuracy.TASKS["made"], "sun_lora", place / "data")["seconds"] == 120


def test_an_adapter_that_is_cut_down_runs_as_much_of_a_prompt_as_before(place):
    tuned = place / "tuned"
    tiny.adapter(tuned, place / "base")
    for whole_prompt in (False, True):
        known = describe_weights(place / "base", tuned, "made", whole_prompt=whole_prompt)
        with staged(place / "base", "made", accuracy_plan.cut_down(tuned, 2)) as repository:
            task, _ = load_prefill(place / "base", repository / "prefill_made" / "1")
        assert task.whole_prompt == whole_prompt and task.weights_digest != known.weights_digest


def seen(settings: TuneSettings) -> tuple[int, ...]:
    """What a training sees of the data."""
    return settings.steps, settings.batch, settings.accumulate, settings.seed, settings.max_tokens, settings.eval_every


def test_all_rows_of_a_column_are_trained_alike_and_what_goes_on_is_like_what_it_starts_with_but_for_the_decode_module():
    for task in accuracy_plan.TASKS.values():
        made = {weights: accuracy_plan.training(task, weights) for weights in accuracy_plan.TRAININGS}
        assert len({seen(settings) for weights, settings in made.items() if weights not in accuracy_plan.STARTS}) == 1
        for weights, first in accuracy_plan.STARTS.items():
            assert set(made[weights].differences(made[first])) == {"decode", "lr", "steps", "eval_every"}


def test_a_training_that_goes_on_begins_with_the_others_weights_which_are_trained_first(place):
    task = accuracy.TASKS["made"]
    accuracy.make_rows(task, ["qsun_further"], place / "data")
    told = json.loads(accuracy.result_path("made", "qsun_further").read_text())["settings"]
    assert (told["start"], told["training"]["decode"], told["training"]["steps"]) == ("sun_lora", "int4", 1)
    first = place / "runs" / "made" / "sun_lora"
    sources = json.loads((place / "runs" / "made" / "qsun_further" / SOURCES_FILE).read_text())
    assert sources["start"] == task_digest(first, "lora")


def test_what_shares_weights_is_made_by_one_process():
    names = ["base", "full", "naive", "sun_lora", "qsun", "sun_whole", "qsun_further", "qsun_whole_further"]
    jobs = accuracy.jobs_of([(task, name) for task in ("math", "bash") for name in names])
    assert list(jobs.items()) == [((task, weights), rows) for task in ("math", "bash") for weights, rows in (
        ("full", ["full", "naive"]), ("sun_lora", ["sun_lora", "qsun", "qsun_further"]), ("sun_whole", ["sun_whole", "qsun_whole_further"]), (None, ["base"]))]
