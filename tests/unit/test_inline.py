"""Transport ``inline``: the KV comes with its ticket or not at all."""

from __future__ import annotations

import pytest

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import TicketError, describe, parse

from .test_ticket import BASE, KV, TASK, TOKENS


def ship(kv: bytes = KV, tokens: int = TOKENS) -> list[bytes]:
    publication = Inline().reserve(len(kv))
    publication.buffer[:] = kv
    return publication.ship(lambda buffer, transport, location: describe(BASE, TASK, tokens, buffer, transport, location))


def test_a_shipment_carries_the_kv_that_was_written():
    shipment = ship()
    ticket = parse(shipment[0])
    assert ticket.transport == "inline" and ticket.location == ""
    with Inline().pull(ticket, shipment) as buffer:
        assert bytes(buffer) == KV
        assert verified_kv(ticket, buffer).shape == (2, 2, 2, TOKENS, 4)


def test_the_empty_kv_of_a_one_token_prompt_travels():
    shipment = ship(b"", 0)
    with Inline().pull(parse(shipment[0]), shipment) as buffer:
        assert verified_kv(parse(shipment[0]), buffer).numel() == 0


@pytest.mark.parametrize("keep", [slice(0, 1), slice(0, 0)])
def test_a_shipment_without_its_kv_is_refused_naming_the_transport(keep):
    shipment = ship()
    with pytest.raises(TicketError, match=r"^ticket\.transport: "):
        Inline().pull(parse(shipment[0]), shipment[keep])


def test_a_shipment_with_too_much_is_refused():
    shipment = ship()
    with pytest.raises(TicketError, match=r"^ticket\.transport: "):
        Inline().pull(parse(shipment[0]), [*shipment, b""])


def test_renewing_and_releasing_are_harmless_any_number_of_times():
    shipment = ship()
    ticket, inline = parse(shipment[0]), Inline()
    for _ in range(2):
        inline.renew(ticket)
        inline.release(ticket)
    with inline.pull(ticket, shipment) as buffer:
        assert bytes(buffer) == KV


def test_dropping_frees_the_room():
    publication = Inline().reserve(100)
    publication.drop()
    assert publication.buffer.nbytes == 0
