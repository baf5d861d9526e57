"""A client of `sun` over gRPC: answers streamed or whole, and the decode workers' state."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from sun_client.errors import SunError

if TYPE_CHECKING:
    from sun.messages import Stats

URL = "localhost:8001"
RETURNS = ("finish_reason", "num_input_tokens", "num_output_tokens", "token_ids")
CHANNEL = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass
class Piece:
    """A part of an answer; only the last one has a finish reason ("stop" or "length"). Tokens are those since the piece before."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    num_input_tokens: int = 0
    finish_reason: str | None = None


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
        self._channel = _channel(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> SunClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; requests in flight are cancelled."""
        self._channel.close()

    def stream(self, task: str, text: str | None = None, messages: list[dict] | None = None, sampling: dict[str, Any] | None = None,
               timeout: float | None = None, *, request_id: str | None = None, traceparent: str = "") -> Iterator[Piece]:
        """Yield an answer's pieces as they come. Closing the generator cancels the request.

        Give either ``text`` (one user message) or ``messages`` (a conversation, [{"role": ..., "content": ...}]).
        sampling: keys as in vLLM (max_tokens, temperature, seed, stop, logprobs, ...) over the task's defaults.
        timeout: seconds for the whole answer, None for the server's own limit. request_id: what the server's request log calls it,
        one is drawn if it is None. traceparent: the W3C trace context whose child it is. Raises SunError.
        """
        yield from self._pieces(task, text, messages, sampling, timeout, True, request_id or uuid.uuid4().hex, traceparent)

    def generate(self, task: str, text: str | None = None, messages: list[dict] | None = None, sampling: dict[str, Any] | None = None,
                 timeout: float | None = None, *, request_id: str | None = None, traceparent: str = "") -> Answer:
        """The whole answer, in one response. Arguments and errors as of `stream`."""
        answer = Answer("", "", [], [], 0, 0, request_id or uuid.uuid4().hex)
        for piece in self._pieces(task, text, messages, sampling, timeout, False, answer.request_id, traceparent):
            answer.text += piece.text
            answer.token_ids += piece.token_ids
            answer.logprobs += piece.logprobs
            answer.num_input_tokens = piece.num_input_tokens
            answer.finish_reason = piece.finish_reason or ""
        answer.num_output_tokens = len(answer.token_ids)
        return answer

    def workers(self, timeout: float | None = 30.0) -> list[str]:
        """Names of the decode workers (models `decode_*`) that this server has ready, in order. Raises SunError."""
        with _errors(self.url, timeout):
            # The repository's index would be the natural question; but it needs the server's key.
            statistics = self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=timeout)
        return sorted({m.name for m in statistics.model_stats if m.name.startswith("decode_")}, key=lambda name: (len(name), name))

    def worker_stats(self, worker: str, after: int = 0, timeout: float | None = 30.0) -> Stats:
        """State of the decode worker named ``worker``, with its steps after number ``after`` (the latest 4096 at most). Raises SunError."""
        from sun.messages import GetStats, decode_reply, encode

        request = _request(worker, [_bytes("message", encode(GetStats(after=after)))])
        replies = [bytes(r) for response in self._call(request, timeout) for r in response.as_numpy("reply").reshape(-1)]
        return decode_reply(replies[0])

    def idle(self) -> bool:
        """Whether no decode worker has a sequence, and all their slots are free. Raises SunError."""
        from sun.messages import NO_STEPS

        return all(self.worker_stats(worker, after=NO_STEPS).idle for worker in self.workers())

    def _pieces(self, task: str, text: str | None, messages: list[dict] | None, sampling: dict[str, Any] | None, timeout: float | None,
                stream: bool, request_id: str, traceparent: str) -> Iterator[Piece]:
        sampling = sampling or {}
        returns = RETURNS if sampling.get("logprobs") is None else (*RETURNS, "logprobs")
        inputs = [_bytes("task", task.encode()), _bool("stream", stream), _bytes("sampling_parameters", json.dumps(sampling).encode())]
        inputs += [_bool(f"return_{name}", True) for name in returns]
        if text is not None:
            inputs.append(_bytes("text_input", text.encode()))
        if messages is not None:
            inputs.append(_bytes("messages", json.dumps(messages).encode()))
        finished, request = False, _request("sun", inputs)
        request.id = request_id
        for name, value in (("api_key", self._api_key), ("traceparent", traceparent)):
            if value:
                request.parameters[name].string_param = value
        for response in self._call(request, timeout):
            finish = _text(response, "finish_reason")
            finished = finished or bool(finish)
            yield Piece(
                _text(response, "text_output"), response.as_numpy("token_ids").reshape(-1).tolist(),
                json.loads(_text(response, "logprobs")) if "logprobs" in returns else [],
                int(response.as_numpy("num_input_tokens").reshape(-1)[0]), finish or None)
        if not finished:
            raise SunError(f"the answer from {self.url} ended without a finish reason: the server stopped meanwhile", "UNAVAILABLE")

    def _call(self, request: service_pb2.ModelInferRequest, timeout: float | None) -> Iterator[InferResult]:
        """A decoupled model's responses to one request. Closing the generator cancels it."""
        with _errors(self.url, timeout):
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
                raise SunError(error)


def _channel(url: str) -> grpc.Channel:
    """A connection as the URL's scheme says. Raises SunError if the file of authorities cannot be read."""
    address = url.removeprefix("grpcs://")
    if address == url:
        return grpc.insecure_channel(url, options=CHANNEL)
    path = os.environ.get("SUN_TLS_CA")
    try:
        authorities = Path(path).read_bytes() if path else None
    except OSError as error:
        raise SunError(f"SUN_TLS_CA: {path}: {error.strerror}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities), options=CHANNEL)


@contextmanager
def _errors(url: str, timeout: float | None) -> Iterator[None]:
    """gRPC's errors as SunError."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE and "handshake" in (error.details() or "").lower():
            raise SunError(f"no encrypted connection to {url}: is its certificate of an authority that this machine, or SUN_TLS_CA, names?", code.name) from error
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or ""):
            raise SunError(f"no server answers at {url}", code.name) from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise SunError(f"{url} did not finish within {timeout:g} s", code.name) from error
        if code is grpc.StatusCode.UNAVAILABLE and "closed" in (error.details() or ""):
            raise SunError(f"the connection to {url} broke: {error.details()}", code.name) from error
        raise SunError(error.details() or f"{url} answered {code.name}", code.name) from error


def _request(model: str, inputs: list[tuple[str, str, bytes]]) -> service_pb2.ModelInferRequest:
    """A request of one-element tensors: each a name, a Triton type and raw bytes."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=[1])
        request.raw_input_contents.append(raw)
    return request


def _bytes(name: str, value: bytes) -> tuple[str, str, bytes]:
    return name, "BYTES", len(value).to_bytes(4, "little") + value


def _bool(name: str, value: bool) -> tuple[str, str, bytes]:
    return name, "BOOL", bytes([value])


def _text(response: InferResult, name: str) -> str:
    return response.as_numpy(name).reshape(-1)[0].decode()
