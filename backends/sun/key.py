"""The key of a server's control, as its own processes know it."""

from __future__ import annotations

import hmac
import os

VARIABLE = "SUN_CONTROL_KEY"
"""The environment variable that holds it; `sun serve` sets it."""
LEAVE = "leave"
"""The parameter of a request to `sun` that has the key: an operator's, to take no more requests. Its answer is the number of those that have not ended."""


def check_key(given: str) -> None:
    """Raise PermissionError unless ``given`` is the key of the server that this process belongs to."""
    key = os.environ.get(VARIABLE)
    if not key:
        raise PermissionError(f"key: this server takes none, because it was started without {VARIABLE}; `sun serve` sets it")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise PermissionError("key: is not this server's")
