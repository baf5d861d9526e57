"""What a run has found so far, in a file, row by row: so that a process that is lost costs what it was doing and nothing else."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sun_perf.results import write_result

HANG_S = 150.0
"""A piece that takes longer hangs: its process ends, and the next one goes on behind it."""

Piece = tuple[str, Callable[[], Iterable[dict]]]
"""A part's row or rows, which may fail without the others: a name, and what makes them."""


def read(path: Path, started: float) -> dict | None:
    """The books of the run that began at ``started``; None if it has none yet."""
    made = json.loads(path.read_text()) if path.is_file() else {}
    return made if made.get("started") == started else None


def write(path: Path, made: dict) -> None:
    """Write books, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    write_result(new, made)
    os.replace(new, path)


class Books:
    """made: rows by part; "failed": tracebacks by part, where nothing of it could be made, or by piece; "seconds" of parts that are done;
    "begun", the pieces, and "running", the part or piece in progress, are for a process that goes on.

    unusable(): why the device can be used no more in this process, or None.
    """

    def __init__(self, path: Path, made: dict, unusable: Callable[[], str | None]):
        self.path, self.made, self._unusable = path, made, unusable

    def part(self, name: str, pieces: Callable[[], Iterable[Piece]]) -> None:
        """Make a part's rows, those that are missing yet. What fails is noted, and the rest goes on; if the device is lost with it, this process exits."""
        made = self.made
        if name in made["seconds"] or name in made["failed"]:
            return
        made["not_run"].pop(name, None)
        started, rows = time.monotonic(), made.setdefault(name, [])
        print(f"{name} ...", flush=True)
        with self._kept(name):
            for title, piece in pieces():
                key = f"{name}: {title}"
                if key in made["begun"]:
                    continue
                made["begun"].append(key)
                with self._kept(key):
                    for row in piece():
                        rows.append(row)
                        write(self.path, made)
        made["seconds"][name] = round(time.monotonic() - started, 1)
        write(self.path, made)

    @contextmanager
    def _kept(self, key: str) -> Iterator[None]:
        before, self.made["running"] = self.made.get("running"), key
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        write(self.path, self.made)
        try:
            yield
        except Exception:
            self.made["failed"][key] = traceback.format_exc()
            print(self.made["failed"][key], file=sys.stderr, flush=True)
        if key in self.made["failed"]:
            gc.collect()  # what the traceback held
            if why := self._unusable():
                self.made["running"] = None
                write(self.path, self.made)
                sys.exit(f"{key}: the device can be used no more by this process: {why}")
        self.made["running"] = before
        if before is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
