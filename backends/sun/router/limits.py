"""The router's bounds."""

from __future__ import annotations

from dataclasses import dataclass

from sun.router.fair_queue import Bounds


@dataclass(frozen=True)
class Limits:
    """The router's bounds: requests in flight before it refuses (of one task three quarters of them where there are others, so that its flood shuts nobody out),
    tokens a sequence may have, seconds it may take.

    starting: requests on their way into a worker at once. max_running_tokens: tokens, prompts and whole answers, of requests
    beyond the queue; 0 is what the living workers' KV pools hold. queue: of what waits.
    """

    max_inflight: int = 256
    max_tokens: int = 4096
    deadline_s: float = 600.0
    starting: int = 16
    max_running_tokens: int = 0
    queue: Bounds = Bounds()
