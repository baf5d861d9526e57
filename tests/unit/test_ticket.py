"""A ticket says what its KV is; whatever does not fit is refused with the field's name."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.handoff.kv import DTYPES, hidden_state, kv_tensor, verified_kv
from sun.handoff.ticket import ITEMSIZE, MAX_TICKET_BYTES, TICKET_VERSION, Ticket, TicketError, check_fits, checksum, describe, parse
from sun.model.manifest import BaseManifest, Geometry, Rope, TaskManifest
from sun.text.prompt import PromptSettings

ROPE = Rope("default", [1.0, 0.1])
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=4, rope=ROPE)
BASE = BaseManifest(
    source="here", architecture="llama", digest="sha256:base", geometry=GEOMETRY, hidden=16, heads=4, vocab=100, norm_eps=1e-5,
    max_context=64, eos_ids=[1], prompt=PromptSettings())
TASK = TaskManifest(name="a", weights="lora", weights_digest="sha256:w", base_digest=BASE.digest, prompt=PromptSettings())
TOKENS = 5
KV = bytes(range(256)) * (GEOMETRY.kv_bytes(TOKENS, 4) // 256) + bytes(GEOMETRY.kv_bytes(TOKENS, 4) % 256)
TICKET = describe(BASE, TASK, TOKENS, KV, "inline")


def changed(**fields) -> Ticket:
    return msgspec.structs.replace(TICKET, **fields)


def as_dict() -> dict:
    return json.loads(msgspec.json.encode(TICKET))


def test_a_ticket_describes_its_kv():
    assert TICKET.nbytes == len(KV) and TICKET.tokens == TOKENS and TICKET.checksum == checksum(KV)
    assert (TICKET.base_digest, TICKET.task, TICKET.weights_digest, TICKET.geometry) == ("sha256:base", "a", "sha256:w", GEOMETRY)
    check_fits(TICKET, BASE, "a", TOKENS + 1)


texts = st.text(max_size=20)
ropes = st.builds(Rope, texts, st.lists(st.floats(0, 1), max_size=4), st.floats(0.1, 10))
geometries = st.builds(Geometry, st.integers(), st.integers(), st.integers(), ropes)
tickets = st.builds(
    Ticket, version=st.just(TICKET_VERSION), base_digest=texts, geometry=geometries, dtype=st.sampled_from(list(ITEMSIZE)), tokens=st.integers(0, 2**62),
    task=texts, weights_digest=texts, checksum=texts, transport=texts, location=texts,
    hidden=st.integers(0, 2**62))


@given(tickets)
def test_a_ticket_survives_json(ticket):
    assert parse(msgspec.json.encode(ticket)) == ticket


@pytest.mark.parametrize(("field", "value"), [
    ("base_digest", "sha256:other"),
    ("geometry", Geometry(3, 2, 4, ROPE)),
    ("geometry", Geometry(2, 1, 4, ROPE)),
    ("geometry", Geometry(2, 2, 8, ROPE)),
    ("geometry", Geometry(2, 2, 4, Rope("linear", [1.0, 0.1]))),
    ("geometry", Geometry(2, 2, 4, Rope("default", [1.0, 0.1000001]))),
    ("geometry", Geometry(2, 2, 4, Rope("default", [1.0, 0.1], 1.1))),
    ("dtype", "float16"),
    ("task", "b"),
    ("tokens", TOKENS - 1),
    ("tokens", TOKENS + 1),
])
def test_a_ticket_of_something_else_is_refused_naming_the_field(field, value):
    with pytest.raises(TicketError, match=rf"^ticket\.{field}: "):
        check_fits(changed(**{field: value}), BASE, "a", TOKENS + 1)


@pytest.mark.parametrize(("field", "value"), [
    ("version", TICKET_VERSION + 1), ("version", 0), ("version", None), ("dtype", "float16"), ("tokens", -1),
])
def test_a_ticket_of_another_format_is_refused_naming_the_field(field, value):
    with pytest.raises(TicketError, match=rf"^ticket\.{field}: "):
        parse(json.dumps(as_dict() | {field: value}).encode())


@pytest.mark.parametrize("field", [f for f in Ticket.__struct_fields__ if f not in ("location", "hidden", "version")])
def test_a_field_that_is_missing_or_of_the_wrong_type_is_named(field):
    whole = as_dict()
    for broken in ({k: v for k, v in whole.items() if k != field}, whole | {field: [True]}):
        with pytest.raises(TicketError, match=rf"\b{field}\b"):
            parse(json.dumps(broken).encode())


def test_an_unknown_field_is_named():
    with pytest.raises(TicketError, match="colour"):
        parse(json.dumps(as_dict() | {"colour": "red"}).encode())


@given(st.binary(max_size=200))
def test_random_bytes_are_no_ticket_and_nothing_worse(data):
    with pytest.raises(TicketError):
        parse(data)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@given(st.sampled_from([*Ticket.__struct_fields__, "extra"]), values)
def test_a_ticket_with_any_value_in_any_field_is_read_or_refused_and_nothing_worse(field, value):
    try:
        ticket = parse(json.dumps(as_dict() | {field: value}).encode())
        check_fits(ticket, BASE, "a", TOKENS + 1)
        verified_kv(ticket, memoryview(KV))
    except TicketError:
        return
    assert changed(transport=ticket.transport, location=ticket.location, weights_digest=ticket.weights_digest) == ticket


@pytest.mark.parametrize("data", [
    b'{"version":1,"x":' + b"[" * 500_000, b"[" * 500_000 + b"]" * 500_000, b" " * (MAX_TICKET_BYTES + 1),
])
def test_deeply_nested_or_huge_json_is_refused(data):
    with pytest.raises(TicketError, match="^ticket"):
        parse(data)


@given(st.integers(0, len(KV) - 1), st.integers(1, 255))
def test_a_changed_byte_of_kv_is_a_checksum_error(at, change):
    broken = bytearray(KV)
    broken[at] ^= change
    with pytest.raises(TicketError, match=r"^ticket\.checksum: "):
        verified_kv(TICKET, memoryview(broken))


@pytest.mark.parametrize("kv", [b"", KV[:-1], KV[:-4], KV + bytes(4)])
def test_kv_of_the_wrong_size_is_refused_naming_the_tokens(kv):
    with pytest.raises(TicketError, match=r"^ticket\.tokens: "):
        verified_kv(TICKET, memoryview(kv))


def test_verified_kv_has_the_described_layout():
    values = torch.randn(2, 2, 2, TOKENS, 4)
    kv = values.numpy().tobytes()
    assert torch.equal(verified_kv(describe(BASE, TASK, TOKENS, kv, "inline"), memoryview(kv)), values)


@given(st.sampled_from(list(ITEMSIZE)), st.integers(0, 9), st.randoms(use_true_random=False))
def test_kv_of_every_format_comes_back_as_it_was_and_a_decode_module_takes_it(dtype, tokens, random):
    kv = random.randbytes(GEOMETRY.kv_bytes(tokens, ITEMSIZE[dtype]))
    ticket = parse(msgspec.json.encode(describe(BASE, TASK, tokens, kv, "inline", dtype=dtype)))
    check_fits(ticket, BASE, "a", tokens + 1)
    got = verified_kv(ticket, memoryview(kv))
    assert got.dtype is DTYPES[dtype] and got.shape == (2, 2, 2, tokens, 4) and got.view(torch.uint8).numpy().tobytes() == kv


def test_a_ticket_as_it_was_before_there_was_a_second_format_is_still_read():
    old = (b'{"version":1,"base_digest":"sha256:base","geometry":{"layers":2,"kv_heads":2,"head_dim":4,"rope":{"kind":"default",'
           b'"inv_freq":[1.0,0.1],"scale":1.0}},"dtype":"float32","tokens":5,"task":"a","weights_digest":"sha256:w",'
           b'"checksum":"%s","transport":"inline","location":""}' % checksum(KV).encode())
    assert parse(old) == TICKET and verified_kv(parse(old), memoryview(KV)).dtype is torch.float32


@pytest.mark.parametrize("dtype", [d for d in ITEMSIZE if d != "float32"])
def test_kv_of_another_format_than_the_ticket_names_is_refused(dtype):
    with pytest.raises(TicketError, match=r"^ticket\.tokens: "):
        verified_kv(changed(dtype=dtype), memoryview(KV))


@given(st.sampled_from(list(ITEMSIZE)), st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_whole_prompts_ticket_has_the_last_tokens_state_behind_the_kv(dtype, tokens, random):
    size = GEOMETRY.kv_bytes(tokens, ITEMSIZE[dtype])
    data = random.randbytes(size + 4 * BASE.hidden)
    ticket = parse(msgspec.json.encode(describe(BASE, TASK, tokens, data, "inline", dtype=dtype, hidden=BASE.hidden)))
    check_fits(ticket, BASE, "a", tokens)
    assert verified_kv(ticket, memoryview(data)).contiguous().view(torch.uint8).numpy().tobytes() == data[:size]
    assert hidden_state(ticket, memoryview(data)).view(torch.uint8).numpy().tobytes() == data[size:]
    with pytest.raises(TicketError, match=r"^ticket\.checksum: "):
        verified_kv(ticket, memoryview(data[:-1] + bytes([data[-1] ^ 1])))
    with pytest.raises(TicketError, match=r"^ticket\.tokens: "):
        check_fits(ticket, BASE, "a", tokens + 1)


@pytest.mark.parametrize("hidden", [1, BASE.hidden - 1, BASE.hidden + 1, 2**62])
def test_a_state_of_another_size_than_the_bases_is_refused(hidden):
    with pytest.raises(TicketError, match=r"^ticket\.hidden: "):
        check_fits(changed(hidden=hidden), BASE, "a", TOKENS)


def test_the_kv_of_no_tokens_is_empty_and_verified():
    ticket = describe(BASE, TASK, 0, b"", "inline")
    assert verified_kv(ticket, memoryview(b"")).shape == (2, 2, 2, 0, 4)
    check_fits(ticket, BASE, "a", 1)


def test_a_kv_tensor_is_a_view_of_its_buffer():
    buffer = memoryview(bytearray(16))
    kv_tensor(buffer, (2, 2)).fill_(1.0)
    assert torch.frombuffer(bytes(buffer), dtype=torch.float32).tolist() == [1.0] * 4
