"""A body of `/v1/chat/completions`: what `sun` is asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sun.text.openai import ROLES, PartError, joined
from sun_client.gateway.errors import invalid

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens",
    "min_tokens", "stop", "stop_token_ids", "ignore_eos",
)
"""Fields that go on as they are: the server checks them, and its errors name them."""
IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "parallel_tool_calls", "verbosity",
)
"""Fields that would change no answer."""
NEUTRAL: dict[str, list[Any]] = {
    "tools": [[]], "tool_choice": ["none"], "functions": [[]], "function_call": ["none"], "response_format": [{"type": "text"}],
    "modalities": [["text"]], "audio": [], "logit_bias": [{}], "prediction": [], "reasoning_effort": ["none"], "web_search_options": [],
}
"""OpenAI's fields that this server has nothing for, and the values that ask for nothing."""
LEAST_TOP_P = 1e-9
"""In place of 0, which OpenAI takes: the likeliest token alone."""
MAX_N, MAX_TOP_LOGPROBS, SEEDS = 16, 20, 1 << 63


@dataclass(frozen=True)
class ChatRequest:
    """One request. sampling, parameters: keys and request parameters of `sun`. renamed: fields of `sun` that it has under another name.

    n: choices. logprobs: whether the answer has them. include_usage: whether a stream ends with the usage.
    """

    task: str
    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    parameters: dict[str, str | float]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    renamed: dict[str, str] = field(default_factory=dict)

    def choice(self, index: int) -> dict[str, Any]:
        """A choice's sampling keys: with a seed, each has another one, and the first the client's."""
        seed = self.sampling.get("seed")
        if not index or type(seed) is not int or seed < 0:
            return self.sampling
        return {**self.sampling, "seed": (seed + index) % SEEDS}


def parse(body: Any) -> ChatRequest:
    """Read a request's JSON; null means that a field is not given. Raises ApiError (400) naming the field."""
    if not isinstance(body, dict):
        raise invalid("body", "expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        if name in given and given.pop(name) not in neutral:
            raise invalid(name, f"is not supported here{f', only {neutral[0]!r} is' if neutral else ''}")
    task = given.pop("model", None)
    if not isinstance(task, str) or not task:
        raise invalid("model", "is missing; GET /v1/models names those there are" if task is None else "expected a text")
    messages = _messages(given.pop("messages", None))
    n = _integer(given, "n", 1, MAX_N)
    stream = _boolean(given, "stream")
    options = given.pop("stream_options", None)
    if options is not None and not stream:
        raise invalid("stream_options", "is for streams: give stream as well")
    sampling = {name: given.pop(name) for name in SAMPLING if name in given}
    if type(seed := sampling.get("seed")) is int and -SEEDS <= seed < 0:
        sampling["seed"] = seed + SEEDS  # OpenAI's have 64 bits and a sign
    if type(sampling.get("top_p")) in (int, float) and sampling["top_p"] == 0:
        sampling["top_p"] = LEAST_TOP_P
    renamed = {}
    if "max_completion_tokens" in given:
        sampling["max_tokens"] = given.pop("max_completion_tokens")
        renamed["max_tokens"] = "max_completion_tokens"
    logprobs, top = _boolean(given, "logprobs"), _integer(given, "top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
    if top and not logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    if logprobs:
        sampling["logprobs"] = top
    parameters = _parameters(given)
    for name in given:
        raise invalid(name[:64], "is not a field that is known here")
    return ChatRequest(task, messages, sampling, parameters, n, stream, _include_usage(options), logprobs, renamed)


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise invalid("messages", "expected a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise invalid(where, "expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise invalid(f"{where}.role", "expected a text")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise invalid(f"{where}.{name}", "is not supported here")
    if content is None and role == "assistant":  # OpenAI's own, where an assistant refused or called tools
        content = ""
    try:
        content = joined(content)
    except PartError as error:
        raise invalid(f"{where}.content{error.field}", error.reason) from error
    if not isinstance(content, str):
        raise invalid(f"{where}.content", "expected a text, or a list of text parts")
    return {"role": ROLES.get(role, role), "content": content}


def _parameters(given: dict[str, Any]) -> dict[str, str | float]:
    parameters: dict[str, str | float] = {}
    if "deadline_s" in given:
        seconds = given.pop("deadline_s")
        if type(seconds) not in (int, float):
            raise invalid("deadline_s", "expected a number of seconds")
        parameters["deadline_s"] = float(min(seconds, 1e9))  # protobuf takes no integer that a double cannot be
    if "priority_class" in given:
        parameters["priority_class"] = given.pop("priority_class")
        if not isinstance(parameters["priority_class"], str):
            raise invalid("priority_class", "expected a text")
    return parameters


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("stream_options", "expected an object")
    for name in options.keys() - {"include_usage", "include_obfuscation"}:
        raise invalid(f"stream_options.{name[:64]}", "is not a field that is known here")
    include = options.get("include_usage")
    if not isinstance(include, bool | None):
        raise invalid("stream_options.include_usage", "expected true or false")
    return bool(include)


def _integer(given: dict[str, Any], name: str, default: int, most: int, least: int = 1) -> int:
    value = given.pop(name, default)
    if type(value) is not int or not least <= value <= most:
        raise invalid(name, f"expected a whole number from {least} to {most}")
    return value


def _boolean(given: dict[str, Any], name: str) -> bool:
    value = given.pop(name, False)
    if not isinstance(value, bool):
        raise invalid(name, "expected true or false")
    return value
