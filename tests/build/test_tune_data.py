"""Training data: what becomes an example, and what is refused by file, line and reason before any step."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.tune.batches import plan_batches
from sun_build.tune.data import Conversation, Example, examples, read_conversations
from sun_build.tune.trainer import split
from sun_client.cli import app

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
LONG = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 100}]})
BAD = [
    ("{", "not JSON"), ('{"messages": 3}', "messages: expected a JSON array"), ("[]", "messages: expected a JSON array"), ('{"messages": []}', "no assistant turn"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages[0]: an assistant turn to learn answers a user, this one comes first; with weight 0"),
    ('{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "messages[1]: an assistant turn to learn answers a user, this one comes after 'system'"),
    ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, {"role": "assistant", "content": "b"}]}',
     "messages[0].content[1].type: only parts of type 'text'"),
    ("[" * 100_000, "brackets are nested too deeply"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "messages[1].content: the assistant's turn is empty"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}', "messages[1].content"),
    ('{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "messages[0].role"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b \\ud83d"}]}', "messages[1].content: not valid Unicode"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, 5]}', "messages[2]: expected an object"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}', "no assistant turn to learn from: all have weight 0"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}', "messages[1].weight: got 0.5"),
    (GOOD[:-1] + ', "tools": [{"type": "function"}]}', "tools: tools are not learnt"), (GOOD[:-1] + ', "functions": [{"name": "f"}]}', "functions: tools are not"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{}]}]}', "messages[1].tool_calls: tools are not"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "function_call": {}}, '
     '{"role": "assistant", "content": "b", "function_call": {"name": "f"}}]}', "messages[2].function_call: tools are not learnt from fields"),
    ('{"prompt": "a"}', "messages: expected"), ('{"prompt": "a", "completion": " "}', "messages[1].content"), ('{"prompt": 1, "completion": "b"}', "prompt and completion"),
]


@pytest.fixture
def prompts(base_dir) -> PromptFormat:
    return PromptFormat.load(base_dir, PromptSettings())


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_rows_are_refused_by_file_and_line(tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ValueError) as error:
        read_conversations(tmp_path / "d.jsonl")
    assert "d.jsonl:3" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(("line", "words"), [*BAD[:2], BAD[6], (LONG, "the response is 101 tokens with its end, the limit for prompt and response is 64")])
def test_sun_tune_refuses_them_before_any_step(root, tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text(f"{GOOD}\n{line}\n")
    done = CliRunner().invoke(app, ["tune", "--data", str(tmp_path / "d.jsonl"), "--out", str(tmp_path / "out"), "--root", str(root), "--max-tokens", "64"])
    assert isinstance(done.exception, ValueError) and "d.jsonl:2" in str(done.exception) and words in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_tokeniser_that_does_not_fit_the_base_is_refused_with_the_line_that_shows_it(prompts, tmp_path):
    (tmp_path / "d.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match=r"d\.jsonl:1.*tokeniser does not fit the base: it gives token \d+, the base has 100 tokens"):
        examples(read_conversations(tmp_path / "d.jsonl"), prompts, 100, 500)


def test_a_tokeniser_without_an_end_of_turn_is_refused(prompts, tmp_path):
    prompts.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-turn"):
        examples([], prompts, 300, 500)


def test_prompt_and_completion_are_a_user_and_an_assistant_turn(tmp_path):
    rows = [{"prompt": "a", "completion": "b"},
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = read_conversations(tmp_path / "d.jsonl")
    assert [m["role"] for m in one.messages] == ["user", "assistant"]
    assert [m["role"] for m in two.messages] == ["system", "user", "assistant"]


def test_openais_text_parts_and_its_developer_are_a_text_and_the_system(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]},
            {"messages": None, "prompt": "a", "completion": "b"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = read_conversations(tmp_path / "d.jsonl")
    assert [(m["role"], m["content"]) for m in one.messages] == [("system", "s"), ("user", "a\nb"), ("assistant", "a")]
    assert [m["content"] for m in two.messages] == ["a", "b"]


def test_lines_end_at_newlines_only(tmp_path):
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_conversations(tmp_path / "d.jsonl")[0].messages == row["messages"]


def test_a_byte_that_is_not_utf_8_is_refused_by_file_and_line_and_a_byte_order_mark_is_not_data(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n".encode())
    assert len(read_conversations(tmp_path / "d.jsonl")) == 1
    (tmp_path / "d.jsonl").write_bytes(f"{GOOD}\n".encode() + GOOD.replace('"a"', '"caf\xe9"').encode("latin-1"))
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not UTF-8: byte 0xe9 at byte 46"):
        read_conversations(tmp_path / "d.jsonl")


def test_what_the_chat_template_refuses_is_refused_by_file_and_line(prompts, tmp_path):
    (tmp_path / "d.jsonl").write_text(f'{GOOD}\n{GOOD.replace("user", "tool")}')
    with pytest.raises(ValueError, match=r"d\.jsonl:2: messages: the chat template refuses them: tools are not spoken here"):
        examples(read_conversations(tmp_path / "d.jsonl"), prompts, 300, 500)


def test_hub_datasets_are_read_by_id(monkeypatch):
    asked = []

    def load_dataset(name: str, config: str | None = None, *, split: str) -> list[dict]:
        asked.append((name, config, split))
        return [json.loads(GOOD), {"messages": []}] if split == "bad" else [json.loads(GOOD)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(read_conversations("owner/name")) == 1
    with pytest.raises(ValueError, match="owner/name:bad row 2"):
        read_conversations("owner/name:bad")
    read_conversations("owner/Name-2.5")
    read_conversations("owner/name:main:test")
    assert asked == [("owner/name", None, "train"), ("owner/name", None, "bad"), ("owner/Name-2.5", None, "train"), ("owner/name", "main", "test")]


@pytest.mark.parametrize("source", ["none.jsonl", "data/none.jsonl", "a/b/c", "/nowhere/x", "name", "a/b:c:d:e"])
def test_what_is_neither_a_file_nor_a_dataset_id_is_refused(source):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_conversations(source)


def test_without_the_datasets_library_a_hub_id_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_conversations("owner/name")


def test_every_assistant_turn_is_an_example_with_all_before_it_as_prompt(prompts):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok")]
    messages = [{"role": role, "content": content} for role, content in turns]
    conversation = Conversation("d.jsonl:1", messages, {})
    first, second = examples([conversation], prompts, 300, 500)[0]
    assert (first.prompt, second.prompt) == (prompts.encode(messages[:1]), prompts.encode(messages[:3]))
    assert prompts.tokenizer.decode(second.response) == "ok<|im_end|>"
    assert examples([conversation], prompts, 300, len(first.prompt) + len(first.response)) == ([first], 1)


def test_a_turn_of_weight_0_is_context_only(prompts, tmp_path):
    turns = [("hi", "WRONG", 0), ("again", "right", 1), ("more", "WRONG", 0)]
    messages = [m for said, answer, weight in turns for m in ({"role": "user", "content": said}, {"role": "assistant", "content": answer, "weight": weight})]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": messages}))
    conversation, = read_conversations(tmp_path / "d.jsonl")
    (example,), _ = examples([conversation], prompts, 300, 500)
    assert prompts.tokenizer.decode(example.response) == "right<|im_end|>" and "WRONG" in prompts.tokenizer.decode(example.prompt)
    assert conversation.last_turn == 3, "what an answer is scored against"


def test_fields_that_a_dataset_has_for_other_rows_are_no_tools(tmp_path):
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b", "weight": None, "tool_calls": None}], "tools": None}
    bfcl = {**json.loads(GOOD), "functions": [{"name": "f"}], "possible": [{"f": {}}]}
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(bfcl)}")
    assert len(read_conversations(tmp_path / "d.jsonl")) == 2


@given(rows=st.integers(1, 50), size=st.integers(1, 9), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_plan_has_the_batches_asked_for_and_uses_every_row_before_any_twice_as_often(rows, size, count, seed):
    data = [Example([1] * (i % 7 + 1), [2]) for i in range(rows)]
    plan = plan_batches(data, size, count, seed)
    assert len(plan) == count and plan == plan_batches(data, size, count, seed)
    assert plan_batches(data, size, count + 5, seed)[:count] == plan
    assert all(len(batch) == min(size, rows) for batch in plan)
    per_epoch = max(1, rows // size)
    for start in range(0, count, per_epoch):
        used = [i for batch in plan[start : start + per_epoch] for i in batch]
        assert len(used) == len(set(used))


@pytest.mark.parametrize("rows", [17, 31, 100, 250])
def test_the_longest_rows_are_left_out_no_more_than_others(rows):
    data = [Example([1] * (i + 1), [2]) for i in range(rows)]
    seen = [i for batch in plan_batches(data, 16, 60 * (rows // 16), 0) for i in batch]
    assert set(seen) == set(range(rows))
    assert seen.count(rows - 1) > 20


@given(st.lists(st.integers(), min_size=1, max_size=30), st.integers(1, 8))
def test_a_step_is_split_without_loss(step, parts):
    shares = split(step, parts)
    assert len(shares) == parts and all(shares)
    assert set(sum(shares, [])) == set(step)
    if len(step) >= parts:
        assert sum(shares, []) == step
