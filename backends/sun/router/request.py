"""What a client asked for: the inputs of `sun`, checked field by field."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from sun.decode.params import SamplingParams, sampling_params
from sun.router.errors import RequestError
from sun.router.fair_queue import PRIORITIES
from sun.text.prompt import check_messages

MAX_TEXT_BYTES = 1 << 20
INPUTS = {
    "text_input": "TYPE_STRING", "messages": "TYPE_STRING", "task": "TYPE_STRING", "stream": "TYPE_BOOL",
    "sampling_parameters": "TYPE_STRING", "exclude_input_in_output": "TYPE_BOOL", "return_finish_reason": "TYPE_BOOL",
    "return_num_input_tokens": "TYPE_BOOL", "return_num_output_tokens": "TYPE_BOOL", "return_token_ids": "TYPE_BOOL",
    "return_logprobs": "TYPE_BOOL", "ticket": "TYPE_STRING", "prompt_ids": "TYPE_INT64",
}
"""`sun`'s inputs and their Triton types, all optional to Triton; named as in Triton's vLLM backend where it has them."""
OUTPUTS = {
    "text_output": "TYPE_STRING", "finish_reason": "TYPE_STRING", "num_input_tokens": "TYPE_UINT32",
    "num_output_tokens": "TYPE_UINT32", "token_ids": "TYPE_INT64", "logprobs": "TYPE_STRING",
}
"""`sun`'s outputs; all but the text only when asked for."""
TRACE = ("traceparent", "tracestate")
"""Request parameters of W3C trace context."""
MAX_ID = 128
"""Characters of a client's request id that are kept."""
MAX_ERROR = 1000
"""Characters of an error about a request, which may quote what the client sent."""
RETURNS = ("finish_reason", "num_input_tokens", "num_output_tokens", "token_ids", "logprobs")
"""Outputs given only when ``return_<name>`` is true."""


@dataclass(frozen=True)
class Handover:
    """A prompt that a prefill module has run already (the ensembles' way in): its token ids x1..xn and its shipment."""

    prompt: list[int]
    shipment: list[bytes]


@dataclass(frozen=True)
class GenerateRequest:
    """One request. ``task`` is None only with a handover, whose ticket names it.

    sampling: the keys the client gave. echo: text to begin the output with. returns: the optional outputs asked for.
    id: what the client calls it. trace: W3C trace context, `traceparent` and perhaps `tracestate`.
    """

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    task: str | None = None
    stream: bool = False
    echo: str = ""
    returns: frozenset[str] = frozenset()
    deadline_s: float | None = None
    priority: str | None = None
    handover: Handover | None = None
    id: str = ""
    api_key: str | None = field(default=None, repr=False)
    trace: dict[str, str] = field(default_factory=dict)

    def params(self, defaults: dict[str, Any]) -> SamplingParams:
        """Sampling parameters over a task's defaults; without a seed one is drawn here, so that a replay repeats the text."""
        params = sampling_params({**defaults, **self.sampling})
        return params if params.seed is not None else msgspec.structs.replace(params, seed=secrets.randbits(63))


def parse_request(inputs: dict[str, np.ndarray], parameters: dict[str, Any], id: str = "") -> GenerateRequest:
    """Read a request's tensors by name, and its Triton parameters: sampling keys as well, for the likes of curl. id: Triton's, the client's.

    Raises RequestError (INVALID_ARG) naming the field and the limit.
    """
    try:
        return _parse(inputs, parameters, id)
    except ValueError as error:
        raise invalid(error) from error


def invalid(error: ValueError) -> RequestError:
    """The error for a client whose request is at fault, no longer than `MAX_ERROR`."""
    text = str(error)
    return RequestError("INVALID_ARG", text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}...")


