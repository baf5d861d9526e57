"""py-spy's samples of a process, and whose time they are: recorded as stacks, counted by our own functions."""

from __future__ import annotations

import linecache
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PIN = "py-spy==0.4.3"
RATE = 100
"""Samples a second."""
FRAME = re.compile(r"(.*) \((.*):(\d+)\)")
OURS = "/backends/sun"
KERNEL = re.compile(r"\bkernels\.(\w+)")
LINEAR = re.compile(r"(\w+)\.packed\(")
WAITING = "waiting for work"
NOT_OURS = "not ours"


class Frame(NamedTuple):
    """A function in a file, at a line."""

    function: str
    file: str
    line: int

    @property
    def plain(self) -> str:
        """The function's name without its class."""
        return self.function.rpartition(".")[2]

    @property
    def ours(self) -> bool:
        """Whether it is the project's."""
        return OURS in self.file

    @property
    def name(self) -> str:
        """Function and file, for a table."""
        return f"{self.function} ({self.file.rpartition('/backends/')[2]})"


@dataclass(frozen=True)
class Stack:
    """Frames from the outermost inwards, and in how many samples they were seen."""

    frames: tuple[Frame, ...]
    count: int

    def inside(self, function: str) -> bool:
        """Whether one of our frames is of a function, by its plain name."""
        return any(frame.ours and frame.plain == function for frame in self.frames)


def parse(raw: str) -> list[Stack]:
    """What py-spy writes as --format raw with --full-filenames. Raises ValueError naming a line that is something else."""
    stacks = []
    for number, line in enumerate(raw.splitlines(), 1):
        text, _, count = line.rpartition(" ")
        frames = [FRAME.fullmatch(frame) for frame in text.split(";")]
        if not count.isdigit():
            raise ValueError(f"py-spy's output, line {number}: no count at the end of {line[:80]!r}")
        # Frames of another form are its own remarks, such as a thread's name.
        stacks.append(Stack(tuple(Frame(m[1], m[2], int(m[3])) for m in frames if m), int(count)))
    return stacks


def part(stack: Stack) -> str:
    """Which part of the work a sample was at: a kernel or linear layer of a decode step, else our innermost function.

    numba's kernels are no Python functions: the line of the step that calls them tells which one it was.
    """
    for frame in reversed(stack.frames):
        if frame.ours and frame.file.endswith("/decode/cpu.py") and frame.plain in ("step", "_logits"):
            text = linecache.getline(frame.file, frame.line)
            if called := KERNEL.search(text):
                return f"kernel {called[1]}"
            if called := LINEAR.search(text):
                return f"linear {called[1].lstrip('_')}"
            return f"{frame.name}, the rest"
    if stack.frames and stack.frames[-1].file.endswith("/threading.py") and stack.frames[-1].plain in ("wait", "wait_for"):
        return WAITING
    named = (frame for frame in reversed(stack.frames) if frame.ours and not frame.plain.startswith("<"))
    return next((frame.name for frame in named), NOT_OURS)


def shares(stacks: Iterable[Stack]) -> dict[str, float]:
    """Part -> its share of all samples but those that wait, largest first."""
    counted: Counter[str] = Counter()
    for stack in stacks:
        counted[part(stack)] += stack.count
    del counted[WAITING]
    return {name: round(count / counted.total(), 4) for name, count in counted.most_common()}


def waiting(stacks: Sequence[Stack]) -> float:
    """Share of samples that wait."""
    total = sum(stack.count for stack in stacks)
    return round(sum(stack.count for stack in stacks if part(stack) == WAITING) / total, 4) if total else 0.0


def py_spy() -> str:
    """Its program. Raises FileNotFoundError saying how to get it."""
    found = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if not found:
        raise FileNotFoundError(f"py-spy is missing: pip install {PIN}")
    return found


def record(pid: int, seconds: int, idle: bool, out: Path) -> Callable[[], list[Stack]]:
    """Start to sample a process; the function returned waits for the end and gives its stacks.

    idle: also of threads that wait. Samples are taken without stopping the process, so that it is as fast as without; a few of them
    are torn and left out. Raises FileNotFoundError without py-spy; the function raises RuntimeError if that fails, as it does for want of rights.
    """
    words = [py_spy(), "record", "--pid", str(pid), "--format", "raw", "--full-filenames", "--nonblocking", "--rate", str(RATE),
             "--duration", str(seconds), "--output", str(out), *(["--idle"] if idle else [])]
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end() -> list[Stack]:
        said, _ = child.communicate()
        if child.returncode:
            raise RuntimeError(f"py-spy failed (it needs root, or kernel.yama.ptrace_scope=0): {said.strip()[-500:]}")
        return parse(out.read_text())

    return end
