"""Why a request failed, in the terms of Triton's error codes."""

from __future__ import annotations

import math

SOONEST_S, LATEST_S = 1, 60
"""Bounds of what a refused client is told to wait."""


class RequestError(Exception):
    """A failed request: ``code`` is INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, DEADLINE, INTERNAL, or, which Triton does not
    know, UNAUTHENTICATED or PERMISSION_DENIED.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Busy(RequestError):
    """There is no room now; the message ends in "; retry after N s" with N whole seconds, for clients and proxies to read.

    Triton can neither set a header for a backend's error nor send parameters along with it.
    """

    def __init__(self, message: str, retry_after_s: float):
        self.retry_after_s = math.ceil(min(max(retry_after_s, SOONEST_S), LATEST_S))
        super().__init__("UNAVAILABLE", f"{message}; retry after {self.retry_after_s} s")


class Gone(RequestError):
    """A model's process is dead or hangs; whatever it held is lost."""

    def __init__(self, message: str):
        super().__init__("UNAVAILABLE", message)


class Absent(Gone):
    """A model is not there: not loaded, being loaded, or dead already. The call was not begun."""
