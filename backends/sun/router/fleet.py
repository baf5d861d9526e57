"""What the router needs of the world: prefill modules and decode workers. BLS in Triton, plain objects in tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sun.messages import Ack, Admit, Stats, StepEvents


class Fleet(Protocol):
    """Calls block; they raise RequestError, Absent where the other side is not there, and Gone when it dies meanwhile or hangs."""

    def prefill(self, task: str, ids: list[int]) -> list[bytes]:
        """Run x1..x(n-1) through the task's prefill module; the shipment with its ticket."""

    def present(self, task: str) -> bool:
        """Whether the task's prefill module has a process, which may still be loading. Returns at once."""

    def admit(self, worker: str, admit: Admit, shipment: list[bytes]) -> Ack:
        """Hand a sequence to a decode worker."""

    def abort(self, worker: str, ids: list[str]) -> Ack:
        """Make a worker drop sequences."""

    def stats(self, worker: str) -> Stats:
        """A worker's state, without steps: its heartbeat."""

    def listen(self, worker: str, router: str) -> Iterator[StepEvents]:
        """This router's events from a worker, until it has no sequence left there."""
