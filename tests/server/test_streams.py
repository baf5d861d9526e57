"""Streaming: pieces come as they are computed and join to the whole text, whatever its characters and stop strings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.server.conftest import GREEDY, REPO
from tests.server.reference import Reference

PROMPT = "Count from one to twenty in words."
WILD = {"temperature": 4.0, "max_tokens": 60, "ignore_eos": True}
"""Hot enough to draw parts of characters from all over the vocabulary."""


def test_pieces_join_to_the_final_text_for_multi_byte_output(client):
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(REPO / "build" / "base"), []
    with ThreadPoolExecutor(8) as pool:
        wholes = pool.map(lambda seed: client.generate("identity", PROMPT, sampling={**WILD, "seed": seed}), range(4))
        streams = pool.map(lambda seed: list(client.stream("identity", PROMPT, sampling={**WILD, "seed": seed})), range(4))
        answers = list(zip(wholes, streams, strict=True))
    for whole, pieces in answers:
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert "".join(piece.text for piece in pieces) == whole.text
        assert whole.text == tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        texts.append(whole.text)
    # Which seed draws them depends on the last bit of a logit, and so on the CPU.
    assert any(ord(c) > 0xFF and c != "\ufffd" for c in "".join(texts)), "the samples should have characters of several bytes"


def test_the_first_token_arrives_before_the_last_is_computed(client):
    stream = client.stream("identity", PROMPT, sampling={"max_tokens": 80, "ignore_eos": True, "temperature": 0})
    first = next(stream)
    running = sum(client.worker_stats(worker).running for worker in client.workers())
    rest = list(stream)
    assert first.text and running == 1
    assert len(first.token_ids) + sum(len(piece.token_ids) for piece in rest) == 80
    assert rest[-1].finish_reason == "length"


@pytest.mark.parametrize("span", [(2, 5), (7, 12), (15, 16)])
def test_a_stop_string_across_pieces_ends_the_text_before_it(client, span):
    text = client.generate("identity", PROMPT, sampling=GREEDY).text
    stop = text[span[0] : span[1]]
    pieces = list(client.stream("identity", PROMPT, sampling={**GREEDY, "stop": [stop]}))
    assert "".join(piece.text for piece in pieces) == text.split(stop)[0]
    assert pieces[-1].finish_reason == "stop"


def test_outputs_on_request(client):
    answer = client.generate("identity", PROMPT, sampling={**GREEDY, "logprobs": 3})
    assert answer.num_input_tokens == Reference(REPO / "build" / "base").prompt(PROMPT).shape[1]
    assert [entry["token_id"] for entry in answer.logprobs] == answer.token_ids
    assert "".join(entry["token"] for entry in answer.logprobs).startswith(answer.text)
    assert all(len(entry["top"]) == 3 and entry["top"][0]["token_id"] == entry["token_id"] for entry in answer.logprobs)


def test_one_message_is_a_text_and_several_are_a_conversation(client):
    one = [{"role": "user", "content": PROMPT}]
    assert client.generate("identity", messages=one, sampling=GREEDY).text == client.generate("identity", PROMPT, sampling=GREEDY).text
    turns = [*one, {"role": "assistant", "content": "one two three"}, {"role": "user", "content": "Go on."}]
    tokenizer = Reference(REPO / "build" / "base").tokenizer
    ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert client.generate("identity", messages=turns, sampling=GREEDY).num_input_tokens == len(ids)


@pytest.mark.parametrize("task", ["identity", "bash"])
def test_the_ensemble_gives_the_routers_answer_whole_and_streamed(client, http, task):
    expected = client.generate(task, PROMPT, sampling=GREEDY).text
    body = {"text_input": PROMPT, "sampling_parameters": '{"temperature": 0, "max_tokens": 24}'}
    assert requests.post(f"{http}/{task}/generate", json=body).json()["text_output"] == expected
    lines = requests.post(f"{http}/{task}/generate_stream", json={**body, "stream": True}, stream=True).iter_lines()
    events = [line.removeprefix(b"data: ") for line in lines if line]
    assert len(events) > 3
    assert "".join(requests.models.complexjson.loads(event)["text_output"] for event in events) == expected
