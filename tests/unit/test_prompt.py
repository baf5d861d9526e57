"""Conversations become the same prompt everywhere, and what cannot be prompted is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.text.prompt import PromptFormat, PromptSettings, check_messages

from . import tiny

USER = {"role": "user", "content": "hi"}


def with_system(prompts: PromptFormat, system: str | None) -> PromptFormat:
    return PromptFormat(prompts.tokenizer, PromptSettings(system_prompt=system))


def test_a_prompt_ends_with_the_header_of_the_assistants_turn(prompts):
    assert prompts.render([USER]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_ids_are_the_rendered_texts_and_special_tokens_are_single(prompts):
    ids = prompts.encode([USER])
    assert ids == prompts.tokenizer.encode(prompts.render([USER]), add_special_tokens=False)
    assert ids[0] == len(tiny.BYTES) and ids.count(tiny.EOS) == 1


def test_earlier_turns_of_the_assistant_are_part_of_the_prompt(prompts):
    turns = [USER, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "more"}]
    assert prompts.render(turns).startswith(prompts.render([USER]) + "ho<|im_end|>\n")


def test_a_system_prompt_is_put_in_only_where_there_is_none(prompts):
    settled = with_system(prompts, "be brief")
    assert settled.render([USER]).startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")
    own = [{"role": "system", "content": "be long"}, USER]
    assert settled.render(own) == prompts.render(own)
    assert own[0]["content"] == "be long" and len(own) == 2, "the caller's conversation was changed"


def test_an_empty_system_prompt_is_put_in_and_none_is_not(prompts):
    assert with_system(prompts, "").render([USER]).startswith("<|im_start|>system\n<|im_end|>\n")
    assert "system" not in with_system(prompts, None).render([USER])


def test_without_a_chat_template_the_contents_are_joined_by_newlines():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    prompts = PromptFormat(tokenizer, PromptSettings())
    assert tokenizer.decode(prompts.encode([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])) == "a\nb"


def test_the_end_of_turn_tokens_are_the_tokenisers(prompts):
    assert prompts.eos_ids == [tiny.EOS]


@given(st.text(max_size=50))
def test_any_text_survives_encoding(text):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(PromptFormat(tokenizer, PromptSettings()).encode([{"role": "user", "content": text}])) == text


@pytest.mark.parametrize(("messages", "field"), [
    (None, "messages:"),
    ({}, "messages:"),
    ([], "messages:"),
    ("hi", "messages:"),
    (["hi"], "messages[0]:"),
    ([{"content": "hi"}], "messages[0].role:"),
    ([{"role": "robot", "content": "hi"}], "messages[0].role:"),
    ([{"role": ["user"], "content": "hi"}], "messages[0].role:"),
    ([USER, {"role": "user"}], "messages[1].content:"),
    ([{"role": "user", "content": None}], "messages[0].content:"),
    ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "messages[0].content:"),
    ([{"role": "user", "content": "a\ud800b"}], "messages[0].content:"),
    ([USER, {"role": "assistant", "content": "ho"}], "messages[1].role:"),
    ([{"role": "system", "content": "be brief"}], "messages[0].role:"),
    ([{"role": "system", "content": "be brief"}, {"role": "user", "content": " \n"}], "messages:"),
])
def test_a_conversation_that_cannot_be_prompted_is_refused_naming_the_part(messages, field):
    with pytest.raises(ValueError) as error:
        check_messages(messages)
    assert str(error.value).startswith(field)


@pytest.mark.parametrize("messages", [
    [USER], [{"role": "system", "content": ""}, USER], [USER, {"role": "assistant", "content": ""}, USER],
])
def test_a_good_conversation_is_returned_as_it_is(messages):
    assert check_messages(messages) is messages


def test_what_the_chat_template_refuses_is_the_callers_error(prompts):
    with pytest.raises(ValueError, match="^messages: .*tools are not spoken here"):
        prompts.encode([USER, {"role": "tool", "content": "42"}])
