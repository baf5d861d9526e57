"""Where a figure was measured, for the results that carry it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """CPU model, CPUs, GPU (if any) and the versions of Python and torch."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": name, "cpus": os.cpu_count() or 1, "threads": torch.get_num_threads(), "gpu": gpu,
        "python": platform.python_version(), "torch": str(torch.__version__),  # a class of its own otherwise, which not every encoder takes
    }


def commit(root: Path) -> str:
    """Short hash of the checkout's commit, with + if files differ from it; "unknown" outside of git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
