"""Measure what the simulation needs of this machine: `python -m sun_perf.calibrate` writes perf/results/calibration.json."""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sun_perf.results import RESULTS

if TYPE_CHECKING:
    from sun.local import LocalFleet
    from sun_perf.simulation.costs import PrefillRow, StepRow

PATH = RESULTS / "calibration.json"
BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (128, 256, 512)
PROMPTS = (32, 64, 128, 256, 512)
STEPS = 5
ROUNDS = 2
TOKEN_BUDGET = 512
JOINING = 32  # most steps that a batch takes to be complete, its sequences joining one after the other


@dataclass(frozen=True)
class Watch:
    """How times are taken: the clock, in seconds, and which of several rounds counts."""

    clock: Callable[[], float]
    of: Callable[[list[float]], float]


AS_IT_IS = Watch(time.perf_counter, statistics.median)


def undisturbed(threads: int) -> Watch:
    """Leaves out, as far as that goes, what others do on the machine: the simulation's workers have their cores to themselves.

    Disturbance only lengthens, so the shortest round counts. With one thread a worker, and one worker at a time at work, CPU time
    leaves out when others ran instead.
    """
    return Watch(time.process_time if threads == 1 else time.perf_counter, min)


def measure_steps(fleet: LocalFleet, scheme: str, threads: int, watch: Watch, batches=BATCHES, contexts=CONTEXTS,
                  rounds: int = ROUNDS) -> list[StepRow]:
    """ms of a decode worker's steps by batch and context, with sampling and reporting.

    Batches and contexts take turns, so that other load on the machine hits all alike. fleet: with room for the largest batch on its first worker.
    """
    from sun_perf.simulation.costs import StepRow

    task = next(iter(fleet.prefills))
    prompts = {context: [1] * context for context in contexts}
    shipments = {context: fleet.prefill(task, prompt[:-1]) for context, prompt in prompts.items()}
    times: dict[tuple[int, int], list[float]] = {(batch, context): [] for batch in batches for context in contexts}
    for _ in range(rounds):
        for (batch, context), kept in times.items():
            kept.append(_step_ms(fleet, task, prompts[context], shipments[context], batch, watch.clock))
    return [StepRow(scheme, threads, batch, context, round(watch.of(kept), 3)) for (batch, context), kept in times.items()]


def _step_ms(fleet: LocalFleet, task: str, prompt: list[int], shipment: list[bytes], batch: int, clock: Callable[[], float]) -> float:
    """Mean ms of ``STEPS`` steps of ``batch`` copies of one sequence, once all of them have joined."""
    ends = step_ends(fleet, task, prompt, shipment, batch, STEPS, clock)
    return 1e3 * (ends[-1] - ends[0]) / STEPS


def step_ends(fleet: LocalFleet, task: str, prompt: list[int], shipment: list[bytes], batch: int, steps: int,
              clock: Callable[[], float]) -> list[float]:
    """When each of ``steps`` + 1 steps of ``batch`` copies of one sequence had ended, once all of them had joined. Raises RuntimeError if they never did."""
    from sun.decode.params import SamplingParams
    from sun.messages import Admit

    worker, router = next(iter(fleet.decodes)), secrets.token_hex(8)
    params = SamplingParams(temperature=0, max_tokens=steps + JOINING, ignore_eos=True)
    ids = [f"{router}-{i}" for i in range(batch)]
    for name in ids:
        fleet.admit(worker, Admit(id=name, router=router, task=task, prompt=prompt, params=params), shipment)
    full: list[float] = []
    for step in fleet.listen(worker, router):
        if len(step.events) == batch and len(full) < steps + 2:  # the first full one may have met the last pull
            full.append(clock())
            if len(full) == steps + 2:
                fleet.abort(worker, ids)
    if len(full) < steps + 2:
        raise RuntimeError(f"sequences of {len(prompt)} tokens ended before {steps} steps of all {batch}; the worker's max_batch or kv_tokens is too small for them")
    return full[1:]


