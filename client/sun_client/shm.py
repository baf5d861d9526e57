"""A server's files in /dev/shm: for its own user alone while it runs, and swept when it is killed, without touching anyone else's."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from sun.stubs import stat

SHM = Path("/dev/shm")
REGION = re.compile(r"triton_\w+_backend_shm_region_[0-9a-f-]{36}")
"""Names of the regions of Triton's Python backend; the word in them is the backend's name."""


def processes(session: int) -> list[int]:
    """Pids of the living processes of a session (zombies do not live)."""
    return [pid for pid in _pids() if (seen := stat(pid)) and seen.session == session and seen.lives]


def mapped(pid: int) -> set[str]:
    """Files of /dev/shm that a process has mapped, by their path in it; none for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = [line.split(maxsplit=5)[5] for line in lines if f" {SHM}/" in line]
    return {path.removeprefix(f"{SHM}/") for path in paths if not path.endswith(" (deleted)")}


def session_files(session: int) -> set[str]:
    """Files of /dev/shm that a session's processes have mapped now."""
    return set().union(*map(mapped, processes(session)))


def keep_private(files: set[str]) -> None:
    """Let nobody but this user read the backend's regions among ``files`` that are this user's.

    Requests pass through them, and Triton makes them readable for all, whatever the umask (24.10). Who has one open keeps it.
    """
    for name in files:
        if REGION.fullmatch(name):
            with contextlib.suppress(OSError):  # gone meanwhile, another user's, or a link
                fd = os.open(SHM / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(fd).st_uid == os.getuid():
                        os.fchmod(fd, 0o600)
                finally:
                    os.close(fd)


def remaining(files: set[str]) -> set[str]:
    """Those of ``files`` that still lie in /dev/shm and that no living process maps."""
    left = {name for name in files if (SHM / name).exists()}
    return left.difference(*map(mapped, _pids())) if left else left


def sweep(files: set[str]) -> None:
    """Delete the backend's regions among what `remaining` finds. All else has an owner that sweeps it."""
    for name in remaining(files):
        if REGION.fullmatch(name):
            (SHM / name).unlink(missing_ok=True)


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
