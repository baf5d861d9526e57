"""Transport ``shm``: the KV lies in a file of /dev/shm; only the ticket travels.

Layout: ``<root>/<owner>/<name>``, names of 128 random bits, modes 0700 and 0600; the second half of an owner's name is its server's.
The owner is the publishing process: it holds a lock on ``<owner>/.lock`` as long as it lives, so anyone can tell the remains of a dead
one (also across PID namespaces). A ticket's lease is its file's age since it was shipped: holders renew it by touching the file, the
owner deletes what nobody has touched for ``lease_s``. KV outlives its owner: a task's update or a killed process takes nothing from
requests that are past their prefill. What a dead owner leaves, anyone deletes when nobody has touched it for `LEASE_S`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sun.handoff.ticket import Ticket, TicketError
from sun.handoff.transport import Describe, Publication

LOCATION = re.compile(r"[0-9a-f]{32}/[0-9a-f]{32}")
FILE = re.compile(r"[0-9a-f]{32}")
FOLDER = re.compile(r"(\.new-)?[0-9a-f]{32}")
"""What owners call their folders; whatever else lies in the root is somebody else's."""
SERVER = "SUN_SHM_SERVER"
"""The environment variable with the 64 random bits (hex) that name a server: at its end it deletes what its own owners have left, leased or not."""
LOCK = ".lock"
LEASE_S = 60.0
RESERVE = 16 << 20
"""Bytes of /dev/shm, or an eighth of a smaller one, that KV leaves free: Triton's regions grow there, and its calls fail where they cannot."""
TRIES = 50
"""At opening the root, which the last owner that closes removes at any time."""
log = logging.getLogger("sun.handoff")


def default_root() -> Path:
    """Where this user's KV lies: ``$SUN_SHM``, else a folder of /dev/shm."""
    return Path(os.environ.get("SUN_SHM") or f"/dev/shm/sun-kv-{os.getuid()}")


def published(root: Path | None = None) -> list[Path]:
    """The KV that lies there, of all owners; released KV does not."""
    return [path for path in (root or default_root()).glob("*/*") if path.name != LOCK]


