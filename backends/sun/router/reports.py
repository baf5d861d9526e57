"""Where the records of ended requests go: a thread of its own writes them, and no request ever waits for it."""

from __future__ import annotations

import logging
import queue
import threading
from typing import Protocol

from sun.router.meter import Meter
from sun.router.record import Record

log = logging.getLogger("sun.router")
MOST_WAITING = 1024
"""Records that may wait to be written; what comes on top of them is counted and forgotten."""
CLOSE_S = 3.0


class Sink(Protocol):
    """A place for records. Its name is the label of `sun_records_lost_total`."""

    name: str

    def write(self, record: Record) -> None:
        """Take an ended request's record. Raises what goes wrong."""

    def close(self) -> None:
        """Hand over what is left, within `CLOSE_S` or so."""


class Reports:
    """Hands each record to all sinks. What a sink cannot take is counted, and costs the others and the requests nothing.

    prompts: whether a sink wants the messages.
    """

    def __init__(self, sinks: list[Sink], meter: Meter, prompts: bool = False):
        self._sinks, self._meter, self._prompts = sinks, meter, prompts
        self._waiting: queue.Queue[Record | None] = queue.Queue(MOST_WAITING)
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="reports", daemon=True)
        self._thread.start()

    def note(self, record: Record) -> None:
        """Take a record; returns at once."""
        if not self._sinks:
            return
        if not self._prompts:
            record.messages = []  # up to a megabyte each, if a sink hangs
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._meter.add("sun_records_lost_total", sink="queue")

    def close(self) -> None:
        """Write what waits and stop; a sink that hangs is not waited for."""
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (record := self._waiting.get()) is not None:
            for sink in self._sinks:
                try:
                    sink.write(record)
                except Exception:  # a full disk, say
                    self._meter.add("sun_records_lost_total", sink=sink.name)
                    if sink.name not in self._failing:  # once, as the log may lie on the same disk
                        log.exception("%s: records are being lost", sink.name)
                    self._failing.add(sink.name)
                else:
                    self._failing.discard(sink.name)
        for sink in self._sinks:
            try:
                sink.close()
            except Exception:
                log.exception("%s: could not be closed", sink.name)
