"""The KV ticket: what a handed-over KV cache is, who made it, and where it lies."""

from __future__ import annotations

import msgspec
import xxhash

from sun.handoff.device import DeviceBuffer
from sun.model.manifest import BaseManifest, Geometry, TaskManifest

TICKET_VERSION = 1
ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the names of the formats that K and V may come in; every decode module takes all of them."""
MAX_TICKET_BYTES = 1 << 20


class TicketError(ValueError):
    """A ticket, or the KV it points to, that must not be decoded from. The message names the field."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Describes K and V of ``tokens`` prompt tokens, laid out as [layers, 2, kv_heads, tokens, head_dim], keys after RoPE.

    hidden: 0 if these are x1..x(n-1), so that the decode module runs xn. The base's hidden size if the prefill module has run xn, too: behind the
    KV lies xn's state after the last layer (float32), on which the decode module puts its final norm and head to choose the first token.
    checksum: "xxh3:<hex>" of all these bytes, "sum64:<hex>" of those that lie on a device (see `sun.handoff.device`).
    transport and location: how to get them ("shm", "inline", "cuda_ipc").
    """

    version: int
    base_digest: str
    geometry: Geometry
    dtype: str
    tokens: int
    task: str
    weights_digest: str
    checksum: str
    transport: str
    location: str = ""
    hidden: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V alone."""
        return self.geometry.kv_bytes(self.tokens, ITEMSIZE[self.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes that belong to this ticket."""
        return self.kv_bytes + ITEMSIZE["float32"] * self.hidden


def checksum(kv: memoryview | bytes | DeviceBuffer) -> str:
    """Checksum of KV bytes (XXH3, 64 bits: about memory speed; it guards against faults, not against forgery)."""
    if isinstance(kv, DeviceBuffer):
        return kv.checksum()
    return f"xxh3:{xxhash.xxh3_64_hexdigest(kv)}"


def describe(base: BaseManifest, task: TaskManifest, tokens: int, kv: memoryview | bytes | DeviceBuffer, transport: str, location: str = "",
             dtype: str = "float32", hidden: int = 0) -> Ticket:
    """The ticket of a KV that ``task``'s prefill module computed, see `Ticket`. dtype: one of `ITEMSIZE`."""
    return Ticket(
        version=TICKET_VERSION, base_digest=base.digest, geometry=base.geometry, dtype=dtype, tokens=tokens,
        task=task.name, weights_digest=task.weights_digest, checksum=checksum(kv), transport=transport, location=location, hidden=hidden)


def parse(data: bytes) -> Ticket:
    """Read a ticket's JSON. Raises TicketError naming the field that is missing, unknown or of the wrong type."""
    if len(data) > MAX_TICKET_BYTES:
        raise TicketError(f"ticket: {len(data)} bytes, the limit is {MAX_TICKET_BYTES}")
    try:
        version = msgspec.json.decode(data, type=dict).get("version")
        if version != TICKET_VERSION:
            raise TicketError(f"ticket.version: got {version!r}, this side speaks {TICKET_VERSION}")
        ticket = msgspec.json.decode(data, type=Ticket)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TicketError(f"ticket: {error}") from error
    _check_dtype(ticket)
    if ticket.tokens < 0:
        raise TicketError(f"ticket.tokens: got {ticket.tokens}, must be 0 or more")
    if ticket.hidden < 0:
        raise TicketError(f"ticket.hidden: got {ticket.hidden}, must be 0 or more")
    return ticket


def check_fits(ticket: Ticket, base: BaseManifest, task: str, prompt_tokens: int) -> None:
    """Raise TicketError unless a decode module of ``base`` may continue a prompt of ``prompt_tokens`` tokens from it."""
    _check_dtype(ticket)
    expected = {"base_digest": base.digest, "geometry": base.geometry, "task": task, "tokens": prompt_tokens if ticket.hidden else prompt_tokens - 1,
                "hidden": base.hidden if ticket.hidden else 0}
    for field, value in expected.items():
        got = getattr(ticket, field)
        if got != value:
            raise TicketError(f"ticket.{field}: got {got!r}, this decode module needs {value!r}")


def _check_dtype(ticket: Ticket) -> None:
    if ticket.dtype not in ITEMSIZE:
        raise TicketError(f"ticket.dtype: got {ticket.dtype!r}, expected one of {', '.join(ITEMSIZE)}")