def _parse(inputs: dict[str, np.ndarray], parameters: dict[str, Any], id: str) -> GenerateRequest:
    stream = bool(_one(inputs, "stream", False))
    returns = frozenset(name for name in RETURNS if _one(inputs, f"return_{name}", False))
    sampling = _object(_text(inputs, "sampling_parameters") or "{}", "sampling_parameters")
    given = {key: value for key, value in parameters.items() if not key.startswith("triton_")}
    deadline_s = given.pop("deadline_s", None)
    if deadline_s is not None and not (type(deadline_s) in (int, float) and 0 < deadline_s < 86400):
        raise ValueError(f"deadline_s: must be more than 0 and less than 86400 seconds, got {deadline_s!r}")
    priority = given.pop("priority_class", None)
    if priority is not None and priority not in PRIORITIES:
        raise ValueError(f"priority_class: must be one of {', '.join(PRIORITIES)}, got {str(priority)[:64]!r}")
    given.pop("id", None)  # Triton takes the id in an HTTP body for a parameter, too
    api_key = _api_key(given)
    trace = {name: str(given.pop(name)) for name in TRACE if name in given}
    text = parse_text(inputs)
    echo = ""
    if not _one(inputs, "exclude_input_in_output", True):
        if stream:
            raise ValueError("exclude_input_in_output: false is not supported together with stream")
        echo = text[-1]["content"]
    return GenerateRequest(
        messages=text, sampling={**sampling, **given}, task=_text(inputs, "task") or None, stream=stream, echo=echo,
        returns=returns, deadline_s=deadline_s, priority=priority, handover=parse_handover(inputs),
        id=id[:MAX_ID], api_key=api_key, trace=trace)


def parse_text(inputs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The conversation in ``messages`` (chat JSON) or ``text_input`` (one user message). Raises ValueError naming the field."""
    text, messages = _text(inputs, "text_input"), _text(inputs, "messages")
    if text and messages:
        raise ValueError("messages: give either text_input or messages, not both")
    if messages:
        return check_messages(_json(messages, "messages"))
    if not text or not text.strip():
        raise ValueError("text_input: is empty; at least one character is needed (or give messages)")
    return [{"role": "user", "content": text}]


def _api_key(parameters: dict[str, Any]) -> str | None:
    """Take the client's key out of the parameters: `api_key`, else a forwarded header `authorization: Bearer ...`."""
    header = parameters.pop("authorization", None)
    key = parameters.pop("api_key", None)
    if key is not None and not isinstance(key, str):
        raise ValueError("api_key: must be a text")
    if key is None and isinstance(header, str) and header[:7].lower() == "bearer ":
        return header[7:].strip()
    return key


def came_with(inputs: dict[str, np.ndarray]) -> Handover | None:
    """The handover of a request that is at fault elsewhere; None if it has none that can be read."""
    try:
        return parse_handover(inputs)
    except ValueError:
        return None


def parse_handover(inputs: dict[str, np.ndarray]) -> Handover | None:
    """What a prefill module made of the prompt already; None if there is none. Raises ValueError for one of ticket and prompt_ids alone."""
    ticket, prompt = inputs.get("ticket"), inputs.get("prompt_ids")
    if ticket is None and prompt is None:
        return None
    if ticket is None or prompt is None or not ticket.size or not prompt.size:
        raise ValueError("ticket: must come together with prompt_ids, the token ids of the whole prompt")
    return Handover(prompt.reshape(-1).tolist(), [bytes(part) for part in ticket.reshape(-1)])


def _one(inputs: dict[str, np.ndarray], name: str, default: Any) -> Any:
    array = inputs.get(name)
    if array is None:
        return default
    if array.size != 1:
        raise ValueError(f"{name}: expected one value, got an array of shape {list(array.shape)}")
    return array.reshape(-1)[0]


def _text(inputs: dict[str, np.ndarray], name: str) -> str | None:
    value = _one(inputs, name, None)
    if value is None:
        return None
    data = value.encode() if isinstance(value, str) else bytes(value)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes, the limit is {MAX_TEXT_BYTES}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError, and so is a number of too many digits
        raise ValueError(f"{name}: malformed JSON: {error}") from error


def _object(text: str, name: str) -> dict[str, Any]:
    value = _json(text, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(value).__name__}")
    return value
