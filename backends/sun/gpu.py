"""What keeps this machine from using a GPU."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from sun.watchdog import end


def missing() -> str | None:
    """Why torch has no CUDA device here; None if it has one."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def compiler_missing() -> str | None:
    """What Triton language lacks for the C with which it launches kernels, and which it compiles when it runs; looked for as it does. None if nothing."""
    named = os.environ.get("CC")
    if not (shutil.which("gcc") or shutil.which("clang") if named is None else shutil.which(named)):
        return f"the triton package needs a C compiler, {'neither gcc nor clang is' if named is None else f'CC={named} is not'} on PATH"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.is_file() else f"the triton package needs Python's headers, and there is no {header}"


def capability_missing(device: torch.device, least: tuple[int, int]) -> str | None:
    """Why ``device`` is none of at least this compute capability; the CPU counts as able: Triton's interpreter runs there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]}, {torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"


def lost(device: torch.device) -> str | None:
    """Why this process can use a device no more: after an illegal address, say, every call fails. None if it can, or for a CPU; asked after an error.

    What has failed before says so again when the device is waited for; want of memory, or an argument that was wrong, does not.
    """
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def end_if_lost(who: str, device: torch.device, error: Exception) -> None:
    """After an error, end this process if it can use ``device`` no more, before anybody is told: who is dead is loaded anew and its sequences move,
    who lives on would fail all."""
    if why := lost(device):
        end(f"{who} ends, to be loaded anew: {type(error).__name__}: {error}; the GPU can be used no more: {why}")
