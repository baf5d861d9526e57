"""Errors that a person can act on; the command line prints them as a sentence."""

import re

TRACEBACK = "\n\nAt:\n"
"""In Triton's words for an exception in a model, what comes before where it was raised."""
RETRY = re.compile(r"; retry after (\d+) s$")


class SunError(Exception):
    """Something failed for a reason its message tells. ``code``: the gRPC status of a call that failed ("UNAVAILABLE", "DEADLINE_EXCEEDED");
    for what `sun` answered one of `sun.router.errors.RequestError`; "UNKNOWN" for what Triton itself did: its streams tell an error's text alone.

    retry_after_s: where the server had no room, the seconds after which it thinks to have some; else None.
    """

    def __init__(self, message: str, code: str = "UNKNOWN"):
        super().__init__(message)
        self.code = code
        found = RETRY.search(message)
        self.retry_after_s = int(found[1]) if found else None


class ServerError(SunError):
    """The server could not be started, or ended by itself."""
