"""The doors behind the router: with inference keys on, prefill modules and decode workers answer nobody but it."""

from __future__ import annotations

import hmac
import json
import os

VARIABLE = "SUN_DOOR"
"""The environment variable with the secret that all models of a server share; without it every door is open."""
PARAMETER = "sun_door"
"""The request parameter that it comes in."""


def pass_on() -> dict[str, str]:
    """The parameters of a call that opens the door."""
    secret = os.environ.get(VARIABLE)
    return {PARAMETER: secret} if secret else {}


def closed() -> bool:
    """Whether the doors are closed: keys are needed."""
    return bool(os.environ.get(VARIABLE))


def demand() -> None:
    """Raise ValueError if the doors are open: keys would be of no use then."""
    if not closed():
        raise ValueError(
            f"keys: start tritonserver with {VARIABLE} set to a random text, as `sun serve` does: without it prefill modules and decode "
            "workers answer whoever asks them, without a key")


def check(parameters: str) -> None:
    """Raise ValueError unless a request with these parameters (JSON, as Triton gives them) may come in."""
    secret = os.environ.get(VARIABLE)
    if secret and not hmac.compare_digest(str(json.loads(parameters or "{}").get(PARAMETER, "")).encode(errors="replace"), secret.encode()):
        raise ValueError("this model answers `sun` alone, since keys are needed here: ask `sun` with a task and an api_key")
