"""`sun base --load-format dummy`, up to a task on it that is asked."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sun.model.manifest import BaseManifest
from sun_client.cli import app
from tests.unit import tiny


@pytest.fixture
def place(tmp_path):
    """A root without a base, and a configuration with a tokeniser beside it."""
    (tmp_path / "root" / "model_repository").mkdir(parents=True)
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "llama", **tiny.SIZE}))
    return tmp_path


def sun(place, *words: object):
    return CliRunner().invoke(app, [*map(str, words), "--root", str(place / "root")])


def test_random_weights_make_a_base_for_tasks_and_scores(place):
    done = sun(place, "base", place / "source" / "config.json", "--load-format", "dummy", "--seed", 5)
    assert done.exit_code == 0 and "(random weights, seed 5)" in done.output
    assert sun(place, "task", "add", "it").exit_code == 0
    (place / "test.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    scored = sun(place, "eval", "--task", "it", "--data", place / "test.jsonl", "--metric", "exact", "--max-tokens", 4)
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize(("words", "told"), [
    (("--load-format", "gguf"), "--load-format: got 'gguf', expected auto or dummy"),
    (("--load-format", "dummy", "--revision", "main"), "--revision: is for hub ids"),
    (("--seed", 1), "--seed: is of random weights; it needs --load-format dummy"),
])
def test_options_that_do_not_go_together_are_refused_before_anything_is_written(place, words, told):
    done = sun(place, "base", place / "source", *words)
    assert isinstance(done.exception, ValueError) and told in str(done.exception)
    with pytest.raises(FileNotFoundError):
        BaseManifest.load(place / "root" / "build" / "base")
