"""`sun eval`: rows, intervals, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sun.decode.sampling import Choice
from sun.router.fair_queue import Bounds
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.contestants import Contestant, contestant
from sun_build.evaluate import engine_answers, interval, score, summary, test_set as conversations_of
from sun_build.tasks import add_task, describe_weights
from sun_client.cli import app
from sun_client.cli_eval import rows
from tests.unit import tiny


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_an_interval_holds_the_mean_and_narrows_to_it_where_all_agree(values):
    right = np.array(values, dtype=float)
    low, high = interval(right)
    assert 0 <= low <= right.mean() <= high <= 1
    if len(set(values)) == 1:
        assert low == high == right.mean()


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 0.3 <= high for low, high in (interval((rng.random(150) < 0.3).astype(float), 1000, seed) for seed in range(200))]
    assert 0.9 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(("against", "server", "expected"), [
    ("sun", False, ["sun"]), ("base, full,sun", False, ["base", "full", "naive", "sun"]), ("naive,full", False, ["naive", "full"]), ("sun", True, ["server"]),
])
def test_naive_comes_along_with_full(against, server, expected):
    assert rows(against, server) == expected


@pytest.mark.parametrize(("against", "server"), [("", False), ("sun,lora", False), ("base,sun", True)])
def test_rows_that_cannot_be_are_refused(against, server):
    with pytest.raises(ValueError, match="--against"):
        rows(against, server)


def test_each_row_has_the_weights_that_its_name_says(base_dir, data, tmp_path):
    tuned, full = tiny.adapter(tmp_path / "lora", base_dir), tiny.checkpoint(tmp_path / "full", seed=5)
    test = conversations_of(data, "exact")
    got = {name: engine_answers(base_dir, contestant(name, tuned, full, "int4"), test, max_tokens=12) for name in ("base", "full", "naive", "sun", "qsun")}
    assert len({tuple(answers) for answers in got.values()}) == 5
    assert got["base"] == engine_answers(base_dir, Contestant("x", None, own=base_dir), test, max_tokens=12)
    assert engine_answers(base_dir, contestant("sun", tuned, None, "int4"), test, max_tokens=12, prefill_scheme="int8") != got["base"]
    with pytest.raises(ValueError, match="prefill scheme: got 'int4'"):
        engine_answers(base_dir, contestant("sun", tuned, None, "int4"), test, prefill_scheme="int4")
    with pytest.raises(ValueError, match="against: full needs"):
        contestant("full", tuned, None, "int4")


def test_a_test_set_may_be_larger_than_what_a_server_lets_wait(base_dir, data, monkeypatch):
    monkeypatch.setattr("sun.decode.engine.choose", lambda logits, batch: [Choice(tiny.EOS)] * len(batch))  # each ends with its first token
    test = conversations_of(data, "exact") * 100
    assert len(test) * 450 > Bounds.task_tokens
    assert engine_answers(base_dir, contestant("base", None, None, "int4"), test, max_tokens=450) == [""] * len(test)


def test_the_last_assistant_turn_is_the_reference(tmp_path, base_dir):
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages}))
    one, = score(conversations_of(tmp_path / "t.jsonl", "exact"), [" d"], "exact")
    assert (one.prompt, one.reference, one.right) == ("c", "d", True)
    assert summary([one]).as_dict() == {"score": 1.0, "ci_low": 1.0, "ci_high": 1.0, "n": 1}


def test_bfcl_without_its_fields_is_refused_by_line(data):
    with pytest.raises(ValueError, match=r"data\.jsonl:1.*functions and possible"):
        conversations_of(data, "bfcl")


@pytest.mark.parametrize(("words", "said"), [
    (["--metric", "rouge"], "metric: got 'rouge'"), (["--metric", "exact", "--against", "full"], "against: full needs"),
    (["--metric", "exact", "--scheme", "int3"], "decode scheme"), (["--metric", "exact", "--prefill-scheme", "int4"], "prefill scheme: got 'int4'"),
    (["--metric", "exact", "--prefill-scheme", "int8", "--server"], "--prefill-scheme: a server has its own"), (["--task", "no"], "there is no task 'no'"), ([], "names none"),
])
def test_sun_eval_refuses_by_name(root, base_dir, data, words, said):
    add_task(root / "model_repository", base_dir, "t")
    task = [] if "--task" in words else ["--task", "t"]
    done = CliRunner().invoke(app, ["eval", *task, "--data", str(data), "--root", str(root), *words])
    assert done.exit_code and said in str(done.exception)


def test_weights_tuned_for_another_base_are_refused_by_field(base_dir, data, tmp_path):
    other = build_base(str(tiny.checkpoint(tmp_path / "source", seed=9)), tmp_path / "other", PromptSettings())
    adapter = tiny.adapter(tmp_path / "lora", tmp_path / "other")
    describe_weights(tmp_path / "other", adapter, "t")
    with pytest.raises(ValueError, match=f"base_digest: task was made for base {other.digest}"):
        engine_answers(base_dir, Contestant("sun", adapter), conversations_of(data, "exact"))
