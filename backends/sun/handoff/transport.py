"""The handoff's interface: reserve -> ship (a ticket), pull(ticket) -> KV, renew, release.

A *shipment* is what travels: a list of byte strings, the elements of a Triton BYTES tensor. The first is the ticket's
JSON; ``inline`` adds the KV itself as the second.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sun.handoff.device import DeviceBuffer
from sun.handoff.ticket import Ticket

Buffer = memoryview | DeviceBuffer
Describe = Callable[[Buffer, str, str], Ticket]
"""describe(kv bytes, transport, location) -> the ticket to ship."""
NO_ROOM = "no room for the KV"
"""How the error of a prefill begins that found no room to publish into; another time it may."""


class Publication(Protocol):
    """Room for one prompt's KV that a prefill writes into; then `ship` it or `drop` it."""

    buffer: Buffer

    def ship(self, describe: Describe) -> list[bytes]:
        """Seal the KV and return the shipment."""

    def drop(self) -> None:
        """Free the room; nothing was published."""


class Transport(Protocol):
    """One way to carry KV from a prefill process to a decode process."""

    name: str

    def reserve(self, nbytes: int) -> Publication:
        """Room for ``nbytes`` of KV; raises OSError (ENOSPC) if there is none now, ValueError if there never is."""

    def pull(self, ticket: Ticket, shipment: list[bytes]) -> AbstractContextManager[Buffer]:
        """The KV's bytes, unverified, valid inside the context. Raises TicketError if they are gone."""

    def renew(self, ticket: Ticket) -> None:
        """Extend the lease of a ticket in use."""

    def release(self, ticket: Ticket) -> None:
        """Free the KV; releasing twice is harmless."""

    def close(self) -> None:
        """End what this process publishes, and what it holds of others."""
