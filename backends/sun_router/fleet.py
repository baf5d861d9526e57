"""Prefill modules and decode workers of this server, reached through Triton's business logic scripting (BLS)."""

from collections.abc import Iterator

import numpy as np
import triton_python_backend_utils as pb_utils

from sun.messages import Abort, Ack, Admit, Listen, Request, StepEvents, decode_reply, encode
from sun.router.errors import RequestError

class BlsFleet:
    """A `sun.router.fleet.Fleet`. Calls block and may be made from any thread."""

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
        for replies in self._call(worker, message(Listen(router=router), []), "reply"):
            yield from map(decode_reply, replies)

    def _ask(self, worker: str, request: Request, shipment: list[bytes]) -> Ack:
        ((reply,),) = self._call(worker, message(request, shipment), "reply")
        return decode_reply(reply)

    def _call(self, model: str, tensor, output: str, decoupled: bool = True) -> Iterator[list[bytes]]:
        """The responses' ``output`` tensors; RequestError for an error response."""
        request = pb_utils.InferenceRequest(model_name=model, requested_output_names=[output], inputs=[tensor])
        responses = request.exec(decoupled=True) if decoupled else [request.exec()]
        for response in responses:
            if response.has_error():
                error = response.error()
                raise RequestError(router_code(error.code()), f"{model}: {error.message()}")
            if response.output_tensors():
                yield [bytes(part) for part in response.output_tensors()[0].as_numpy().reshape(-1)]


def message(request: Request, shipment: list[bytes]):
    """A decode worker's input tensor `message`."""
    return pb_utils.Tensor("message", np.array([encode(request), *shipment], dtype=np.object_))


def router_code(code: int) -> str:
    """What a called model's error means to our client: its own fault, a model that is not there (now), or ours."""
    kind = pb_utils.TritonError
    return {kind.INVALID_ARG: "INVALID_ARG", kind.UNAVAILABLE: "UNAVAILABLE", kind.NOT_FOUND: "UNAVAILABLE"}.get(code, "INTERNAL")
