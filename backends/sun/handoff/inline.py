"""Transport ``inline``: the KV travels in the shipment itself. Always works, copies most."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import msgspec

from sun.handoff.ticket import Ticket, TicketError
from sun.handoff.transport import Describe, Publication


class InlinePublication:
    """KV in ordinary memory until it is shipped."""

    def __init__(self, nbytes: int):
        self.buffer = memoryview(bytearray(nbytes))

    def ship(self, describe: Describe) -> list[bytes]:
        """The ticket's JSON and the KV."""
        return [msgspec.json.encode(describe(self.buffer, Inline.name, "")), bytes(self.buffer)]

    def drop(self) -> None:
        """Forget the KV."""
        self.buffer = memoryview(b"")


class Inline:
    """See the module."""

    name = "inline"

    def reserve(self, nbytes: int) -> Publication:
        """Room in ordinary memory."""
        return InlinePublication(nbytes)

    def pull(self, ticket: Ticket, shipment: list[bytes]) -> AbstractContextManager[memoryview]:
        """The shipment's second element."""
        if len(shipment) != 2:
            raise TicketError(f"ticket.transport: inline needs the KV as the second element of 2, got {len(shipment)}")
        return nullcontext(memoryview(shipment[1]))

    def renew(self, ticket: Ticket) -> None:
        """Nothing to extend: the KV lives as long as the message."""

    def release(self, ticket: Ticket) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Nothing to end."""
