"""Transport ``cuda_ipc``: the KV stays in the GPU's memory, and a decode worker on the same GPU copies it from there.

A publisher exports one allocation and gives each prompt a range of it. The ticket's location is a file of transport ``shm``, whose lease
is the KV's (`Lease`); the file says on which GPU and where the KV lies, so that a ticket can name no other place.

A range is used again when its file is gone (released, or its lease ended) and nobody reads: who reads holds a shared lock on the file, taken
before looking whether it is still there. The publisher, which keeps the file open, takes an exclusive one of a file that is gone: so a ticket
either reads its own KV or finds its file gone. A reader looks before and after copying whether the publisher lives, whose memory vanishes with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from sun.handoff.device import DeviceBuffer, Driver, DriverError
from sun.handoff.shm import Shm, ShmPublication
from sun.handoff.ticket import Ticket, TicketError
from sun.handoff.transport import Describe, Publication
from sun.slots import Slot, Slots

UNIT = 512
"""Bytes that ranges begin at multiples of."""


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a ticket's file holds: the GPU, its publisher's allocation as the driver exports it, and the KV's range of that."""

    uuid: str
    handle: bytes
    offset: int
    nbytes: int


class CudaIpcPublication:
    """A range of the publisher's memory being filled."""

    def __init__(self, transport: CudaIpc, slot: Slot | None, lease: ShmPublication, buffer: DeviceBuffer):
        self._transport, self.slot, self._lease, self.buffer = transport, slot, lease, buffer
        self._file = os.open(lease.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def ship(self, describe: Describe) -> list[bytes]:
        """Wait until the KV is written, start the lease and return the ticket's JSON."""
        assert self._transport.driver is not None
        self._transport.driver.wait()
        shipment = self._lease.ship(lambda _, transport, location: describe(self.buffer, CudaIpc.name, location))
        self._transport.shipped.append(self)
        return shipment

    def drop(self) -> None:
        """Free the range and delete the file."""
        self._lease.drop()
        self._transport.give_back(self)

    def unread(self) -> bool:
        """Whether the file is gone and nobody reads from the range, nor ever will."""
        if os.fstat(self._file).st_nlink:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def forget(self) -> None:
        """Let the file go."""
        os.close(self._file)


class CudaIpc:
    """See the module. Publications and pulls are each one thread's.

    leases: where the files lie; a publisher's must have been opened as one. driver: of the GPU; without, as in a router, it only renews
    and releases. room: bytes of the GPU that a publisher takes for KV on its way; 0 for who publishes nothing.
    """

    name = "cuda_ipc"

    def __init__(self, leases: Shm, driver: Driver | None = None, room: int = 0):
        self.leases, self.driver, self.room = leases, driver, room
        self.shipped: list[CudaIpcPublication] = []
        self._opened: dict[str, int] = {}
        """Addresses of the allocations of other publishers, and of this one's own, by the publishers' names."""
        if room:
            assert driver is not None and leases.owner is not None
            self._slots, self._memory = Slots(room // UNIT), driver.allocate(room)
            self._handle = driver.export(self._memory)
            self._opened[leases.owner.name] = self._memory

    def reserve(self, nbytes: int) -> Publication:
        """A range of the GPU's memory. Raises OSError (ENOSPC) if none is free, ValueError if all of it would not hold ``nbytes``."""
        if not self.room:
            raise RuntimeError("this cuda_ipc transport was not opened as a publisher")
        assert self.driver is not None
        units = -(-nbytes // UNIT)
        if units > self._slots.budget:
            raise ValueError(f"input_ids: their KV is {nbytes} bytes, and handoff_tokens leaves room for {self._slots.budget * UNIT}")
        for publication in [each for each in self.shipped if each.unread()]:
            self.shipped.remove(publication)
            self.give_back(publication)
        slot = self._slots.take(units) if units else None
        if units and slot is None:
            raise OSError(errno.ENOSPC, f"{self._slots.free * UNIT} bytes of the GPU's memory for KV on its way are free, handoff_tokens says how many there are")
        offset = slot.start * UNIT if slot else 0
        told = msgspec.json.encode(Lease(self.driver.uuid, self._handle, offset, nbytes))
        try:
            lease = self.leases.reserve(len(told))
            lease.buffer[:] = told
            return CudaIpcPublication(self, slot, lease, DeviceBuffer(self.driver, self._memory + offset, nbytes))
        except OSError:
            if slot:
                self._slots.give_back(slot)
            raise

    def give_back(self, publication: CudaIpcPublication) -> None:
        """Make a range free again."""
        publication.forget()
        if publication.slot:
            self._slots.give_back(publication.slot)

    @contextmanager
    def pull(self, ticket: Ticket, shipment: list[bytes]) -> Iterator[DeviceBuffer]:
        """The KV in the GPU's memory; what is copied from it inside the context is the ticket's, if the context ends without an error."""
        if self.driver is None:
            raise TicketError("ticket.transport: cuda_ipc needs a GPU, this worker has none")
        file = self.leases.open(ticket)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.leases.gone(ticket) from None
            if not os.fstat(file).st_nlink:
                raise self.leases.gone(ticket)
            lease = self._lease(ticket, os.read(file, 1 << 16))
            owner = ticket.location.partition("/")[0]
            yield DeviceBuffer(self.driver, self._address(owner, lease, ticket) + lease.offset, lease.nbytes)
            if not self.leases.lives(owner):
                raise self._dead(ticket)
        finally:
            os.close(file)

    def _lease(self, ticket: Ticket, told: bytes) -> Lease:
        try:
            lease = msgspec.json.decode(told, type=Lease)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TicketError(f"ticket.location: {ticket.location} does not say where a GPU's KV lies: {error}") from error
        if lease.uuid != self.driver.uuid:
            raise TicketError(f"ticket.location: the KV of {ticket.location} lies on GPU {lease.uuid}, this worker runs on {self.driver.uuid}; "
                              "cuda_ipc is for prefill and decode on one GPU, shm for others")
        return lease

    def _address(self, owner: str, lease: Lease, ticket: Ticket) -> int:
        """Where a living publisher's allocation is here, opened once; those of dead ones are closed."""
        if not self.leases.lives(owner):
            raise self._dead(ticket)
        if owner not in self._opened:
            # First: what a dead one's handle led to is not to be taken for this one's.
            for other in [each for each in self._opened if not self.leases.lives(each)]:
                self._close(self._opened.pop(other))
            try:
                self._opened[owner] = self.driver.open(lease.handle)
            except DriverError as error:
                raise TicketError(f"ticket.location: the GPU's memory of {ticket.location} does not open here: {error}") from error
        return self._opened[owner]

    @staticmethod
    def _dead(ticket: Ticket) -> TicketError:
        return TicketError(f"ticket.location: the publisher of {ticket.location} has died, and the KV with it")

    def renew(self, ticket: Ticket) -> None:
        """See `Shm.renew`."""
        self.leases.renew(ticket)

    def release(self, ticket: Ticket) -> None:
        """See `Shm.release`; the publisher takes the memory back when it next needs some."""
        self.leases.release(ticket)

    def close(self) -> None:
        """End this publisher, with its leases, and close what others have exported. Its memory goes with the process: others may have it open."""
        own = self.leases.owner.name if self.room else None
        for owner, address in self._opened.items():
            if owner != own:
                self._close(address)
        if self.room:
            self.leases.clear()  # the memory that they lead to goes with this process
        self.leases.close()
        for publication in self.shipped:
            publication.forget()
        self._opened, self.shipped, self.room = {}, [], 0

    def _close(self, address: int) -> None:
        assert self.driver is not None
        with suppress(DriverError):  # of what a dead process has left
            self.driver.close(address)