def room(place: Path | int) -> tuple[int, int]:
    """Bytes that KV may still take where ``place`` (a path or an open file) lies, and bytes that are kept from it."""
    found = os.statvfs(place)
    if not found.f_blocks:  # a tmpfs without a limit tells no size
        return sys.maxsize, 0
    kept = min(RESERVE, found.f_blocks * found.f_frsize // 8)
    return max(0, found.f_bavail * found.f_frsize - kept), kept


class ShmPublication:
    """A file being filled."""

    def __init__(self, path: Path, nbytes: int, filling: set[str]):
        self.path, self.location = path, f"{path.parent.name}/{path.name}"
        self._filling = filling
        # Before it is there: writes through a mapping do not make a file of tmpfs younger, and filling may take longer than a lease.
        filling.add(path.name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError:
            filling.discard(path.name)
            raise
        try:
            if nbytes:
                there, kept = room(fd)
                if nbytes > there:
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {nbytes} bytes are more than the {there} that are free, beside {kept} kept for Triton's calls")
                # Take the pages now: past /dev/shm's size a later write would kill the process with SIGBUS.
                os.posix_fallocate(fd, 0, nbytes)
            self.buffer = memoryview(mmap.mmap(fd, nbytes)) if nbytes else memoryview(bytearray())
            os.utime(fd, (0, 0))  # no lease yet: if its owner dies before it ships, it goes at once
        except OSError:
            self.drop()
            raise
        finally:
            os.close(fd)

    def ship(self, describe: Describe) -> list[bytes]:
        """Start the lease and return the ticket's JSON."""
        shipment = [msgspec.json.encode(describe(self.buffer, Shm.name, self.location))]
        self.buffer = memoryview(b"")
        os.utime(self.path)
        self._filling.discard(self.path.name)
        return shipment

    def drop(self) -> None:
        """Delete the file."""
        self.buffer = memoryview(b"")
        self.path.unlink(missing_ok=True)
        self._filling.discard(self.path.name)


class Shm:
    """See the module. ``publisher`` makes this process an owner, with a thread that ends leases.

    most: bytes of KV that the owner may have outstanding, published and neither released nor expired; 0 for no limit. `reserve` is for one thread.
    """

    name = "shm"

    def __init__(self, root: Path | None = None, publisher: bool = False, lease_s: float = LEASE_S, most: int = 0):
        self.root, self.lease_s, self.most = root or default_root(), lease_s, most
        self._held: dict[str, int] = {}
        self._outstanding = 0
        self._filling: set[str] = set()
        self.owner: Path | None = None
        self._stop = threading.Event()
        for left in reversed(range(TRIES)):
            try:
                self._open_root()
                if publisher:
                    self._become_owner()
                break
            except (FileNotFoundError, FileExistsError):
                if not left:
                    raise

    def _open_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link of the operator's own making may lead elsewhere, but in /dev/shm anybody can make one.
        found = self.root.stat() if os.environ.get("SUN_SHM") else self.root.lstat()
        if found.st_uid != os.getuid() or stat.S_ISLNK(found.st_mode):
            raise PermissionError(f"{self.root} belongs to another user, or is a link; set SUN_SHM to a folder of your own")
        self.sweep()

    def _become_owner(self) -> None:
        # Lock first, name second: a folder under its final name is always locked or dead.
        fresh = self.root / f".new-{secrets.token_hex(16)}"
        fresh.mkdir(mode=0o700)
        self._lock = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        server = os.environ.get(SERVER, "")
        self.owner = fresh.rename(self.root / (secrets.token_hex(8) + (server if re.fullmatch("[0-9a-f]{16}", server) else secrets.token_hex(8))))
        self._reaper = threading.Thread(target=self._reap, name="kv-leases", daemon=True)
        self._reaper.start()

    def _reap(self) -> None:
        while not self._stop.wait(min(1.0, self.lease_s / 4)):
            try:
                self.expire()
                self.sweep()
            except OSError:  # the next round may do better; without this thread no lease would ever end
                log.exception("could not end leases in %s", self.root)

    def expire(self) -> int:
        """Delete this owner's files that nobody touched for ``lease_s`` seconds since they were shipped; returns how many."""
        return _expire(self.owner, self.lease_s, self._filling) if self.owner is not None else 0

    def sweep(self, server: str = "") -> int:
        """Delete the folders of owners that no longer live, once no lease in them runs; returns how many. server: one whose leases do not count."""
        swept = 0
        with suppress(FileNotFoundError):  # the last owner may remove the root at any time
            for entry in os.scandir(self.root):
                if FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # renamed by its maker, or swept by another process
                        swept += _sweep(Path(entry.path), 0.0 if server and entry.name.endswith(server) else LEASE_S)
        return swept

    def clear(self) -> None:
        """End the leases of all that this owner has published."""
        if self.owner is not None:
            _expire(self.owner, 0.0)

    def close(self) -> None:
        """End this owner, and the root too if it was the last and nothing is left. What is leased stays until its lease ends."""
        self._stop.set()
        if self.owner is not None:
            self._reaper.join()
            for name in list(self._filling):
                (self.owner / name).unlink(missing_ok=True)
            os.close(self._lock)
            with suppress(OSError):  # something is leased, or somebody has swept it
                os.unlink(self.owner / LOCK)
                self.owner.rmdir()
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
        publication = ShmPublication(self.owner / secrets.token_hex(16), nbytes, self._filling)
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


def _expire(folder: Path, lease_s: float, spared: Collection[str] = ()) -> int:
    """Delete a folder's KV that nobody touched for ``lease_s`` seconds; returns how many files."""
    expired = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            ours = FILE.fullmatch(entry.name) and entry.name not in spared and entry.is_file(follow_symlinks=False)
            if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime >= lease_s:
                os.unlink(entry.path)
                expired += 1
    return expired


def _sweep(folder: Path, lease_s: float) -> bool:
    """Delete what a dead owner's folder has left and nobody renews, and the folder when it is empty; whether it is gone."""
    making = folder.name.startswith(".new-")
    fresh = time.time() - folder.stat().st_mtime < LEASE_S
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if making:
            if not fresh:  # its maker died between two calls
                shutil.rmtree(folder, ignore_errors=True)
            return False
    else:
        try:
            if making and fresh:  # its maker is about to lock it
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(folder / LOCK)  # so that nobody takes this lock for a living owner's
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
    _expire(folder, lease_s)
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
