"""A GPU's memory where there is none: files that processes map, behind the same interface."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from sun.handoff.device import DriverError

APART = 1 << 32
"""Between the addresses of two allocations."""


class StandIn:
    """A `sun.handoff.device.Driver` of the files of ``folder``. As a GPU's, memory dies with the process that allocated it."""

    def __init__(self, folder: Path, uuid: str = "stand-in"):
        self.folder, self.uuid = folder, uuid
        self.opened: list[bytes] = []
        self._memory: dict[int, mmap.mmap] = {}
        self._names: dict[int, str] = {}
        self._next = APART

    def _map(self, name: str, file: int) -> int:
        address, self._next = self._next, self._next + APART
        self._memory[address], self._names[address] = mmap.mmap(file, os.fstat(file).st_size), name
        return address

    def allocate(self, nbytes: int) -> int:
        """See `Driver.allocate`. Its file is locked as long as this process lives."""
        name = secrets.token_hex(16)
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(file, nbytes)
        fcntl.flock(file, fcntl.LOCK_EX)
        return self._map(name, file)

    def export(self, address: int) -> bytes:
        """See `Driver.export`."""
        return self._names[address].encode()

    def open(self, handle: bytes) -> int:
        """See `Driver.open`."""
        try:
            file = os.open(self.folder / handle.decode(), os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise DriverError(f"open: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            self.opened.append(handle)
            return self._map(handle.decode(), file)
        finally:
            os.close(file)
        raise DriverError("open: whose memory it was is dead")

    def close(self, address: int) -> None:
        """See `Driver.close`."""
        del self._memory[address]

    def wait(self) -> None:
        """See `Driver.wait`; a CPU is never behind."""

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """See `Driver.tensor`."""
        start = address // APART * APART
        return torch.frombuffer(self._memory[start], dtype=torch.uint8, count=nbytes, offset=address - start)
