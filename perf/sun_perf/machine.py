"""Where a figure was measured, for the results that carry it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
EXTENSIONS = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Flags of `CPUINFO` that make low-bit formats fast, and that torch's name of a CPU's kernels does not tell."""


def machine() -> dict[str, str | int]:
    """CPU model with its instruction sets, CPUs, GPU (if any) and the versions of Python and torch.

    instructions: what torch's kernels are chosen for, then those of `EXTENSIONS` that there are: "AVX512 avx512_vnni avx512_bf16".
    """
    import torch  # here, because a report names a result's machine without it, and it takes seconds

    known = dict(line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line) if CPUINFO.is_file() else {}
    known = {field.strip(): value.strip() for field, value in known.items()}  # of the last CPU; all are alike
    flags = known.get("flags", "").split()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": known.get("model name", platform.processor()),
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name in EXTENSIONS if name in flags)]),
        "cpus": os.cpu_count() or 1, "threads": torch.get_num_threads(), "gpu": gpu,
        "python": platform.python_version(), "torch": str(torch.__version__),  # a class of its own otherwise, which not every encoder takes
    }


def processor(machine: dict) -> str:
    """The processor of a result's `machine` for its report; older results do not have the instruction sets."""
    return ", ".join(filter(None, (machine["cpu"], machine.get("instructions"))))


def in_words(machine: dict) -> str:
    """All that a report says of a result's `machine`."""
    return f"{processor(machine)}, {machine['cpus']} CPUs, GPU {machine['gpu']}, torch {machine['torch']}"


def commit(root: Path) -> str:
    """Short hash of the checkout's commit, with + if files differ from it; "unknown" outside of git.

    Results do not count: what a run has already written changes nothing that it measures.
    """
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        differs = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)perf/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
