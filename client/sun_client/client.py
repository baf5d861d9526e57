"""A client of `sun` over gRPC: answers streamed or whole, and the decode workers' state."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from sun_client import URL, wire
from sun_client.wire import Piece

if TYPE_CHECKING:
    from sun.messages import Stats


@dataclass
class Answer:
    """A whole answer. logprobs is empty unless the sampling asked for them."""

    text: str
    finish_reason: str
    token_ids: list[int]
    logprobs: list[dict]
    num_input_tokens: int
    num_output_tokens: int
    request_id: str


class SunClient:
    """A connection to a Triton server. Any number of threads may use it at once; close it, or use it in a ``with``.

    tritonclient's own client allows one stream a connection and leaves a thread behind for each cancelled one, so this speaks
    Triton's gRPC service through the stub that tritonclient carries: a call per request.
    """

    def __init__(self, url: str = URL, api_key: str | None = None):
        """url: host:port of the server's gRPC endpoint, grpcs://host:port with TLS; nothing is sent before the first request.
        A server whose certificate no public authority has signed is trusted by the PEM file that the environment's `SUN_TLS_CA` names.

        api_key: for servers that ask for one; None for the environment's `SUN_API_KEY`, if there is one.
        """
        self.url = url
        self._api_key = api_key if api_key is not None else os.environ.get("SUN_API_KEY", "")
        address, credentials = wire.target(url)
        options = wire.options(address)
        self._channel = (grpc.insecure_channel(address, options=options) if credentials is None
                         else grpc.secure_channel(address, credentials, options=options))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> SunClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; requests in flight are cancelled."""
        self._channel.close()

    def stream(self, task: str, text: str | None = None, messages: list[dict] | None = None, sampling: dict[str, Any] | None = None,
               timeout: float | None = None, *, request_id: str | None = None, traceparent: str = "", deadline_s: float | None = None,
               priority_class: str = "") -> Iterator[Piece]:
        """Yield an answer's pieces as they come. Closing the generator cancels the request.

        Give either ``text`` (one user message) or ``messages`` (a conversation, [{"role": ..., "content": ...}]).
        sampling: keys as in vLLM (max_tokens, temperature, seed, stop, logprobs, ...) over the task's defaults.
        timeout: seconds for the whole answer, None for the server's own limit. request_id: what the server's request log calls it,
        one is drawn if it is None. traceparent: the W3C trace context whose child it is. deadline_s: seconds after which the server ends
        the request, in its queue as in decode. priority_class: "high", "normal" or "low", who goes first. Raises SunError.
        """
        yield from self._pieces(task, text, messages, sampling, timeout, True, request_id or uuid.uuid4().hex,
                                parameters(traceparent, deadline_s, priority_class))

    def generate(self, task: str, text: str | None = None, messages: list[dict] | None = None, sampling: dict[str, Any] | None = None,
                 timeout: float | None = None, *, request_id: str | None = None, traceparent: str = "", deadline_s: float | None = None,
                 priority_class: str = "") -> Answer:
        """The whole answer, in one response. Arguments and errors as of `stream`."""
        answer = Answer("", "", [], [], 0, 0, request_id or uuid.uuid4().hex)
        for piece in self._pieces(task, text, messages, sampling, timeout, False, answer.request_id,
                                  parameters(traceparent, deadline_s, priority_class)):
            answer.text += piece.text
            answer.token_ids += piece.token_ids
            answer.logprobs += piece.logprobs
            answer.num_input_tokens = piece.num_input_tokens
            answer.finish_reason = piece.finish_reason or ""
        answer.num_output_tokens = len(answer.token_ids)
        return answer

    def workers(self, timeout: float | None = 30.0) -> list[str]:
        """Names of the decode workers (models `decode_*`) that this server has ready, in order. Raises SunError."""
        with wire.errors(self.url, timeout):
            statistics = self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=timeout)
        return wire.named(statistics, "decode_")

    def worker_stats(self, worker: str, after: int = 0, timeout: float | None = 30.0) -> Stats:
        """State of the decode worker named ``worker``, with its steps after number ``after`` (the latest 4096 at most). Raises SunError."""
        return wire.read_stats(list(self._call(wire.stats_request(worker, after), timeout)))

    def idle(self) -> bool:
        """Whether no decode worker has a sequence, and all their slots are free. Raises SunError."""
        from sun.messages import NO_STEPS

        return all(self.worker_stats(worker, after=NO_STEPS).idle for worker in self.workers())

    def _pieces(self, task: str, text: str | None, messages: list[dict] | None, sampling: dict[str, Any] | None, timeout: float | None,
                stream: bool, request_id: str, parameters: dict[str, str | float]) -> Iterator[Piece]:
        request = wire.generate_request(task, text, messages, sampling or {}, stream, request_id, {"api_key": self._api_key, **parameters})
        finished = False
        for response in self._call(request, timeout):
            piece = wire.read_piece(response)
            finished = finished or piece.finish_reason is not None
            yield piece
        if not finished:
            raise wire.cut_short(self.url)

    def _call(self, request: service_pb2.ModelInferRequest, timeout: float | None) -> Iterator[InferResult]:
        """A model's responses to one request. Closing the generator cancels it."""
        with wire.errors(self.url, timeout):
            # Not with the header `triton_grpc_error`, which would give errors their status codes: with it, a call that is refused
            # at once on a new connection crashes tritonserver (24.10), often within ten of them.
            call, error = self._stub.ModelStreamInfer(iter([request]), timeout=timeout), ""
            try:
                for response in call:
                    error = error or response.error_message
                    if response.infer_response.outputs:
                        yield InferResult(response.infer_response)
            finally:
                call.cancel()
            # Only now: a call that is cancelled right after its error stays open in tritonserver, whose stop then takes 30 s.
            if error:
                raise wire.server_error(error)


def parameters(traceparent: str, deadline_s: float | None, priority_class: str) -> dict[str, str | float]:
    """Those of a request that were given."""
    return {"traceparent": traceparent, "priority_class": priority_class, **({} if deadline_s is None else {"deadline_s": float(deadline_s)})}
