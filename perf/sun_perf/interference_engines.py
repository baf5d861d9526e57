"""Real engines in processes of their own, settled on their cores as Triton's models are, for `sun_perf.interference`."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from sun.cores import run_on
from sun_perf.calibrate import JOINING, step_ends


@dataclass(frozen=True)
class Seat:
    """Where an engine runs and how far it lets others go first: see `run_on`."""

    cores: str = ""
    nice: int = 0


@dataclass(frozen=True)
class Work:
    """What the engines have to do.

    base, task: folders of the base and of a task's prefill module. batch, context, steps: of the decode worker, whose steps count once
    all its sequences have joined. prompt: tokens, of the prompts of each of ``prefills`` modules, the next one ``gap_ms`` after one's end.
    alone_s: how long prefill is watched where nothing decodes.
    """

    base: Path
    task: Path
    batch: int = 8
    context: int = 256
    steps: int = 60
    prompt: int = 256
    gap_ms: float = 0.0
    prefills: int = 1
    threads: int = 1
    scheme: str = "fp32"
    alone_s: float = 5.0


def decode(link: Connection, work: Work, seat: Seat) -> None:
    """A decode worker: to each message it answers with ms between the steps of a batch of its own."""
    run_on(seat.cores, work.threads, seat.nice)
    from sun.local import LocalFleet  # torch, which is to find the cores that it may use
    from sun.model.manifest import TaskManifest

    task, room = TaskManifest.load(work.task).name, work.batch * (work.context + work.steps + JOINING)
    fleet = LocalFleet(work.base, {task: work.task}, kv_tokens=room, max_batch=work.batch, scheme=work.scheme, threads=work.threads)
    with closing(fleet):
        prompt = [1] * work.context
        shipment = fleet.prefill(task, prompt[:-1])
        link.send([])
        while link.recv():
            ends = step_ends(fleet, task, prompt, shipment, work.batch, work.steps, time.perf_counter)
            link.send([1e3 * (end - start) for start, end in zip(ends, ends[1:], strict=False)])


def prefill(link: Connection, work: Work, seat: Seat) -> None:
    """A prefill module: a first message starts its prompts, and it answers after one; a second ends them, and it answers with ms of those between."""
    run_on(seat.cores, work.threads, seat.nice)
    from sun.handoff.inline import Inline
    from sun.model.loading import load_prefill
    from sun.prefill.engine import PrefillEngine

    task, model = load_prefill(work.base, work.task)
    with closing(PrefillEngine(model, task, Inline(), threads=work.threads)) as engine:
        link.send([])
        while link.recv():
            times: list[float] = []
            while not link.poll():
                started = time.perf_counter()
                engine.submit([1] * work.prompt).result()
                times.append(1e3 * (time.perf_counter() - started))
                if len(times) == 1:
                    link.send([])
                time.sleep(work.gap_ms / 1e3)
            link.recv()
            link.send(times[1:-1])  # the last one ended when the others had


class Engine:
    """A function of the above in a child process. Its errors are raised here, where its answer is waited for."""

    def __init__(self, run: Callable[[Connection, Work, Seat], None], work: Work, seat: Seat):
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(run, theirs, work, seat), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that its process has used so far."""
        return sum(psutil.Process(self._process.pid).cpu_times()[:2])

    def tell(self) -> None:
        """Send it its next message."""
        self._link.send(True)

    def answer(self) -> list[float]:
        """Its next answer. Raises RuntimeError if it failed or ended instead."""
        try:
            answer = self._link.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an engine's process ended with code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"an engine failed: {answer}")
        return answer

    def close(self) -> None:
        """Have it end, by force if it does not."""
        self._link.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Engines:
    """The processes of a run, one for each seat: started when first asked for, idle until told something."""

    def __init__(self, work: Work, stack: ExitStack):
        self._work, self._stack = work, stack
        self._made: dict[tuple[Callable, Seat, int], Engine] = {}

    def get(self, run: Callable[[Connection, Work, Seat], None], seat: Seat, number: int = 0) -> Engine:
        """The engine of a function, a seat and a number; it is ready."""
        key = (run, seat, number)
        if key not in self._made:
            self._made[key] = Engine(run, self._work, seat)
            self._stack.callback(self._made[key].close)
            self._made[key].answer()
        return self._made[key]


def _child(run: Callable[[Connection, Work, Seat], None], link: Connection, work: Work, seat: Seat) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        run(link, work, seat)
    except (EOFError, BrokenPipeError):  # the parent is done, or gone
        pass
    except Exception as error:
        link.send(f"{type(error).__name__}: {error}")
