"""Why a request failed, in the terms of Triton's error codes."""

from __future__ import annotations


class RequestError(Exception):
    """A failed request: ``code`` is INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, DEADLINE or INTERNAL."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Gone(RequestError):
    """A model's process is dead or hangs; whatever it held is lost."""

    def __init__(self, message: str):
        super().__init__("UNAVAILABLE", message)
