"""Measure what the simulation needs of this machine: `python -m sun_perf.calibrate` writes perf/results/calibration.json."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sun.local import LocalFleet
    from sun_perf.simulation.costs import PrefillRow, StepRow

RESULTS = Path(__file__).resolve().parents[1] / "results"
PATH = RESULTS / "calibration.json"
BATCHES = (1, 4, 8, 16, 32)
CONTEXTS = (128, 256, 512)
PROMPTS = (32, 64, 128, 256, 384, 512, 1024)
STEPS = 4
ROUNDS = 3
TOKEN_BUDGET = 512
JOINING = 32  # most steps that a batch takes to be complete, its sequences joining one after the other
PATIENCE_S = 120.0


def measure_steps(fleet: LocalFleet, scheme: str, threads: int, batches=BATCHES, contexts=CONTEXTS, rounds: int = ROUNDS) -> list[StepRow]:
    """Median ms of a decode worker's steps, sampling included, by batch and context.

    Batches and contexts take turns, so that other load on the machine hits all alike. fleet: one worker with room for the largest batch.
    """
    from sun_perf.simulation.costs import StepRow

    task = next(iter(fleet.prefills))
    prompts = {context: [1] * context for context in contexts}
    shipments = {context: fleet.prefill(task, prompt[:-1]) for context, prompt in prompts.items()}
    times: dict[tuple[int, int], list[float]] = {(batch, context): [] for batch in batches for context in contexts}
    for _ in range(rounds):
        for (batch, context), kept in times.items():
            kept += _full_steps(fleet, task, prompts[context], shipments[context], batch)
    return [StepRow(scheme, threads, batch, context, round(statistics.median(kept), 3)) for (batch, context), kept in times.items()]


def _full_steps(fleet: LocalFleet, task: str, prompt: list[int], shipment: list[bytes], batch: int) -> list[float]:
    """ms of ``STEPS`` steps of ``batch`` copies of one sequence, from when all of them have joined."""
    from sun.decode.params import SamplingParams
    from sun.messages import Admit

    engine = next(iter(fleet.decodes.values()))
    before = engine.stats().step
    params = SamplingParams(temperature=0, max_tokens=STEPS + JOINING, ignore_eos=True)
    ids = [f"{before}-{i}" for i in range(batch)]
    for name in ids:
        engine.admit(Admit(id=name, router="calibrate", task=task, prompt=prompt, params=params), shipment)
    until = time.monotonic() + PATIENCE_S
    while True:
        state = engine.stats(before)
        full = [record.ms for record in state.steps if sum(record.tasks.values()) == batch]
        if len(full) > STEPS:  # the first of them may have met the last pull
            break
        if time.monotonic() > until:
            raise RuntimeError(f"the decode worker ran {len(full)} steps of {batch} sequences in {PATIENCE_S:g} s; the machine is too busy to measure")
        time.sleep(0.005)
    engine.abort(ids)
    while engine.stats().running + engine.stats().waiting:
        time.sleep(0.005)
    return full[1 : STEPS + 1]


def measure_prefill(fleet: LocalFleet, threads: int, prompts=PROMPTS, rounds: int = ROUNDS) -> list[PrefillRow]:
    """Median ms of prompts alone, by length, and of pulling their KV into a slot."""
    from sun_perf.simulation.costs import PrefillRow

    task = next(iter(fleet.prefills))
    times: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in prompts}
    fleet.prefill(task, [1] * min(prompts))  # warms up
    for _ in range(rounds):
        for tokens, kept in times.items():
            started = time.perf_counter()
            shipment = fleet.prefill(task, [1] * tokens)
            published = time.perf_counter()
            _pull(fleet, shipment)
            kept.append((published - started, time.perf_counter() - published))
    return [
        PrefillRow(threads, tokens, *(round(1e3 * statistics.median(column), 3) for column in zip(*kept, strict=True)))
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


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="fp32", help="of the decode module")
    parser.add_argument("--threads", type=int, default=1, help="of every worker")
    parser.add_argument("--steps", type=Path, help="take decode steps from this file (perf/results/steps.json) in place of measuring them")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch reads it once, when it is imported

    import msgspec

    from sun.local import LocalFleet
    from sun_client.root import Root
    from sun_perf.machine import commit, machine
    from sun_perf.simulation.calibration import Calibration, Steps, read
    from sun_perf.simulation.costs import Fit

    root = Root.find()
    folder = next(iter(sorted(root.models.glob("prefill_*/1"))), None)
    if folder is None:
        raise SystemExit(f"{root.models}: there is no task; `sun setup` adds the shipped ones")
    room = max(BATCHES) * (max(CONTEXTS) + STEPS + JOINING)
    fleet = LocalFleet(root.base, {folder.parent.name.removeprefix("prefill_"): folder}, kv_tokens=room, token_budget=TOKEN_BUDGET, max_batch=max(BATCHES), scheme=args.scheme)
    try:
        prefill = measure_prefill(fleet, args.threads)
        steps = read(args.steps, Steps).steps if args.steps else measure_steps(fleet, args.scheme, args.threads)
    finally:
        fleet.close()
    made = Calibration(machine=machine(), commit=commit(root.path), steps=steps, prefill=prefill, token_budget=TOKEN_BUDGET)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")

    def line(name: str, fit: Fit) -> str:
        return f"{name}: fit of {fit.rows} rows, relative error {fit.median:.1%} at the median, {fit.worst:.1%} at worst"

    print(f"{args.out}\n{line('decode steps', made.step_time(args.scheme, args.threads).fit)}\n{line('prefill', made.prefill_time(args.threads).fit)}")


if __name__ == "__main__":
    main()
