"""Transport ``shm``: the KV lies in a file of /dev/shm; only the ticket travels.

Layout: ``<root>/<owner>/<name>``, names of 128 random bits, modes 0700 and 0600. The owner is the publishing process:
it holds a lock on ``<owner>/.lock`` as long as it lives, so anyone can tell the remains of a dead one (also across PID
namespaces) and sweep them. A ticket's lease is its file's age: holders renew it by touching the file, the owner
deletes what nobody has touched for ``lease_s``.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sun.handoff.ticket import Ticket, TicketError
from sun.handoff.transport import Describe, Publication

LOCATION = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}")
LOCK = ".lock"
LEASE_S = 60.0


def default_root() -> Path:
    """Where this user's KV lies: ``$SUN_SHM``, else a folder of /dev/shm."""
    return Path(os.environ.get("SUN_SHM") or f"/dev/shm/sun-kv-{os.getuid()}")


def published(root: Path | None = None) -> list[Path]:
    """The KV that lies there, of all owners; released KV does not."""
    return [path for path in (root or default_root()).glob("*/*") if path.name != LOCK]


class ShmPublication:
    """A file being filled."""

    def __init__(self, path: Path, nbytes: int):
        self.path, self.location = path, f"{path.parent.name}/{path.name}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            if nbytes:
                # Take the pages now: past /dev/shm's size a later write would kill the process with SIGBUS.
                os.posix_fallocate(fd, 0, nbytes)
            self.buffer = memoryview(mmap.mmap(fd, nbytes)) if nbytes else memoryview(bytearray())
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)

    def ship(self, describe: Describe) -> list[bytes]:
        """Start the lease and return the ticket's JSON."""
        shipment = [msgspec.json.encode(describe(self.buffer, Shm.name, self.location))]
        self.buffer = memoryview(b"")
        with suppress(FileNotFoundError):
            os.utime(self.path)
        return shipment

    def drop(self) -> None:
        """Delete the file."""
        self.buffer = memoryview(b"")
        self.path.unlink(missing_ok=True)