def measure_prefill(fleet: LocalFleet, threads: int, watch: Watch, prompts=PROMPTS, rounds: int = ROUNDS) -> list[PrefillRow]:
    """ms of prompts alone, by length, and of pulling their KV into a slot."""
    from sun_perf.simulation.costs import PrefillRow

    task = next(iter(fleet.prefills))
    times: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in prompts}
    fleet.prefill(task, [1] * min(prompts))  # warms up
    for _ in range(rounds):
        for tokens, kept in times.items():
            started = watch.clock()
            shipment = fleet.prefill(task, [1] * tokens)
            published = watch.clock()
            _pull(fleet, shipment)
            kept.append((published - started, watch.clock() - published))
    return [
        PrefillRow(threads, tokens, *(round(1e3 * watch.of(column), 3) for column in zip(*kept, strict=True)))
        for tokens, kept in times.items()]


def _pull(fleet: LocalFleet, shipment: list[bytes]) -> None:
    """Check a KV and copy it into a slot of an idle worker's pool, as its engine does."""
    from sun.handoff.kv import verified_kv
    from sun.handoff.ticket import parse

    engine, ticket = next(iter(fleet.decodes.values())), parse(shipment[0])
    slot = engine.pool.take(ticket.tokens)
    with engine.transports[ticket.transport].pull(ticket, shipment) as buffer:
        engine.pool.view(slot, ticket.tokens).copy_(verified_kv(ticket, buffer))
    engine.pool.give_back(slot)


def measure(base: Path, task_dirs: dict[str, Path], schemes: Sequence[str], threads: int, batches=BATCHES, contexts=CONTEXTS,
            prompts=PROMPTS) -> tuple[list[StepRow], list[PrefillRow]]:
    """Steps of a decode module in each number format, one after the other; prefill, which is float32 beside all of them, once."""
    from sun.local import LocalFleet

    room, watch = max(batches) * (max(contexts) + STEPS + JOINING), undisturbed(threads)
    steps: list[StepRow] = []
    prefill: list[PrefillRow] = []
    for scheme in schemes:
        fleet = LocalFleet(base, task_dirs, kv_tokens=room, token_budget=TOKEN_BUDGET, max_batch=max(batches), scheme=scheme, threads=threads)
        try:
            prefill = prefill or measure_prefill(fleet, threads, watch, prompts)
            steps += measure_steps(fleet, scheme, threads, watch, batches, contexts)
        finally:
            fleet.close()
    return steps, prefill


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", nargs="+", default=["fp32"], help="of the decode module; several: fp32 int8")
    parser.add_argument("--threads", type=int, default=1, help="of every worker")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch reads it once, when it is imported

    from sun.readable import readable_json
    from sun_client.root import Root
    from sun_perf.machine import commit, machine
    from sun_perf.simulation.calibration import Calibration
    from sun_perf.simulation.costs import Fit

    root = Root.find()
    folder = next(iter(sorted(root.models.glob("prefill_*/1"))), None)
    if folder is None:
        raise SystemExit(f"{root.models}: there is no task; `sun setup` adds the shipped ones")
    steps, prefill = measure(root.base, {folder.parent.name.removeprefix("prefill_"): folder}, args.scheme, args.threads)
    made = Calibration(machine=machine(), commit=commit(root.path), steps=steps, prefill=prefill, token_budget=TOKEN_BUDGET)
    args.out.write_bytes(readable_json(made))

    def line(name: str, fit: Fit) -> str:
        return f"{name}: fit of {fit.rows} rows, relative error {fit.median:.1%} at the median, {fit.worst:.1%} at worst"

    print(args.out)
    for scheme in args.scheme:
        print(line(f"decode steps, {scheme}", made.step_time(scheme, args.threads).fit))
    print(line("prefill", made.prefill_time(args.threads).fit))


if __name__ == "__main__":
    main()
