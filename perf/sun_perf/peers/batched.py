"""transformers as a peer: waves go to the worker of `generate`, whole, and come back whole; so there is neither TTFT nor TPOT."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

from sun_perf.peers.child import Child
from sun_perf.peers.prompts import TASKS, Ask
from sun_perf.peers.system import Place, System
from sun_perf.peers.wave import Wave

# glibc would give a batch's large blocks back and fault them in anew at every step.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "100000000"}


class Batched(System):
    """mode: see `generate.MODES`."""

    peer = "transformers"

    def __init__(self, place: Place, mode: str):
        super().__init__(place)
        self.mode = mode
        self.settings = {
            "engine": f"transformers=={version('transformers')}, torch=={version('torch')}", "dtype": "float32", "attention": "sdpa",
            "threads": place.threads, "tasks": mode, "interface": "generate, whole batches"}
        self._prompts = place.prompts()
        self._child: Child | None = None

    def start(self) -> None:
        """Start the worker and wait until its models are loaded."""
        command = [sys.executable, "-m", "sun_perf.peers.generate", "--mode", self.mode, "--base", str(self.place.root.base)]
        command += ["--threads", str(self.place.threads)]
        for task in TASKS:
            command += ["--task", task, str(self.place.adapter(task) or "")]
        self._child = Child(command, self.place.runs / self.peer / f"{self.mode}.log", ALLOCATOR, pipes=True)
        self._line()

    def stop(self) -> None:
        """Stop the worker."""
        if self._child is not None:
            self._child.stop()

    def sessions(self) -> list[int]:
        """The worker's."""
        return [self._child.process.pid] if self._child is not None else []

    def wave(self, asks: Sequence[Ask], tokens: int) -> Wave:
        """One batch, or one a task. Raises RuntimeError if a row has not ``tokens`` tokens."""
        started = time.perf_counter()
        rows = [[ask.task, self._prompts.encode([{"role": "user", "content": ask.text}])] for ask in asks]
        print(json.dumps({"rows": rows, "tokens": tokens}), file=self._child.process.stdin, flush=True)
        made = json.loads(self._line())
        seconds = time.perf_counter() - started
        if made != [tokens] * len(asks):
            raise RuntimeError(f"transformers {self.mode}: rows of {sorted(set(made))} tokens came, {tokens} were asked for")
        return Wave(sum(made), seconds)

    def _line(self) -> str:
        line = self._child.process.stdout.readline()
        if not line:
            self._child.process.wait()
            self._child.check()
        return line