class Shm:
    """See the module. ``publisher`` makes this process an owner, with a thread that ends leases.

    most: bytes of KV that the owner may have outstanding, published and neither released nor expired; 0 for no limit. `reserve` is for one thread.
    """

    name = "shm"

    def __init__(self, root: Path | None = None, publisher: bool = False, lease_s: float = LEASE_S, most: int = 0):
        self.root, self.lease_s, self.most = root or default_root(), lease_s, most
        self._held: dict[str, int] = {}
        self._outstanding = 0
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.root.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.root} belongs to another user; set SUN_SHM to a folder of your own")
        self.sweep()
        self.owner: Path | None = None
        self._stop = threading.Event()
        if publisher:
            self._become_owner()

    def _become_owner(self) -> None:
        # Lock first, name second: a folder under its final name is always locked or dead.
        fresh = self.root / f".new-{secrets.token_hex(16)}"
        fresh.mkdir(mode=0o700, parents=True)  # another process may just have removed the empty root
        self._lock = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.owner = fresh.rename(self.root / secrets.token_hex(16))
        self._reaper = threading.Thread(target=self._reap, name="kv-leases", daemon=True)
        self._reaper.start()

    def _reap(self) -> None:
        while not self._stop.wait(min(1.0, self.lease_s / 4)):
            self.expire()
            self.sweep()

    def expire(self) -> int:
        """Delete this owner's files that nobody touched for ``lease_s`` seconds; returns how many."""
        expired = 0
        for entry in os.scandir(self.owner):
            with suppress(FileNotFoundError):
                if entry.name != LOCK and time.time() - entry.stat().st_mtime > self.lease_s:
                    os.unlink(entry.path)
                    expired += 1
        return expired

    def sweep(self) -> int:
        """Delete the folders of owners that no longer live; returns how many."""
        swept = 0
        with suppress(FileNotFoundError):  # the last owner may remove the root at any time
            for folder in self.root.iterdir():
                with suppress(FileNotFoundError):  # renamed by its maker, or swept by another process
                    swept += self._sweep(folder)
        return swept

    @staticmethod
    def _sweep(folder: Path) -> bool:
        fresh = time.time() - folder.stat().st_mtime < 60
        try:
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if not fresh:  # not being made: its maker died between two calls
                shutil.rmtree(folder, ignore_errors=True)
            return False
        try:
            if fresh and folder.name.startswith(".new-"):  # its maker is about to lock it
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(folder / LOCK)  # first, so that nobody takes this lock for a living owner's
            shutil.rmtree(folder, ignore_errors=True)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)

    def close(self) -> None:
        """End this owner: its tickets disappear, and the root too if it was the last."""
        self._stop.set()
        if self.owner is not None:
            self._reaper.join()
            shutil.rmtree(self.owner, ignore_errors=True)
            os.close(self._lock)
            self.owner = None
        with suppress(OSError):
            self.root.rmdir()

    def reserve(self, nbytes: int) -> Publication:
        """A new file of ``nbytes``. Raises OSError: ENOSPC if /dev/shm has no room for it, EDQUOT if too much of this owner's is outstanding."""
        if self.owner is None:
            raise RuntimeError("this Shm transport was not opened as a publisher")
        size = max(nbytes, mmap.PAGESIZE)  # a file without KV takes memory, too
        if self.most and self._outstanding + size > self.most:
            self._forget_released()
            if self._outstanding + size > self.most:
                raise OSError(errno.EDQUOT, f"max_ticket_tokens: {self._outstanding} bytes of earlier prompts' KV are outstanding, {size} more are over the limit of {self.most}")
        publication = ShmPublication(self.owner / secrets.token_hex(16), nbytes)
        if self.most:  # without a limit nobody would ever forget what is released
            self._held[publication.path.name] = size
            self._outstanding += size
        return publication

    def _forget_released(self) -> None:
        """Whoever releases a ticket deletes its file, and tells nobody."""
        there = set(os.listdir(self.owner))
        self._held = {name: size for name, size in self._held.items() if name in there}
        self._outstanding = sum(self._held.values())

    def _path(self, ticket: Ticket) -> Path:
        if LOCATION.fullmatch(ticket.location) is None:
            raise TicketError(f"ticket.location: {ticket.location!r} is not a shared-memory location")
        return self.root / ticket.location

    def lives(self, owner: str) -> bool:
        """Whether the publisher of this name does: it holds a lock."""
        try:
            fd = os.open(self.root / owner / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return os.fstat(fd).st_nlink > 0
        finally:
            os.close(fd)

    def gone(self, ticket: Ticket) -> TicketError:
        """The error for a ticket whose file is no longer there."""
        return TicketError(f"ticket.location: {ticket.location} is gone (released, or its lease of {self.lease_s:g} s ended)")

    def open(self, ticket: Ticket) -> int:
        """A descriptor of the ticket's file, to read. Raises TicketError if it is gone."""
        try:
            return os.open(self._path(ticket), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self.gone(ticket) from None

    @contextmanager
    def pull(self, ticket: Ticket, shipment: list[bytes]) -> Iterator[memoryview]:
        """The file's bytes, mapped."""
        fd = self.open(ticket)
        try:
            size = os.fstat(fd).st_size
            mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ) if size else None
        finally:
            os.close(fd)
        # Unmapped when the last view of it goes; closing here would fail while a tensor still looks at it.
        yield memoryview(mapped) if mapped is not None else memoryview(b"")

    def renew(self, ticket: Ticket) -> None:
        """Touch the file."""
        with suppress(FileNotFoundError):
            os.utime(self._path(ticket))

    def release(self, ticket: Ticket) -> None:
        """Delete the file."""
        self._path(ticket).unlink(missing_ok=True)
