"""Errors that a person can act on; the command line prints them as a sentence."""


class SunError(Exception):
    """Something failed for a reason its message tells. ``code``: for a request, its gRPC status ("INVALID_ARGUMENT", "NOT_FOUND", ...)."""

    def __init__(self, message: str, code: str = "UNKNOWN"):
        super().__init__(message)
        self.code = code


class ServerError(SunError):
    """The server could not be started, or ended by itself."""
