"""KV that lies in a device's memory. Needs torch only when it is looked at, so that who passes tickets on needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 1 << 22
"""64-bit words that a checksum takes at a time: it needs twice their memory."""


class Driver(Protocol):
    """A device's memory, shared between processes. Errors are `DriverError`.

    uuid: the device's, the same in every process.
    """

    uuid: str

    def allocate(self, nbytes: int) -> int:
        """The address of memory of this process's own, which can be exported; it has it until it ends."""

    def export(self, address: int) -> bytes:
        """What another process opens it with."""

    def open(self, handle: bytes) -> int:
        """The address here of what another process has exported."""

    def close(self, address: int) -> None:
        """Undo `open`."""

    def wait(self) -> None:
        """Until the device has done all that this process gave it."""

    def tensor(self, address: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] over the memory, on its device, without a copy."""


class DriverError(RuntimeError):
    """What a device's driver refused."""


class DeviceBuffer:
    """``nbytes`` at an address of a device."""

    def __init__(self, driver: Driver, address: int, nbytes: int):
        self.driver, self.address, self.nbytes = driver, address, nbytes

    def tensor(self) -> Tensor:
        """uint8 [nbytes] on its device, without a copy."""
        return self.driver.tensor(self.address, self.nbytes)

    def checksum(self) -> str:
        """The sum of the buffer's 64-bit words, each times an odd number of its place's, modulo 2^64; computed on the device.

        So a change of any one word is always seen, and others but for one in some 2^64. It guards against faults, not against forgery.
        """
        import torch

        if not self.nbytes:
            return "sum64:0"
        words = self.tensor().view(torch.int64)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for at in range(0, len(words), WORDS):
            part = words[at : at + WORDS]
            total += (torch.arange(2 * at + 1, 2 * (at + len(part)) + 1, 2, device=words.device) * part).sum()
        return f"sum64:{int(total) % (1 << 64):x}"
