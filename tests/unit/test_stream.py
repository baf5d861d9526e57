"""Text comes out whole however it is cut into tokens and pieces, and ends before a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sun.text.stream import StopMatcher, TextStream

from . import tiny

TOKENIZER = tiny.tokenizer().backend_tokenizer


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def run(tokens: list[int], stops: list[str] = [], min_tokens: int = 0) -> tuple[list[str], bool]:
    """All pieces up to the end or the stop, and whether there was a stop."""
    stream, pieces = TextStream(TOKENIZER, stops, min_tokens), []
    for token in tokens:
        text, hit = stream.push(token)
        pieces.append(text)
        if hit:
            return pieces, True
    text, hit = stream.finish()
    return [*pieces, text], hit


def cut(text: str, at: list[int]) -> list[str]:
    """``text`` in pieces, cut at the given places."""
    places = sorted({0, len(text), *(a for a in at if a < len(text))})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@given(st.text(max_size=40))
def test_pieces_of_any_text_join_to_it(text):
    pieces, hit = run(encode(text))
    assert "".join(pieces) == text and not hit


@given(st.lists(st.integers(0, tiny.VOCAB - 1), max_size=40))
def test_pieces_of_any_tokens_join_to_the_full_decode(tokens):
    assert "".join(run(tokens)[0]) == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(alphabet="aé漢👩‍🙂", min_size=1, max_size=20))
def test_a_character_of_several_tokens_comes_out_whole(text):
    assert all("\ufffd" not in piece for piece in run(encode(text))[0])


PIECES = ["<unk>", "\u2581Hello", "\u2581world", "!", "\u2581", "<0xE2>", "<0x82>", "<0xAC>", "a"]


def byte_fallback() -> Tokenizer:
    """A tokeniser as Llama 2's and Mistral's: spaces are a part of words, and bytes that no token has are tokens of their own."""
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return made


def test_words_and_characters_of_a_tokeniser_with_byte_tokens_come_out_whole():
    stream = TextStream(byte_fallback(), [])
    ids = [1, 2, 3, 5, 6, 7, 2, 5]
    assert [stream.push(token)[0] for token in ids] == ["Hello", " world", "!", "", "", "€", " world", ""]
    assert stream.finish() == ("\ufffd", False)
    assert [stream.one(token) for token in ids] == [" Hello", " world", "!", *["\ufffd"] * 3, " world", "\ufffd"]


@given(st.lists(st.integers(1, len(PIECES) - 1), max_size=20))
@example([4, 1])
@example([4, 4, 1])
def test_bytes_that_make_no_character_end_no_answer(ids):
    tokenizer, text = byte_fallback(), ""
    stream = TextStream(tokenizer, [])
    for token in ids:
        text += stream.push(token)[0]
    text += stream.finish()[0]
    whole = tokenizer.decode(ids)
    # A tokeniser that sees all of a run of bytes at once may give up on all of it: what has been sent is not taken back.
    assert text.replace("€", "\ufffd" * 3) == whole.replace("€", "\ufffd" * 3)


def test_a_character_comes_with_the_token_that_completes_it():
    pieces, _ = run(encode("a🙂b"))
    assert pieces == ["a", "", "", "", "🙂", "b", ""]


def test_an_unfinished_character_at_the_end_is_a_replacement_character():
    pieces, _ = run(encode("ok🙂")[:-1])
    assert "".join(pieces) == TOKENIZER.decode(encode("ok🙂")[:-1]) and "\ufffd" in pieces[-1]


def test_special_tokens_are_no_text():
    pieces, _ = run([*encode("a"), tiny.EOS, *encode("b")])
    assert "".join(pieces) == "ab"


@given(st.text(alphabet="ab🙂", max_size=30), st.text(alphabet="ab🙂", min_size=1, max_size=4), st.lists(st.integers(0, 30)))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(text, stop, at):
    matcher, out, hit = StopMatcher([stop]), "", False
    for piece in cut(text, at):
        more, hit = matcher.push(piece)
        out += more
        if hit:
            break
    else:
        out += matcher.flush()
    assert out == text.split(stop)[0] and hit == (stop in text)


@given(st.text(alphabet="ab", max_size=30), st.text(alphabet="ab", min_size=1, max_size=4), st.lists(st.integers(0, 30)))
def test_only_what_may_begin_a_stop_string_is_held_back(text, stop, at):
    matcher, out, seen = StopMatcher([stop]), "", ""
    for piece in cut(text, at):
        seen += piece
        more, hit = matcher.push(piece)
        out += more
        if hit:
            return
        held = seen[len(out):]
        assert stop.startswith(held) and held != stop
        assert not any(stop.startswith(seen[i:]) for i in range(len(out))), "let go what may have begun a stop string"


@given(st.text(alphabet="ab🙂漢", max_size=20), st.text(alphabet="ab🙂漢", min_size=1, max_size=3))
def test_stop_strings_are_found_across_tokens(text, stop):
    pieces, hit = run(encode(text), [stop])
    assert "".join(pieces) == text.split(stop)[0] and hit == (stop in text)


@given(st.text(alphabet="abc", max_size=30),
       st.lists(st.sampled_from(["ab", "bca", "cc", "abca", "a"]), min_size=1, max_size=3, unique=True), st.lists(st.integers(0, 30)))
@example("bccab", ["ab", "cc"], [])
def test_nothing_of_any_of_several_stop_strings_gets_out(text, stops, at):
    matcher, out, hit = StopMatcher(stops), "", False
    for piece in cut(text, at):
        more, hit = matcher.push(piece)
        out += more
        if hit:
            break
    else:
        out += matcher.flush()
    assert text.startswith(out)
    assert hit == any(stop in text for stop in stops)
    assert not any(stop in out for stop in stops)


@pytest.mark.parametrize("end", ["🙂", "\ufffd"])
def test_a_stop_string_in_the_last_held_back_text_counts(end):
    tokens = encode("so" + end)
    pieces, hit = run(tokens, [end])
    assert "".join(pieces) == "so" and hit


def test_a_stop_string_that_only_began_is_text_after_all():
    pieces, hit = run(encode("the en"), ["end"])
    assert "".join(pieces) == "the en" and not hit
    assert pieces[-1] == "en"


@given(st.text(alphabet="ab", max_size=20), st.text(alphabet="ab", min_size=1, max_size=3), st.integers(0, 25))
def test_in_the_first_min_tokens_no_stop_string_counts(text, stop, least):
    pieces, hit = run(encode(text), [stop], least)
    assert len(encode(text)) == len(text), "a token a letter"
    assert "".join(pieces) == text[:least] + text[least:].split(stop)[0] and hit == (stop in text[least:])
