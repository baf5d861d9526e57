"""The request log: one JSON line for each request that ended or was refused, in a file that never grows past its bound."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from sun.router.record import Record

FILE_BYTES, OLD_FILES = 16 << 20, 3
"""A file of so many bytes becomes `<name>.1`, and that `<name>.2`; so many old ones are kept."""
ENV, OFF = "SUN_REQUEST_LOG", "off"
FIELD = re.compile(r"([\w.\[\]-]{1,64}): ")
"""How the errors that name a field begin. The rest may repeat what the client sent, and is not for a log without prompts."""


class Journal:
    """A `sun.router.reports.Sink`. prompts: whether the lines hold the messages, and what errors say."""

    name = "request_log"

    def __init__(self, path: Path, prompts: bool = False):
        self._prompts = prompts
        self._file = _File(path)

    def write(self, record: Record) -> None:
        """Append a line. Raises OSError if it cannot be written; the file is opened anew for the next."""
        self._file.emit(logging.makeLogRecord({"msg": json.dumps(line(record, self._prompts), separators=(",", ":"))}))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File(RotatingFileHandler):
    """Rotation by the standard library; but what goes wrong is raised, and the file is for its owner alone."""

    def __init__(self, path: Path):
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="ascii", delay=True)

    def _open(self) -> IO[str]:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
        raise  # in logging's own except block


def configured(setting: str, folder: Path, prompts: bool) -> Journal | None:
    """The request log that a setting names: a file, absolute or from ``folder``; the environment's `SUN_REQUEST_LOG` without one; or "off"."""
    path = setting or os.environ.get(ENV) or OFF
    return None if path == OFF else Journal(folder / path, prompts)


def line(record: Record, prompts: bool = False) -> dict[str, Any]:
    """A record as a JSON object. What did not happen is left out; times are in milliseconds."""
    error = record.error and FIELD.match(str(record.error))
    ended_ns = record.arrived_ns + int(record.total_s * 1e9)
    times = {"queue_ms": record.queue_s, "prefill_ms": record.prefill_s, "handoff_ms": record.handoff_s, "ttft_ms": record.ttft_s, "tpot_ms": record.tpot_s,
             "total_ms": record.total_s}
    facts = {
        "time": datetime.fromtimestamp(ended_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id or record.id, "sun_id": record.id, "task": record.task or record.asked, "key": record.key,
        "finish_reason": None if record.error else record.outcome, "error": record.outcome if record.error else None, "field": error and error[1],
        "prompt_tokens": record.prompt, "output_tokens": record.tokens,
        **{name: None if seconds is None else round(seconds * 1e3, 1) for name, seconds in times.items()},
        "workers": record.workers, "moves": record.moves,
        **({"messages": record.messages, "error_text": record.error and str(record.error)} if prompts else {}),
    }
    return {name: value for name, value in facts.items() if value not in (None, "", [])}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
