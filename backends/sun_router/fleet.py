"""Prefill modules and decode workers of this server, reached through Triton's business logic scripting (BLS)."""

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import triton_python_backend_utils as pb_utils

from sun.messages import Abort, Ack, Admit, Listen, Request, StepEvents, decode_reply, encode
from sun.router.errors import RequestError

KEPT_S = 10.0
"""How long an answered call's response iterator is kept."""
LISTEN_RESPONSES = 256
"""Responses of one `Listen`: its iterator holds all of them, in shared memory too, until it is let go."""


class BlsFleet:
    """A `sun.router.fleet.Fleet`. Calls block and may be made from any thread."""

    def __init__(self):
        # When a decoupled call's iterator ends, a C++ thread of Triton's stub removes its own reference to it, without Python's
        # lock. If that is the last one, it frees numpy arrays while other threads run Python: counts of references go wrong and
        # the stub dies after some thousand calls, and all streams hang (Triton 24.10). So ours must be the last one.
        self._answered: deque[tuple[float, object]] = deque()
        self._lock = threading.Lock()

    def prefill(self, task: str, ids: list[int]) -> list[bytes]:
        """See `Fleet.prefill`."""
        tensor = pb_utils.Tensor("input_ids", np.array(ids, dtype=np.int64))
        (shipment,) = self._call(f"prefill_{task}", tensor, "ticket", decoupled=False)
        return shipment

    def admit(self, worker: str, admit: Admit, shipment: list[bytes]) -> Ack:
        """See `Fleet.admit`."""
        return self._ask(worker, admit, shipment)

    def abort(self, worker: str, ids: list[str]) -> Ack:
        """See `Fleet.abort`."""
        return self._ask(worker, Abort(ids=ids), [])

    def listen(self, worker: str, router: str) -> Iterator[StepEvents]:
        """See `Fleet.listen`."""
        responses = LISTEN_RESPONSES
        while responses == LISTEN_RESPONSES:
            responses = 0
            for replies in self._call(worker, message(Listen(router=router, most=LISTEN_RESPONSES), []), "reply"):
                responses += 1
                yield from map(decode_reply, replies)

    def _ask(self, worker: str, request: Request, shipment: list[bytes]) -> Ack:
        ((reply,),) = self._call(worker, message(request, shipment), "reply")
        return decode_reply(reply)

    def _call(self, model: str, tensor, output: str, decoupled: bool = True) -> Iterator[list[bytes]]:
        """The responses' ``output`` tensors; RequestError for an error response."""
        request = pb_utils.InferenceRequest(model_name=model, requested_output_names=[output], inputs=[tensor])
        responses = request.exec(decoupled=True) if decoupled else [request.exec()]
        error = None
        try:
            for response in responses:
                if response.has_error():
                    error = response.error()
                elif response.output_tensors():
                    yield [bytes(part) for part in response.output_tensors()[0].as_numpy().reshape(-1)]
        finally:
            if decoupled:
                self._keep(responses)
        if error is not None:
            raise RequestError(router_code(error.code()), f"{model}: {error.message()}")

    def _keep(self, iterator: object) -> None:
        """Hold on to an iterator until Triton's stub has surely let it go."""
        now = time.monotonic()
        with self._lock:
            self._answered.append((now, iterator))
            while self._answered[0][0] < now - KEPT_S:
                self._answered.popleft()


def message(request: Request, shipment: list[bytes]):
    """A decode worker's input tensor `message`."""
    return pb_utils.Tensor("message", np.array([encode(request), *shipment], dtype=np.object_))


def router_code(code: int) -> str:
    """What a called model's error means to our client: its own fault, a model that is not there (now), or ours."""
    kind = pb_utils.TritonError
    return {kind.INVALID_ARG: "INVALID_ARG", kind.UNAVAILABLE: "UNAVAILABLE", kind.NOT_FOUND: "UNAVAILABLE"}.get(code, "INTERNAL")
