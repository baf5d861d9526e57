"""A long mixed load with cancels, deadlines, bad requests and a killed decode worker every minute: what is answered must be right.

`python -m sun_perf.soak --minutes 30` serves the repository's own tasks, writes `perf/results/soak.json`, and exits with 1 if anything was
lost, repeated, wrong or left behind, or has grown (`GROWTH`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil

from sun.handoff.shm import published
from sun.router.tasks import TaskRegistry
from sun.stubs import Stubs
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.server import Server
from sun_client.shm import session_files
from sun_client.show import say
from sun_client.supervisor import Supervisor
from sun_perf.machine import commit, machine
from sun_perf.own_server import ROOT, own_server
from sun_perf.results import RESULTS, write_result

PROMPTS = ("find big files", "My card was swallowed by the machine", "Tom has 3 boxes of 12 eggs and breaks 5. How many are whole?", "hello " * 60)
SAMPLINGS = ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 7}, {"temperature": 1.1, "seed": 3, "top_k": 8, "repetition_penalty": 1.2})
LENGTHS = (4, 24, 64)
AT_ONCE = 8
WATCH_S = 2.0
"""Nobody answers for a killed worker."""
GROWTH = {"server_mib": 64, "server_files": 4, "server_threads": 8, "router_mib": 32, "router_files": 2, "router_threads": 4, "shared_files": 2}
"""By how much what is held may grow, whatever the time."""
GROWTH_PER_KILL = {"server_files": 1, "server_threads": 35, "shared_files": 1}
"""What Triton keeps of a model's instance if a call was open when its process was killed (24.10)."""


