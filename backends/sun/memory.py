"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

CGROUP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")
GIB = 1 << 30


def available() -> int:
    """Bytes: what the kernel can give without swapping, or less where a container's limit (cgroup v2) leaves less."""
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    # Files' pages count as used, but are given up when others need them.
    return free if limit == "max" else max(0, min(free, int(limit) - int(used) + int(pages.get("inactive_file", 0))))
