"""What goes over gRPC between a client and `sun`: requests are built and responses read here, for threads and for asyncio alike."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import InferResult, service_pb2

from sun_client.errors import TRACEBACK, SunError

if TYPE_CHECKING:
    from sun.messages import Stats

RETURNS = ("finish_reason", "num_input_tokens", "num_output_tokens", "token_ids")
CHANNEL = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
HERE = re.compile(r"(localhost|127(\.\d+){3}|\[::1\]):")
"""Addresses of this machine."""
CODE = re.compile(r"\[([A-Z_]+)\] ")
"""What an error of the router begins with, where the request's parameter `error_codes` is true: Triton's streams tell an error's text alone."""


@dataclass
class Piece:
    """A part of an answer; only the last one has a finish reason ("stop" or "length"). Tokens are those since the piece before."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    num_input_tokens: int = 0
    finish_reason: str | None = None


def target(url: str) -> tuple[str, grpc.ChannelCredentials | None]:
    """Where a URL's connection goes, and its credentials if it is to be encrypted. Raises SunError if the file of authorities cannot be read."""
    address = url.removeprefix("grpcs://")
    if address == url:
        return url, None
    path = os.environ.get("SUN_TLS_CA")
    try:
        authorities = Path(path).read_bytes() if path else None
    except OSError as error:
        raise SunError(f"SUN_TLS_CA: {path}: {error.strerror}") from error
    return address, grpc.ssl_channel_credentials(authorities)


def options(address: str) -> list[tuple[str, int]]:
    """Of a channel to ``address``. A server of this machine is reached without the environment's proxy, which gRPC would ask even for it."""
    return [*CHANNEL, ("grpc.enable_http_proxy", 0)] if HERE.match(address) else CHANNEL


def request(model: str, inputs: list[tuple[str, str, bytes]]) -> service_pb2.ModelInferRequest:
    """A request of one-element tensors: each a name, a Triton type and raw bytes."""
    made = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, raw in inputs:
        made.inputs.add(name=name, datatype=datatype, shape=[1])
        made.raw_input_contents.append(raw)
    return made


def generate_request(task: str, text: str | None, messages: list[dict] | None, sampling: dict[str, Any], stream: bool, request_id: str,
                     parameters: dict[str, str | float]) -> service_pb2.ModelInferRequest:
    """A request to `sun`. parameters: request parameters (`api_key`, `traceparent`, `deadline_s`, ...); empty texts are left out."""
    inputs = [_bytes("task", task.encode()), _bool("stream", stream), _bytes("sampling_parameters", json.dumps(sampling).encode())]
    inputs += [_bool(f"return_{name}", True) for name in (RETURNS if sampling.get("logprobs") is None else (*RETURNS, "logprobs"))]
    if text is not None:
        inputs.append(_bytes("text_input", text.encode()))
    if messages is not None:
        inputs.append(_bytes("messages", json.dumps(messages).encode()))
    made = request("sun", inputs)
    made.id = request_id
    made.parameters["error_codes"].bool_param = True
    for name, value in parameters.items():
        if isinstance(value, str):
            if value:
                made.parameters[name].string_param = value
        else:
            made.parameters[name].double_param = value
    return made


def read_piece(result: InferResult) -> Piece:
    """A response of `sun` to a `generate_request`."""
    return Piece(
        _text(result, "text_output"), result.as_numpy("token_ids").reshape(-1).tolist(),
        [] if result.get_output("logprobs") is None else json.loads(_text(result, "logprobs")),
        int(result.as_numpy("num_input_tokens").reshape(-1)[0]), _text(result, "finish_reason") or None)


def named(statistics: service_pb2.ModelStatisticsResponse, prefix: str) -> list[str]:
    """Names of the models with this prefix that a server has ready, the shorter first."""
    # The repository's index would be the natural question; but it needs the server's key.
    return sorted({m.name for m in statistics.model_stats if m.name.startswith(prefix)}, key=lambda name: (len(name), name))


def stats_request(worker: str, after: int) -> service_pb2.ModelInferRequest:
    """Ask a decode worker for its state, with its steps after number ``after``."""
    from sun.messages import GetStats, encode

    return request(worker, [_bytes("message", encode(GetStats(after=after)))])


def read_stats(results: list[InferResult]) -> Stats:
    """The responses of a decode worker to a `stats_request`. Raises SunError if there are none."""
    from sun.messages import decode_reply

    replies = [bytes(reply) for result in results for reply in result.as_numpy("reply").reshape(-1)]
    if not replies:
        raise SunError("the worker's answer was cut short: the server stopped meanwhile", "UNAVAILABLE")
    return decode_reply(replies[0])


def server_error(text: str) -> SunError:
    """The error that a stream told. Its code is the router's, "UNKNOWN" where Triton itself or another model speaks."""
    text = text.partition(TRACEBACK)[0]
    found = CODE.match(text)
    return SunError(text[found.end():], found[1]) if found else SunError(text)


def cut_short(url: str) -> SunError:
    """The error of a stream that ended before its answer did."""
    return SunError(f"the answer from {url} ended without a finish reason: the server stopped meanwhile", "UNAVAILABLE")


@contextmanager
def errors(url: str, timeout: float | None) -> Iterator[None]:
    """gRPC's errors as SunError."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE and "handshake" in (error.details() or "").lower():
            raise SunError(f"no encrypted connection to {url}: is its certificate of an authority that this machine, or SUN_TLS_CA, names?", code.name) from error
        if code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in (error.details() or ""):
            raise SunError(f"no server answers at {url}", code.name) from error
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and timeout is not None:  # without, it is a proxy's
            raise SunError(f"{url} did not finish within {timeout:g} s", code.name) from error
        if code is grpc.StatusCode.UNAVAILABLE and "closed" in (error.details() or ""):
            raise SunError(f"the connection to {url} broke: {error.details()}", code.name) from error
        raise SunError(error.details() or f"{url} answered {code.name}", code.name) from error


def _bytes(name: str, value: bytes) -> tuple[str, str, bytes]:
    """A text as an input of `request`."""
    return name, "BYTES", len(value).to_bytes(4, "little") + value


def _bool(name: str, value: bool) -> tuple[str, str, bytes]:
    return name, "BOOL", bytes([value])


def _text(result: InferResult, name: str) -> str:
    return result.as_numpy(name).reshape(-1)[0].decode()