class Soak:
    """A load on a running server. tasks: what is asked; references are what it answers before anything is disturbed.

    watchers: threads that ask the workers for their state all the time, so that a kill meets calls that are under way.
    """

    def __init__(self, server: Server, tasks: list[str], say: Callable[[str], None], watchers: int = 0):
        self.server, self.tasks, self.watchers = server, tasks, watchers
        self.supervisor = Supervisor(server, say)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._client = SunClient(f"127.0.0.1:{server.ports.grpc}")
        self._end = threading.Event()
        self._references: dict[tuple[str, int, int], list[int]] = {}

    def refer(self) -> None:
        """Ask everything once, at its longest: a shorter answer is its beginning."""
        keys = list(itertools.product(self.tasks, range(len(PROMPTS)), range(len(SAMPLINGS))))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self._references = dict(zip(keys, pool.map(lambda key: self._tokens(*key, max(LENGTHS)), keys), strict=True))

    def run(self, seconds: float, kill_every: float) -> dict:
        """Load, kill and look for so long; the report."""
        before = self._held()
        threads = [threading.Thread(target=self._load, args=(seed,), daemon=True) for seed in range(AT_ONCE)]
        threads += [threading.Thread(target=self._watch, daemon=True) for _ in range(self.watchers)]
        for thread in threads:
            thread.start()
        end, kill, rng = time.monotonic() + seconds, time.monotonic() + kill_every / 2, random.Random(0)
        try:
            while time.monotonic() < end:
                self.supervisor.look()
                if time.monotonic() > kill:
                    kill += kill_every
                    self._kill(rng)
                time.sleep(0.5)
        finally:
            self._end.set()
        for thread in threads:
            while thread.is_alive():
                self.supervisor.look()
                thread.join(0.5)
        idle = self._idle()
        after = self._held()
        grown = {name: round(after[name] - before[name], 1) for name in before}
        return {"seconds": seconds, "counts": dict(self.counts), "wrong": self.wrong, "idle_at_the_end": idle,
                "before": before, "after": after, "grown": grown, "too_much": too_much(grown, self.counts["kills"])}

    def _tokens(self, task: str, prompt: int, sampling: int, length: int, timeout: float = 120.0, deadline_s: float | None = None) -> list[int]:
        values = {"max_tokens": length, "ignore_eos": True, **SAMPLINGS[sampling]}
        pieces = self._client.stream(task, PROMPTS[prompt], sampling=values, timeout=timeout, deadline_s=deadline_s)
        return [token for piece in pieces for token in piece.token_ids]

    def _load(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds = {self._ask: 14, self._cancel: 2, self._hurry: 2, self._err: 2}
        while not self._end.is_set():
            (kind,) = rng.choices(list(kinds), kinds.values())
            try:
                kind(rng)
            except Exception as error:
                self.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(SunError):  # one is killed meanwhile
                for worker in self._client.workers():
                    self._client.worker_stats(worker, timeout=WATCH_S)
                    self.counts["worker states"] += 1

    def _draw(self, rng: random.Random) -> tuple[str, int, int]:
        return rng.choice(self.tasks), rng.randrange(len(PROMPTS)), rng.randrange(len(SAMPLINGS))

    def _ask(self, rng: random.Random) -> None:
        key, length = self._draw(rng), rng.choice(LENGTHS)
        tokens = self._tokens(*key, length)
        self.counts["answered"] += 1
        if tokens != self._references[key][:length]:
            self.wrong.append(f"{key}: {tokens} instead of {self._references[key][:length]}")

    def _cancel(self, rng: random.Random) -> None:
        task, prompt, sampling = self._draw(rng)
        stream = self._client.stream(task, PROMPTS[prompt], sampling={"max_tokens": 500, "ignore_eos": True, **SAMPLINGS[sampling]}, timeout=120)
        got: list[int] = []
        while len(got) < rng.randint(1, 8):
            got += next(stream).token_ids
        stream.close()
        self.counts["cancelled"] += 1
        if got[: max(LENGTHS)] != self._references[task, prompt, sampling][: len(got)]:
            self.wrong.append(f"{(task, prompt, sampling)}, cancelled: {got}")

    def _hurry(self, rng: random.Random) -> None:
        seconds, ours = rng.uniform(0.05, 2.0), rng.random() < 0.5
        try:
            self._tokens(*self._draw(rng), 500, **({"timeout": seconds} if ours else {"deadline_s": seconds}))
        except SunError as error:
            if error.code != ("DEADLINE_EXCEEDED" if ours else "DEADLINE"):
                raise
            self.counts["out of time" if ours else "past the server's deadline"] += 1

    def _err(self, rng: random.Random) -> None:
        try:
            self._client.generate(rng.choice(["poetry", "../bash", self.tasks[0]]), rng.choice(PROMPTS), sampling={"top_p": 2})
        except SunError as error:
            if not any(word in str(error) for word in ("task", "top_p")):
                raise
            self.counts["refused"] += 1

    def _kill(self, rng: random.Random) -> None:
        """Kill a decode worker, if one lives."""
        workers = [pids for model, pids in sorted(Stubs(self.server.pid).models().items()) if model.startswith("decode_")]
        for pid in rng.choice(workers) if workers else ():
            os.kill(pid, signal.SIGKILL)
            self.counts["kills"] += 1

    def _idle(self) -> bool:
        """Whether all sequences, slots and tickets are given back within a while."""
        for _ in range(60):
            if self._client.idle() and not published():
                return True
            self.supervisor.look()
            time.sleep(0.5)
        return False

    def _held(self) -> dict[str, float]:
        """Memory, files, threads and files in shared memory of the router, which lives through all kills, and of the server."""
        processes = {"server": psutil.Process(self.server.pid), "router": psutil.Process(next(iter(Stubs(self.server.pid).pids("sun"))))}
        held: dict[str, float] = {}
        for name, process in processes.items():
            memory = process.memory_info()
            held |= {f"{name}_mib": round((memory.rss - memory.shared) / 2**20, 1), f"{name}_files": process.num_fds(), f"{name}_threads": process.num_threads()}
        return {**held, "shared_files": len(session_files(self.server.pid)) + len(published())}


def too_much(grown: dict[str, float], kills: int) -> dict[str, float]:
    """What has grown by more than it may."""
    return {name: by for name, by in grown.items() if by > GROWTH[name] + kills * GROWTH_PER_KILL.get(name, 0)}


def main() -> None:
    """Serve, load, report."""
    parser = argparse.ArgumentParser(prog="python -m sun_perf.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of load (default 30)")
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds between two kills (default 60)")
    parser.add_argument("--watchers", type=int, default=0, help="threads that ask the workers for their state all the time, so that kills meet calls (default 0)")
    parser.add_argument("--port", type=int, default=18300, help="first of three free ports (default 18300)")
    args = parser.parse_args()
    with own_server(args.port) as server:
        soak = Soak(server, TaskRegistry(server.root / "model_repository").names(), say, args.watchers)
        soak.refer()
        report = soak.run(60 * args.minutes, args.kill_every)
    report |= {"kill_every": args.kill_every, "watchers": args.watchers, "machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d"), "left": server.leftovers()}
    write_result(RESULTS / "soak.json", report)
    say(json.dumps({name: report[name] for name in ("counts", "grown", "too_much", "idle_at_the_end", "left")}))
    for line in report["wrong"]:
        say(line, "red")
    sys.exit(1 if report["wrong"] or report["left"] or report["too_much"] or not report["idle_at_the_end"] else 0)


if __name__ == "__main__":
    main()
