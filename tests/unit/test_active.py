"""A request in flight ends once: whatever comes first wins, and all that comes later is ignored."""

from __future__ import annotations

import threading

import pytest

from sun.decode.params import SamplingParams
from sun.messages import Admit, TokenEvent
from sun.router.active import Active, Piece
from sun.router.errors import RequestError
from sun.router.record import Record
from sun.router.request import GenerateRequest
from sun.text.stream import TextStream

from . import tiny
from .harness import Answer

ID = "key-1"
TOKENIZER = tiny.tokenizer().backend_tokenizer


def active(stops: list[str] = [], stream: bool = True) -> tuple[Active, Answer]:
    answer = Answer()
    request = GenerateRequest(messages=[], sampling={}, stream=stream, returns=frozenset(["token_ids"]))
    it = Active(request, answer, 1000.0, Record("key"))
    it.begin(TextStream(TOKENIZER, stops), 7)
    it.admit = Admit(id="key", router="r", task="plain", prompt=[1], params=SamplingParams())
    assert it.assign("decode_0").id == ID
    return it, answer


def token(letter: str, finish: str | None = None) -> TokenEvent:
    return TokenEvent(id=ID, token=TOKENIZER.encode(letter, add_special_tokens=False).ids[0], finish=finish)


def test_tokens_become_pieces_until_the_last():
    it, answer = active()
    assert [it.take(event) for event in (token("a"), token("b"), token("c", "length"))] == [False, False, True]
    assert [(piece.text, piece.finish_reason) for piece in answer.pieces] == [("a", None), ("b", None), ("c", "length")]


@pytest.mark.parametrize("end", ["length", "stop string", "error", "fail"])
def test_nothing_follows_the_end(end):
    it, answer = active(["b"])
    it.take(token("a"))
    ended = {
        "length": lambda: it.take(token("c", "length")), "stop string": lambda: it.take(token("b")),
        "error": lambda: it.take(TokenEvent(id=ID, finish="error", error="out of luck")),
        "fail": lambda: it.fail(RequestError("CANCELLED", "")),
    }[end]()
    assert ended and answer.ends == 1
    pieces = len(answer.pieces)
    assert not it.take(token("d")) and not it.take(token("d", "stop")) and not it.fail(RequestError("DEADLINE", ""))
    assert not it.take(TokenEvent(id=ID, finish="error", error="late"))
    assert answer.ends == 1 and len(answer.pieces) == pieces


def test_of_many_ends_at_once_one_wins():
    it, answer = active()
    start, won = threading.Barrier(8), []

    def end(i: int) -> None:
        start.wait()
        if it.fail(RequestError("INTERNAL", str(i))) if i % 2 else it.take(token("a", "length")):
            won.append(i)

    threads = [threading.Thread(target=end, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == answer.ends == 1


def test_without_a_stream_there_is_one_piece_with_everything():
    it, answer = active(stream=False)
    for event in (token("a"), token("b"), token("c", "stop")):
        it.take(event)
    assert [(piece.text, len(piece.token_ids), piece.num_input_tokens) for piece in answer.pieces] == [("ab", 3, 7)]


def test_pieces_add_up():
    whole = Piece(text="a", token_ids=[1], num_input_tokens=7)
    whole.add(Piece(text="b", token_ids=[2], logprobs=[{}], finish_reason="stop"))
    assert whole == Piece(text="ab", token_ids=[1, 2], logprobs=[{}], num_input_tokens=7, finish_reason="stop")
