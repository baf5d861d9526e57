"""A Triton client on the other end of a response sender."""

import json
import threading

import numpy as np
import triton_python_backend_utils as pb_utils

from sun.router.request import OUTPUTS

# Triton has no codes for these; the others' names are its own.
CODES = {"DEADLINE": "CANCELLED", "UNAUTHENTICATED": "INVALID_ARG", "PERMISSION_DENIED": "INVALID_ARG"}


class TritonClient:
    """A `sun.router.active.Client`: pieces become responses.

    returns: the outputs that it wants. codes: whether its errors are to begin with their code, as in "[NOT_FOUND] task: ...": over gRPC
    streams Triton tells an error's text alone.
    """

    def __init__(self, request):
        self.returns, self.codes = frozenset(), False
        self._sender = request.get_response_sender()
        # Triton frees the request with its last response: asking for its cancellation meanwhile or after crashes the server.
        self._lock = threading.Lock()
        self._ended = False

    def send(self, piece):
        """Send one response; the stream ends with the piece that has a finish reason."""
        optional = {
            "finish_reason": [(piece.finish_reason or "").encode()], "num_input_tokens": [piece.num_input_tokens],
            "num_output_tokens": [len(piece.token_ids)], "token_ids": piece.token_ids,
            "logprobs": [json.dumps(piece.logprobs).encode()],
        }
        values = {"text_output": [piece.text.encode()], **{name: optional[name] for name in self.returns}}
        tensors = [pb_utils.Tensor(name, np.array(value, dtype=DTYPES[OUTPUTS[name]])) for name, value in values.items()]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if piece.finish_reason else 0
        with self._lock:
            self._ended = bool(flags)
            self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def fail(self, error):
        """End the stream with an error."""
        text = f"[{error.code}] {error}" if self.codes else str(error)
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, CODES.get(error.code, error.code)))
        with self._lock:
            self._ended = True
            self._sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def cancelled(self):
        """Whether the client cancelled or went away."""
        with self._lock:
            return not self._ended and self._sender.is_cancelled()


DTYPES = {"TYPE_STRING": np.object_, "TYPE_UINT32": np.uint32, "TYPE_INT64": np.int64}
