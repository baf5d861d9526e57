"""Prefill modules and decode workers of this server, reached through Triton's business logic scripting (BLS), but for the workers' events."""

import os
from collections.abc import Iterator

import numpy as np
import triton_python_backend_utils as pb_utils

from sun.events import hear
from sun.messages import NO_STEPS, Abort, Ack, Admit, GetStats, Reply, Request, Stats, StepEvents, decode_reply, encode
from sun.router.errors import Gone
from sun.stubs import Stubs
from sun_router.calls import Calls

ANSWER_S = 10.0
"""A worker answers at once; one that takes so long hangs."""
HEARTBEAT_S = 1.5
"""The same for a heartbeat. Neither a step nor a pull holds its answer up: with steps of 1.7 to 2.7 s, at nice 19 on two cores that others filled, the
longest of 600 answers of an engine to another process took 64 ms. Its events are no sign of life: they come once a step."""


class BlsFleet:
    """A `sun.router.fleet.Fleet`. Calls block and may be made from any thread."""

    def __init__(self):
        self._stubs = Stubs(os.getppid())
        self._calls = Calls(self._stubs)

    def prefill(self, task: str, ids: list[int]) -> list[bytes]:
        """See `Fleet.prefill`."""
        tensor = pb_utils.Tensor("input_ids", np.array(ids, dtype=np.int64))
        return self._calls.call(f"prefill_{task}", tensor, "ticket")

    def present(self, task: str) -> bool:
        """See `Fleet.present`."""
        return bool(self._stubs.pids(f"prefill_{task}"))

    def admit(self, worker: str, admit: Admit, shipment: list[bytes]) -> Ack:
        """See `Fleet.admit`."""
        return self._ask(worker, admit, shipment)

    def abort(self, worker: str, ids: list[str]) -> Ack:
        """See `Fleet.abort`."""
        return self._ask(worker, Abort(ids=ids))

    def stats(self, worker: str) -> Stats:
        """See `Fleet.stats`."""
        try:
            return self._ask(worker, GetStats(after=NO_STEPS), timeout=HEARTBEAT_S)
        except Gone:
            # Triton, by whose word `Calls` kills a stopped process, may give its call up only after this time.
            self._stubs.kill(worker, self._stubs.stopped(self._stubs.pids(worker)))
            raise

    def listen(self, worker: str, router: str) -> Iterator[StepEvents]:
        """See `Fleet.listen`."""
        pids = self._stubs.pids(worker)
        if not pids:
            raise Gone(f"{worker}: has no process")
        try:
            for pid in pids:  # one: a worker's model has one instance
                yield from hear(pid, router)
        except (OSError, EOFError) as error:
            raise Gone(f"{worker}: its events broke off ({error or type(error).__name__})") from error

    def _ask(self, worker: str, request: Request, shipment: list[bytes] = [], timeout: float = ANSWER_S) -> Reply:
        (reply,) = self._calls.call(worker, message(request, shipment), "reply", timeout=timeout)
        return decode_reply(reply)


def message(request: Request, shipment: list[bytes] = []):
    """A decode worker's input tensor `message`."""
    return pb_utils.Tensor("message", np.array([encode(request), *shipment], dtype=np.object_))
