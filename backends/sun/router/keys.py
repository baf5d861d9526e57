"""Who may ask: inference keys with bounds of their own, from a file that may change while the router runs."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sun.router import key_file
from sun.router.bucket import Bucket
from sun.router.errors import Busy, RequestError
from sun.router.fair_queue import PRIORITIES
from sun.router.key_file import Key

log = logging.getLogger("sun.router")
LOOK_S = 1.0
"""How often the file is looked at, while requests come."""


class Grant:
    """What a key lets one request do. ``end`` must be called once."""

    def __init__(self, holder: Holder, priority: str):
        self._holder, self.priority = holder, priority
        self._lock, self._charged, self._over = threading.Lock(), 0, False

    def charge(self, tokens: int) -> None:
        """The request may come to so many tokens. Raises RequestError naming the limit that they are over."""
        with self._lock:
            if not self._over:  # cancelled meanwhile
                self._holder.charge(tokens)
                self._charged = tokens

    def end(self, used: int) -> None:
        """The request has ended, and came to so many tokens."""
        with self._lock:
            self._over = True
        self._holder.end(max(0, self._charged - used))


class Keys:
    """The keys of a file. Safe to use from any thread.

    Raises ValueError or OSError if the file is not right; one that goes bad later, or away, leaves the keys that there were.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self._holders: dict[str, Holder] = {}
        self._stamp = _stamp(path)
        self._take_over(key_file.read(path))
        self._looked, self._trouble = clock(), ""

    def holder(self, api_key: str | None) -> Holder:
        """Whose key this is. Raises RequestError (UNAUTHENTICATED), in the same words for a wrong key and none."""
        self._look()
        given, found = key_file.digest(api_key or ""), None
        for holder in list(self._holders.values()):  # all of them, so that the time tells nothing
            if hmac.compare_digest(holder.key.sha256, given):
                found = holder
        if found is None:
            raise RequestError("UNAUTHENTICATED", "api_key: a valid key is needed, as request parameter api_key or in gRPC as `authorization: Bearer ...`")
        return found

    def _look(self) -> None:
        """Read the file again if it has changed."""
        with self._lock:
            now = self._clock()
            if now - self._looked < LOOK_S:
                return
            self._looked = now
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._stamp = stamp
                self._take_over(key_file.read(self._path))
            except (OSError, ValueError) as error:
                if str(error) != self._trouble:
                    log.warning("the keys stay as they were: %s", error)
                self._trouble = str(error)
            else:
                self._trouble = ""
                log.warning("%s was read again: %d keys", self._path, len(self._holders))

    def _take_over(self, keys: list[Key]) -> None:
        """Have these keys; those that were there before keep their books."""
        holders = {}
        for key in keys:
            holders[key.name] = self._holders.get(key.name) or Holder(key, self._clock)
            holders[key.name].change(key)
        self._holders = holders


class Holder:
    """Who has a key, and what its requests are using."""

    def __init__(self, key: Key, clock: Callable[[], float]):
        self.key, self._clock, self._lock = key, clock, threading.Lock()
        self._inflight = 0
        self._buckets: dict[str, Bucket] = {}

    def change(self, key: Key) -> None:
        """The key's bounds are these now."""
        with self._lock:
            self.key = key
            for name in ("requests_per_minute", "tokens_per_minute"):
                bound = getattr(key, name)
                if bound is None:
                    self._buckets.pop(name, None)
                elif name not in self._buckets or self._buckets[name].per_minute != bound:
                    self._buckets[name] = Bucket(bound, self._clock)

    @property
    def name(self) -> str:
        """The key's name."""
        return self.key.name

    def enter(self, task: str | None, priority: str | None, wait_s: Callable[[], float]) -> Grant:
        """Let a request in. Raises RequestError: PERMISSION_DENIED, or UNAVAILABLE naming the limit.

        priority: what was asked for, None for the usual. wait_s(): seconds until one request has probably ended.
        """
        key, highest = self.key, PRIORITIES.index(self.key.priority_class)
        if key.tasks is not None and task not in key.tasks:
            raise RequestError("PERMISSION_DENIED", f"task: this key may ask {', '.join(key.tasks) or 'nothing'}, got {str(task)[:64]!r}")
        if priority is not None and PRIORITIES.index(priority) < highest:
            raise RequestError("PERMISSION_DENIED", f"priority_class: this key may ask for {key.priority_class!r} at most, got {priority!r}")
        with self._lock:
            most, bucket = self.key.max_inflight, self._buckets.get("requests_per_minute")
            if most is not None and self._inflight >= most:
                raise Busy(f"max_inflight: this key has {self._inflight} requests in flight, its limit is {most}", wait_s())
            if bucket is not None:
                if wait := bucket.wait(1):
                    raise Busy(f"requests_per_minute: this key's limit is {bucket.per_minute}", wait)
                bucket.take(1)
            self._inflight += 1
        return Grant(self, priority or PRIORITIES[max(highest, PRIORITIES.index("normal"))])

    def charge(self, tokens: int) -> None:
        """A request may come to so many tokens. Raises RequestError naming the limit that they are over."""
        with self._lock:
            bucket = self._buckets.get("tokens_per_minute")
            if bucket is None:
                return
            wait = bucket.wait(tokens)
            if wait == float("inf"):
                raise RequestError("INVALID_ARG", f"tokens_per_minute: prompt and max_tokens come to {tokens} tokens, this key's limit is {bucket.per_minute}")
            if wait:
                raise Busy(f"tokens_per_minute: prompt and max_tokens come to {tokens} tokens, this key's limit is {bucket.per_minute}", wait)
            bucket.take(tokens)

    def end(self, unused: int) -> None:
        """A request has ended and leaves so many of its tokens."""
        with self._lock:
            self._inflight -= 1
            if unused and "tokens_per_minute" in self._buckets:
                self._buckets["tokens_per_minute"].give_back(unused)


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced, rewritten, or given another mode."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
