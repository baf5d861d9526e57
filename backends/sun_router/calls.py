"""One call of another model through Triton's business logic scripting (BLS), that ends when the model's process does."""

from __future__ import annotations

import queue
import threading

import triton_python_backend_utils as pb_utils

from sun import door
from sun.handoff.transport import NO_ROOM
from sun.router.errors import Absent, Gone, RequestError
from sun.stubs import Holders, Stubs

NOT_READY = "is not ready"
"""Triton's words for a model that is being loaded; its code, UNAVAILABLE, is also that of a server that is stopping."""
GIVEN_UP = ("is not healthy", "Failed to obtain the health mutex")
"""Triton's words for a call that it has given up, since the process has not run for a second."""
LOOK_S = 0.25
"""How often a call looks whether the process that should answer it lives."""


class Calls:
    """Makes calls. They block, and may be made from any thread.

    Triton may never end a call of a process that has died, and a blocked call cannot be taken back. So each is made in a thread of its
    own, which is left behind when the process is gone.

    A process that was stopped for a while must not go on: Triton has freed the calls that it gave up meanwhile, in the memory that
    it shares with the process, which would answer them all the same; tritonserver then aborts (24.10). So it is killed.
    """

    def __init__(self, stubs: Stubs):
        self._stubs = stubs

    def call(self, model: str, tensor, output: str, timeout: float | None = None) -> list[bytes]:
        """The elements of its response's ``output`` tensor. timeout: seconds to wait for it.

        Raises RequestError for an error response; Absent if the model is not loaded; Gone if it loses its process meanwhile, or does not
        answer in time, or so late that Triton has given it up.
        """
        holders = Holders(self._stubs, model)
        if not holders.pids:
            raise Absent(f"{model}: has no process")
        answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(model, tensor, output, answers), name=f"call-{model}", daemon=True).start()
        answer = self._next(answers, model, holders, timeout)
        if not isinstance(answer, Exception):
            return answer
        if holders.lost(answered=True):
            raise Gone(f"{model}: its process died ({answer})")
        if any(words in str(answer) for words in GIVEN_UP):
            self._stubs.kill(model, holders.pids)
            raise Gone(f"{model}: its process does not run, and is killed ({answer})")
        raise answer

    def _next(self, answers: queue.SimpleQueue, model: str, holders: Holders, timeout: float | None) -> list[bytes] | Exception:
        waited = 0.0
        while True:
            try:
                return answers.get(timeout=LOOK_S)
            except queue.Empty:
                waited += LOOK_S
            if holders.lost():
                raise Gone(f"{model}: its process died")
            if timeout is not None and waited >= timeout:
                raise Gone(f"{model}: no answer for {timeout:g} s")

    def _run(self, model: str, tensor, output: str, answers: queue.SimpleQueue) -> None:
        try:
            answers.put(self._response(model, tensor, output))
        except Exception as error:  # the caller's
            answers.put(error)

    def _response(self, model: str, tensor, output: str) -> list[bytes]:
        response = pb_utils.InferenceRequest(model_name=model, requested_output_names=[output], inputs=[tensor], parameters=door.pass_on()).exec()
        if not response.has_error():
            if not response.output_tensors():  # what Triton makes of some calls whose process dies
                raise Gone(f"{model}: ended without an answer")
            return [bytes(part) for part in response.output_tensors()[0].as_numpy().reshape(-1)]
        error = response.error()
        if NOT_READY in error.message():
            raise Absent(f"{model}: {error.message()}")
        if NO_ROOM in error.message():  # the code of an error that a prefill module's thread sends is lost (Triton 24.10)
            raise RequestError("UNAVAILABLE", f"{model}: {error.message()}")
        raise RequestError(router_code(error.code()), f"{model}: {error.message()}")


def router_code(code: int) -> str:
    """What a called model's error means to our client: its own fault, a model that is not there (now), or ours."""
    kind = pb_utils.TritonError
    return {kind.INVALID_ARG: "INVALID_ARG", kind.UNAVAILABLE: "UNAVAILABLE", kind.NOT_FOUND: "UNAVAILABLE"}.get(code, "INTERNAL")
