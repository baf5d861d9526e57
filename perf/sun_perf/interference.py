"""How much prefill slows decode, by how they share the cores: `python -m sun_perf.interference`.

Real engines, a process each: a decode worker with a steady batch, and prefill modules fed with prompts, back to back or paced. All
ways of sharing take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from sun.cores import format_cores
from sun_client.errors import SunError
from sun_client.root import Root
from sun_client.show import say
from sun_perf import interference_engines as engines
from sun_perf.interference_engines import Engines, Seat, Work
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result
from sun_perf.samples import percentiles, ratio

PARTS = ("decode_step_ms", "prefill_ms")


@dataclass(frozen=True)
class Turn:
    """ms between a decode worker's steps and ms of prefill's prompts, empty for the one that is idle. cpus: how many CPUs' time prefill had."""

    decode_step_ms: list[float]
    prefill_ms: list[float]
    cpus: float


@dataclass(frozen=True)
class Way:
    """Who runs, and where; None: nobody."""

    name: str
    decode: Seat | None
    prefill: Seat | None


def ways(cores: Sequence[int], threads: int = 1, nices: Sequence[int] = (10, 19)) -> list[Way]:
    """All that are compared, the two that run alone first. Decode's own are the first ``threads`` cores, prefill's the others."""
    own, others = format_cores(cores[:threads]), format_cores(cores[threads:])
    made = [Way("decode alone", Seat(), None), Way("prefill alone", None, Seat())]
    if len(cores) >= 2 * threads:
        made.append(Way("cores of their own", Seat(own), Seat(others)))
    for name, place in (("anywhere", ""), ("the same cores", own)):
        made += [Way(name + (f", prefill nice {nice}" if nice else ""), Seat(place), Seat(place, nice)) for nice in (0, *nices)]
    return made


def turn(running: Engines, way: Way, work: Work) -> Turn:
    """One turn of a way."""
    decode = running.get(engines.decode, way.decode) if way.decode else None
    prefills = [running.get(engines.prefill, way.prefill, number) for number in range(work.prefills)] if way.prefill else []
    for prefill in prefills:
        prefill.tell()
    for prefill in prefills:
        prefill.answer()
    started, used, gaps = time.monotonic(), sum(prefill.cpu_s for prefill in prefills), []
    if decode:
        decode.tell()
        gaps = decode.answer()
    else:
        time.sleep(work.alone_s)
    cpus = (sum(prefill.cpu_s for prefill in prefills) - used) / (time.monotonic() - started)
    for prefill in prefills:
        prefill.tell()
    return Turn(gaps, [ms for prefill in prefills for ms in prefill.answer()], cpus)


def report(work: Work, compared: Sequence[Way], rounds: int) -> dict:
    """What `interference.json` holds; see `summary`."""
    seen: dict[str, list[Turn]] = {way.name: [] for way in compared}
    with ExitStack() as stack:
        running = Engines(work, stack)
        for number in range(rounds):
            for way in compared:
                say(f"round {number + 1} of {rounds}: {way.name}")
                seen[way.name].append(turn(running, way, work))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(work).items()}
    return {
        "machine": machine(), "commit": commit(RESULTS), "cores": format_cores(os.sched_getaffinity(0)), "rounds": rounds, "work": settings,
        "ways": [{**asdict(way), **summary(way, seen, compared)} for way in compared]}


def summary(way: Way, seen: dict[str, list[Turn]], compared: Sequence[Way]) -> dict:
    """Of a way, over all rounds: p50 and p95 of its steps and prompts, and each round's median over that round's where it ran alone; None
    where there are none: it was idle, or starved. prefill_cpus: the CPUs' time that prefill had, which shows that also where no prompt ended.
    """
    alone = dict(zip(PARTS, (
        next(other.name for other in compared if other.prefill is None), next(other.name for other in compared if other.decode is None)), strict=True))
    made: dict = {"prefill_cpus": round(statistics.median(turn.cpus for turn in seen[way.name]), 3) if way.prefill else None}
    for part in PARTS:
        times = [ms for turn in seen[way.name] for ms in getattr(turn, part)]
        pairs = [(getattr(turn, part), getattr(other, part)) for turn, other in zip(seen[way.name], seen[alone[part]], strict=True)]
        ratios = [(statistics.median(ours), statistics.median(theirs)) for ours, theirs in pairs if ours and theirs]
        made[part] = {**percentiles(times), "n": len(times), "over_alone": ratio(ratios) if ratios else None} if times else None
    return made


def line(row: dict) -> str:
    """A way as a line of the table."""
    cells = []
    for part in PARTS:
        found = row[part]
        over = f"{found['over_alone']['median']:.2f}" if found and found["over_alone"] else "-"
        cells.append(f"{found['p50']:10.1f} {found['p95']:10.1f} {over:>8}" if found else f"{'-':>10} {'-':>10} {'-':>8}")
    return f"{row['name']:32}" + "  ".join(cells) + ("" if row["prefill_cpus"] is None else f"{row['prefill_cpus']:10.2f}")


def main() -> None:
    """Print a table and write `perf/results/interference.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefills", type=int, default=1, help="prefill modules, each with prompts of its own")
    parser.add_argument("--gap-ms", type=float, default=0, help="between a prompt's end and the next one's start; 0: back to back")
    parser.add_argument("--batch", type=int, default=8, help="sequences that decode")
    parser.add_argument("--steps", type=int, default=60, help="decode steps a turn")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--scheme", default="fp32", help="of the decode module")
    parser.add_argument("--out", type=Path, default=RESULTS / "interference.json")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the engines' processes, while they load
    root = Root.find()
    folder = next(iter(sorted(root.models.glob("prefill_*/1"))), None)
    if folder is None:
        raise SystemExit(f"{root.models}: there is no task; `sun setup` adds the shipped ones")
    work = Work(
        root.base, folder, batch=args.batch, steps=args.steps, prompt=args.prompt, gap_ms=args.gap_ms, prefills=args.prefills,
        threads=args.threads, scheme=args.scheme)
    try:
        made = report(work, ways(sorted(os.sched_getaffinity(0)), args.threads), args.rounds)
    except (SunError, RuntimeError) as error:
        raise SystemExit(f"interference: {error}") from error
    print(f"{'':32}{'step p50':>10} {'p95 ms':>10} {'x alone':>8}  {'prompt p50':>10} {'p95 ms':>10} {'x alone':>8}{'CPUs':>10}")
    for row in made["ways"]:
        print(line(row))
    write_result(args.out, made)


if __name__ == "__main__":
    main()
