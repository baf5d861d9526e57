"""The demo: many tasks at once through one server, their answers as they stream, and the proof that they were decoded together."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from sun.router.tasks import TaskRegistry
from sun_client import show
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.prompts import PROMPTS
from sun_client.root import Root
from sun_client.server import Ports, Server

if TYPE_CHECKING:
    from sun.messages import StepRecord

SAMPLING = {"temperature": 0, "max_tokens": 64}
STEPS_SHOWN = 6
COLOURS = ("cyan", "green", "magenta", "yellow", "blue")


@dataclass
class Row:
    """One request: what it asked, what came, and when (seconds of time.perf_counter)."""

    task: str
    prompt: str
    answer: str = ""
    tokens: int = 0
    started: float = 0.0
    first: float | None = None
    last: float = 0.0
    done: bool = False
    error: str | None = None

    def run(self, client: SunClient) -> None:
        """Ask and fill in, in a thread of its own."""
        self.started = time.perf_counter()
        try:
            for piece in client.stream(self.task, self.prompt, sampling=SAMPLING):
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.answer += piece.text
                self.tokens += len(piece.token_ids)
        except SunError as error:
            self.error = str(error)
        self.done = True

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token."""
        return None if self.first is None else (self.first - self.started) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first."""
        return None if self.tokens < 2 else (self.last - self.first) * 1e3 / (self.tokens - 1)


@dataclass
class Steps:
    """What the decode workers did, by worker."""

    by_worker: dict[str, list[StepRecord]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Steps in all."""
        return sum(map(len, self.by_worker.values()))

    @property
    def mixed(self) -> int:
        """Steps that held sequences of more than one task."""
        return sum(len(step.tasks) > 1 for steps in self.by_worker.values() for step in steps)

    def lines(self, limit: int) -> list[str]:
        """The ``limit`` steps with the most tasks and sequences, each unlike the others, as a line."""
        best: dict[tuple, tuple] = {}
        for worker, steps in self.by_worker.items():
            for step in steps:
                best.setdefault((worker, *sorted(step.tasks.items())), (worker, step))
        chosen = sorted(best.values(), key=lambda ws: (-len(ws[1].tasks), -sum(ws[1].tasks.values())))[:limit]
        return [
            f"{worker} step {step.step}: " + ", ".join(f"{task} {count}" for task, count in sorted(step.tasks.items()))
            for worker, step in sorted(chosen, key=lambda ws: (ws[0], ws[1].step))]


def run(root: Root, ports: Ports = Ports()) -> int:
    """Run the demo. Returns the exit code: 1 if a request failed, no step held more than one task, or something was left behind.

    Raises SunError if a task is missing or the server does not start.
    """
    have = TaskRegistry(root.models).names()
    if missing := [task for task in PROMPTS if task not in have]:
        raise SunError(f"the demo asks the tasks {', '.join(PROMPTS)}; missing here: {', '.join(missing)}; `sun setup` adds them")
    server = Server(root.path, ports)
    try:
        show.start(server)
        questions = sum(map(len, PROMPTS.values()))
        show.say(f"tritonserver is up (gRPC {server.host}:{ports.grpc}); asking {questions} questions of {len(PROMPTS)} tasks at once")
        with SunClient(f"{server.host}:{ports.grpc}") as client:
            rows = ask_all(client)
            steps = Steps({worker: client.worker_stats(worker).steps for worker in client.workers()})
    finally:
        show.stop(server)
    report(rows, steps)
    left = server.leftovers()
    clean = "The server is stopped: none of its processes is left, and nothing of it in /dev/shm."
    show.say(f"Left behind: {', '.join(left)}." if left else clean)
    failed = sum(row.error is not None for row in rows)
    if failed:
        show.say(f"{failed} of {len(rows)} requests failed.", "red")
    if not steps.mixed:
        show.say("No step held more than one task.", "red")
    return int(bool(failed or left or not steps.mixed))


def ask_all(client: SunClient) -> list[Row]:
    """Ask everything at once and show the answers as they stream; on no terminal, a line for each that is done."""
    # Alternating, so that the tasks arrive mixed.
    rows = [Row(task, prompt) for prompts in zip(*PROMPTS.values(), strict=True) for task, prompt in zip(PROMPTS, prompts, strict=True)]
    threads = [threading.Thread(target=row.run, args=(client,), daemon=True) for row in rows]
    for thread in threads:
        thread.start()
    if show.console.is_terminal:
        # Short rows while it runs: a terminal can only redraw what fits on it. At the end the whole answers.
        with Live(console=show.console, auto_refresh=False, vertical_overflow="crop", transient=True) as live:
            while not all(row.done for row in rows):
                live.update(table(rows, short=True), refresh=True)
                time.sleep(0.1)
        show.console.print(table(rows, short=False))
    else:
        waiting = list(rows)
        while waiting:
            for row in [row for row in waiting if row.done]:
                waiting.remove(row)
                times = f"TTFT {_ms(row.ttft_ms)} ms, TPOT {_ms(row.tpot_ms)} ms"
                show.say(f"{row.task}: {row.prompt} -> {_line(row.error or row.answer)} [{times}]")
            time.sleep(0.05)
    return rows


def table(rows: list[Row], short: bool) -> Table:
    """The rows, by task. short: one line each."""
    colours = dict(zip(PROMPTS, COLOURS, strict=False))
    shown = Table(expand=True)
    shown.add_column("task")
    shown.add_column("prompt", ratio=2, no_wrap=short, overflow="ellipsis" if short else "fold")
    shown.add_column("answer", ratio=3, no_wrap=short, overflow="ellipsis" if short else "fold")
    for name in ("TTFT ms", "TPOT ms"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: list(PROMPTS).index(row.task)):
        answer = Text(_line(row.error), style="red") if row.error else Text(_line(row.answer) if short else row.answer.strip())
        shown.add_row(Text(row.task, style=colours.get(row.task, "")), Text(row.prompt), answer, _ms(row.ttft_ms), _ms(row.tpot_ms))
    return shown


def report(rows: list[Row], steps: Steps) -> None:
    """Which tasks shared steps, and how often."""
    show.say("\nThe fullest steps of the shared decode module, and how many sequences of each task they held:")
    for line in steps.lines(STEPS_SHOWN):
        show.say(f"  {line}")
    done, tokens = sum(row.error is None for row in rows), sum(row.tokens for row in rows)
    workers = len(steps.by_worker)
    show.say(f"{done} answers, {tokens} tokens: of {steps.total} steps on {workers} workers, {steps.mixed} held several tasks.", "bold")


def _line(text: str) -> str:
    return " ".join(text.split())


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
