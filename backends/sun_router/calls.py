"""One call of another model through Triton's business logic scripting (BLS), that ends when the model's process does."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator

import triton_python_backend_utils as pb_utils

from sun import door
from sun.handoff.transport import NO_ROOM
from sun.router.errors import Absent, Gone, RequestError
from sun.stubs import Holders, Stubs

KEPT_S = 10.0
"""How long an answered call's response iterator is kept."""
NOT_READY = "is not ready"
"""Triton's words for a model that is being loaded; its code, UNAVAILABLE, is also that of a server that is stopping."""
GIVEN_UP = ("is not healthy", "Failed to obtain the health mutex")
"""Triton's words for a call that it has given up, since the process has not run for a second."""
LOOK_S = 0.25
"""How often a call looks whether the process that should answer it lives."""


class Calls:
    """Makes calls. They block, and may be made from any thread.

    Triton never ends a call of a process that has died, and a blocked call cannot be taken back. So each is made in a thread of its
    own, which is left behind when the process is gone.

    A process that was stopped for a while must not go on: Triton has freed the calls that it gave up meanwhile, in the memory that
    it shares with the process, which would answer them all the same; tritonserver then aborts (24.10). So it is killed.
    """

    def __init__(self, stubs: Stubs):
        self._stubs = stubs
        # When a decoupled call's iterator ends, a C++ thread of Triton's stub removes its own reference to it, without Python's
        # lock. If that is the last one, it frees numpy arrays while other threads run Python: counts of references go wrong and
        # the stub dies after some thousand calls, and all streams hang (Triton 24.10). So ours must be the last one.
        self._answered: deque[tuple[float, object]] = deque()
        self._lock = threading.Lock()

    def call(self, model: str, tensor, output: str, decoupled: bool = True, timeout: float | None = None) -> Iterator[list[bytes]]:
        """The responses' ``output`` tensors, as their elements. timeout: seconds to wait for each response.

        Raises RequestError for an error response; Absent if the model is not loaded; Gone if it loses its process meanwhile, or does not
        answer in time, or so late that Triton has given it up.
        """
        holders = Holders(self._stubs, model)
        if not holders.pids:
            raise Absent(f"{model}: has no process")
        answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(model, tensor, output, decoupled, answers), name=f"call-{model}", daemon=True).start()
        answered = False
        while True:
            kind, value = self._next(answers, model, holders, timeout)
            if kind == "error" and holders.lost(answered=True):
                raise Gone(f"{model}: its process died ({value})")
            if kind == "error" and any(words in str(value) for words in GIVEN_UP):
                self._stubs.kill(model, holders.pids)
                raise Gone(f"{model}: its process does not run, and is killed ({value})")
            if kind == "error":
                raise value
            if kind == "end" and not answered:  # what Triton makes of some calls whose process dies
                raise Gone(f"{model}: ended without an answer")
            if kind == "end":
                return
            answered = True
            yield value

    def _next(self, answers: queue.SimpleQueue, model: str, holders: Holders, timeout: float | None) -> tuple[str, object]:
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

    def _run(self, model: str, tensor, output: str, decoupled: bool, answers: queue.SimpleQueue) -> None:
        try:
            for values in self._responses(model, tensor, output, decoupled):
                answers.put(("values", values))
        except Exception as error:  # the caller's
            answers.put(("error", error))
        else:
            answers.put(("end", None))

    def _responses(self, model: str, tensor, output: str, decoupled: bool) -> Iterator[list[bytes]]:
        request = pb_utils.InferenceRequest(model_name=model, requested_output_names=[output], inputs=[tensor], parameters=door.pass_on())
        responses = request.exec(decoupled=True) if decoupled else [request.exec()]
        error = None
        for response in responses:
            if response.has_error():
                error = response.error()
            elif response.output_tensors():
                yield [bytes(part) for part in response.output_tensors()[0].as_numpy().reshape(-1)]
        if decoupled:
            self._keep(responses)
        if error is not None and NOT_READY in error.message():
            raise Absent(f"{model}: {error.message()}")
        if error is not None and NO_ROOM in error.message():  # its code is lost where the called model is not decoupled (Triton 24.10)
            raise RequestError("UNAVAILABLE", f"{model}: {error.message()}")
        if error is not None:
            raise RequestError(router_code(error.code()), f"{model}: {error.message()}")

    def _keep(self, iterator: object) -> None:
        """Hold on to an iterator until Triton's stub has surely let it go."""
        now = time.monotonic()
        with self._lock:
            self._answered.append((now, iterator))
            while self._answered[0][0] < now - KEPT_S:
                self._answered.popleft()


def router_code(code: int) -> str:
    """What a called model's error means to our client: its own fault, a model that is not there (now), or ours."""
    kind = pb_utils.TritonError
    return {kind.INVALID_ARG: "INVALID_ARG", kind.UNAVAILABLE: "UNAVAILABLE", kind.NOT_FOUND: "UNAVAILABLE"}.get(code, "INTERNAL")
