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


def test_a_checkpoint_in_shards_is_scored_as_one_in_a_file(base_dir, data, tmp_path):
    full, shards, test = tiny.checkpoint(tmp_path / "full", seed=5), tmp_path / "shards", conversations_of(data, "exact")
    tiny.load(full).save_pretrained(shards, max_shard_size="60KB")
    assert not (shards / "model.safetensors").exists()
    for name in ("full", "naive"):
        whole, cut = (engine_answers(base_dir, contestant(name, None, folder, "int4"), test, max_tokens=12) for folder in (full, shards))
        assert whole == cut


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
    with pytest.raises(ValueError, match=r"data\.jsonl:1.*functions, .*, and possible, "):
        conversations_of(data, "bfcl")


CALL = {"name": "f", "parameters": {"type": "dict", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}


@pytest.mark.parametrize(("metric", "reference", "more", "said"), [
    ("math", "The answer is 5", {}, "metric math: the reference is not an expression: 'The answer is 5'; expected numbers"), ("math", "x + 1 = 3", {}, "metric math: the reference is not arithmetic"),
    ("bfcl", "f(x=1)", {"functions": [{**CALL, "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}], "possible": {"f": {"x": [1]}}}, "functions: type number is none of BFCL's"),
    ("bfcl", "f(x=1)", {"functions": [CALL], "possible": [{"f": {"x": [1]}}]}, "metric bfcl needs functions"),
    ("bfcl", "f(x=1)", {"functions": [CALL], "possible": {"g": {"x": [1]}}}, "metric bfcl needs functions"),
    ("bfcl", "f(x=1)", {"functions": [CALL], "possible": {"f": {"x": 1}}}, "metric bfcl needs functions"),
])
def test_a_reference_that_no_answer_could_match_is_refused_by_line_before_anything_runs(tmp_path, metric, reference, more, said):
    def row(reference: str, more: dict) -> str:
        return json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": reference}], **more})

    good = row("1 + 1 = 2" if metric == "math" else "f(x=1)", {"functions": [CALL], "possible": {"f": {"x": [1]}}})
    (tmp_path / "t.jsonl").write_text(good)
    assert len(conversations_of(tmp_path / "t.jsonl", metric)) == 1
    (tmp_path / "t.jsonl").write_text(f"{good}\n{row(reference, more)}")
    with pytest.raises(ValueError) as error:
        conversations_of(tmp_path / "t.jsonl", metric)
    assert "t.jsonl:2: " in str(error.value) and said in str(error.value)


def test_a_prompt_that_the_router_refuses_is_named_by_its_line(base_dir, tmp_path):
    row = {"messages": [{"role": "user", "content": "long " * 5000}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*tokens"):
        engine_answers(base_dir, Contestant("base", None), conversations_of(tmp_path / "t.jsonl", "exact"))


def test_an_answer_may_be_as_long_as_the_longest_reference_and_a_lower_limit_is_warned_of(root, base_dir, tmp_path):
    add_task(root / "model_repository", base_dir, "t")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 150}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    asked = ["eval", "--task", "t", "--data", str(tmp_path / "t.jsonl"), "--root", str(root), "--metric", "exact", "--out", str(tmp_path / "out.jsonl")]

    def length() -> int:
        return len(json.loads((tmp_path / "out.jsonl").read_text())["answer"])

    assert "t.jsonl:1" not in CliRunner().invoke(app, asked, catch_exceptions=False).output
    whole = length()
    said = CliRunner().invoke(app, [*asked, "--max-tokens", "40"], catch_exceptions=False).output
    assert "t.jsonl:1: the reference is 151 tokens with its end, and an answer is cut at 40 (--max-tokens)" in said
    assert length() < whole


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
