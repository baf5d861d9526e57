"""Memory of a running server: proportional set size (PSS), in which a page that processes share is split among them."""

from __future__ import annotations

import re
from pathlib import Path

from sun_client import shm

ROLES = {"prefill": re.compile(r"prefill_\w+"), "decode": re.compile(r"decode_\w+"), "router": re.compile(r"sun_\d+_\d+")}
"""What a stub's model instance is called, by role."""
OTHER = "server"


def pss_mb(session: int) -> dict[str, float]:
    """PSS in MiB of a server's processes by role (prefill, decode, router, and the server itself), and in total."""
    sums = dict.fromkeys((*ROLES, OTHER), 0)
    for pid in shm.processes(session):
        sums[_role(pid)] += _pss_kb(pid)
    return {**{role: round(kb / 1024, 1) for role, kb in sums.items()}, "total": round(sum(sums.values()) / 1024, 1)}


def _role(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return next((role for role, name in ROLES.items() if any(map(name.fullmatch, words))), OTHER)


def _pss_kb(pid: int) -> int:
    """PSS in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
