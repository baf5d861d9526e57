"""Errors that a person can act on; the command line prints them as a sentence."""


class SunError(Exception):
    """Something failed for a reason its message tells. ``code``: the gRPC status of a call that failed ("UNAVAILABLE", "DEADLINE_EXCEEDED");
    "UNKNOWN" for what the server answered: Triton's streams tell an error's text alone.
    """

    def __init__(self, message: str, code: str = "UNKNOWN"):
        super().__init__(message)
        self.code = code


class ServerError(SunError):
    """The server could not be started, or ended by itself."""
