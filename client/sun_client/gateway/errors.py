"""Errors in OpenAI's form: an HTTP status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from typing import Any

from sun_client.errors import SunError

FIELD = re.compile(r"([a-z][a-z_]*(?:[.\[][\w.\[\]-]*)?): ")
"""How the router's errors about a request begin."""
SAMPLING = "sampling_parameters."
NAMES = {"task": "model", "text_input": "messages", "sampling_parameters": None}
"""What clients here call a field of `sun`."""
REFUSED, BROKEN, LIMITED = "invalid_request_error", "server_error", "rate_limit_error"
KINDS = {
    "INVALID_ARG": (400, REFUSED, None), "UNAUTHENTICATED": (401, REFUSED, "invalid_api_key"),
    "PERMISSION_DENIED": (403, REFUSED, "permission_denied"), "NOT_FOUND": (404, REFUSED, "model_not_found"),
    "UNAVAILABLE": (503, BROKEN, "unavailable"), "DEADLINE": (504, BROKEN, "deadline_exceeded"),
    "DEADLINE_EXCEEDED": (504, BROKEN, "deadline_exceeded"), "UNKNOWN": (503, BROKEN, "unavailable"),
}
"""What the router's codes, and gRPC's, are here: status, type, code; all others are 500. UNKNOWN is Triton's own: `sun` is not loaded, or it is stopping."""
KEY_NEEDED = "a valid key is needed, as header `Authorization: Bearer ...`"
TOO_LONG = re.compile(r"the prompt has \d+ tokens|on top of a prompt of \d+ tokens")


class ApiError(Exception):
    """An error as an OpenAI client is told it. param: the field at fault. retry_after_s: for the header of that name."""

    def __init__(self, status: int, message: str, type: str = REFUSED, param: str | None = None, code: str | None = None,
                 retry_after_s: int | None = None):
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code, self.retry_after_s = status, message, type, param, code, retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to it."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str, message: str) -> ApiError:
    """400 for a field."""
    return ApiError(400, f"{param}: {message}", param=param)


def api_error(error: SunError, renamed: dict[str, str] = {}) -> ApiError:
    """The server's error. renamed: fields of `sun` that this request has under another name."""
    if error.retry_after_s is not None:
        return ApiError(429, str(error), LIMITED, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
    status, type, code = KINDS.get(error.code, (500, BROKEN, "internal_error"))
    if status == 401:
        return ApiError(status, KEY_NEEDED, type, code=code)
    message, param, found = str(error), None, FIELD.match(str(error))
    if status < 500 and found:
        name = found[1].removeprefix(SAMPLING)
        param = renamed.get(name) or NAMES.get(name, name)
        message = f"{param}: {message[found.end():]}" if param else message
    if TOO_LONG.search(message) and status == 400:
        code = "context_length_exceeded"
    return ApiError(status, message, type, param, code)
