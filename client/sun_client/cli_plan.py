"""`sun plan`: how many prefill and decode workers traffic needs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sun.slots import KV_TOKENS
from sun_client.cli_options import RootOption

if TYPE_CHECKING:
    from rich.table import Table

    from sun_perf.simulation.plan import Demand, Plan

MODES = {"sun": (False,), "partitioned": (True,), "both": (False, True)}
TITLES = {False: "SUN", True: "partitioned"}


def plan(
    rate: Annotated[float, typer.Option(help="Requests a second, all tasks together; arrivals are Poisson.")],
    tasks: Annotated[int, typer.Option(help="Number of tasks, with shares by --alpha.")] = 8,
    alpha: Annotated[float, typer.Option(help="Skew: the k-th task's share is in proportion to k^-alpha (Zipf); 0 is uniform.")] = 0.8,
    shares: Annotated[str | None, typer.Option(help="In place of --tasks and --alpha: banking=0.7,bash=0.2,math=0.1", show_default=False)] = None,
    prompt_mean: Annotated[float, typer.Option(help="Prompt tokens, lognormal.")] = 150,
    prompt_p95: Annotated[float, typer.Option(help="95th percentile; as the mean for prompts of one length.")] = 350,
    output_mean: Annotated[float, typer.Option(help="Output tokens, lognormal.")] = 48,
    output_p95: Annotated[float, typer.Option(help="95th percentile.")] = 110,
    lengths: Annotated[Path | None, typer.Option(
        help='In place of the four: JSONL of real ones, {"num_input_tokens", "num_output_tokens", "task"?}.', show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(help="What requests may generate: the room that they take in the KV pool. Longer outputs are cut.")] = 128,
    ttft_ms: Annotated[float, typer.Option(help="SLO: time to first token.")] = 2000,
    tpot_ms: Annotated[float, typer.Option(help="SLO: time per output token.")] = 150,
    percentile: Annotated[float, typer.Option(help="Of the requests, for both limits.")] = 95,
    mode: Annotated[str, typer.Option(help="sun: one decode pool. partitioned: decode workers for each task. both compares them.")] = "both",
    scheme: Annotated[str, typer.Option(help="Of the decode module, as calibrated.")] = "fp32",
    threads: Annotated[int, typer.Option(help="CPU threads of a worker, as calibrated; each worker has cores of its own.")] = 1,
    max_batch: Annotated[int, typer.Option(help="Sequences a step, at most.")] = 64,
    kv_tokens: Annotated[int, typer.Option(help="Tokens of a decode worker's KV pool.")] = KV_TOKENS,
    calibration: Annotated[Path | None, typer.Option(
        help="Measured times, by `python -m sun_perf.calibrate`. Default: perf/results/calibration.json of the root.", show_default=False)] = None,
    requests: Annotated[int, typer.Option(min=100, help="Fewest requests to simulate.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated traffic.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    root: RootOption = None,
) -> None:
    """How many prefill and decode workers does this traffic need? Simulated with measured times, for SUN and for conventional serving."""
    from sun_client import show
    from sun_client.root import Root
    from sun_perf.machine import processor
    from sun_perf.simulation.calibration import Calibration
    from sun_perf.simulation.fleet import Limits
    from sun_perf.simulation.outcome import Slo
    from sun_perf.simulation.plan import Demand
    from sun_perf.simulation.plan import plan as search
    from sun_perf.simulation.traffic import Lognormal, Traffic, named, read_lengths
    from sun_perf.workload import zipf

    if mode not in MODES:
        raise ValueError(f"--mode: got {mode!r}, expected one of {', '.join(MODES)}")
    measured = Calibration.load(calibration if calibration is not None else Root.find(root).path / "perf" / "results" / "calibration.json")
    drawn = read_lengths(lengths) if lengths is not None else (Lognormal("prompt", prompt_mean, prompt_p95), Lognormal("output", output_mean, output_p95))
    demand = Demand(
        Traffic(rate, read_shares(shares) if shares is not None else named(zipf(tasks, alpha)), drawn, max_tokens),
        Slo(ttft_ms, tpot_ms, percentile), measured.step_time(scheme, threads), measured.prefill_time(threads),
        Limits(max_batch, kv_tokens, measured.token_budget), requests, seed)
    plans: dict[str, Plan] = {}
    for partitioned in MODES[mode]:
        if as_json:  # its output is the object alone
            plans[TITLES[partitioned]] = search(demand, partitioned)
        else:
            with show.working(f"simulating {TITLES[partitioned]}, {len(demand.asked)} requests a run"):
                plans[TITLES[partitioned]] = search(demand, partitioned)
    if as_json:
        print(json.dumps({"machine": measured.machine, "requests": len(demand.asked), "plans": {name: as_object(made) for name, made in plans.items()}}))
    else:
        show.console.print(table(plans, demand))
        show.say(f"Times measured on {processor(measured.machine)} at commit {measured.commit}; each worker on {threads} cores of its own.")


def read_shares(text: str) -> dict[str, float]:
    """"banking=0.7,bash=0.2" as task -> share. Raises ValueError naming the entry at fault."""
    shares: dict[str, float] = {}
    for entry in text.split(","):
        task, _, share = entry.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            raise ValueError(f"--shares: got {entry.strip()!r}, expected task=number") from None
        if not task or task in shares:
            raise ValueError(f"--shares: {entry.strip()!r} names no task, or one that was named before")
        shares[task] = value
    return shares


def as_object(made: Plan) -> dict:
    """A plan for --json: workers by task, and its numbers."""
    return {"prefill": dict(made.prefill or {}), "decode": made.decode if isinstance(made.decode, int) else dict(made.decode), **made.numbers()}


def table(plans: dict[str, Plan], demand: Demand) -> Table:
    """A column per plan; with two, the first over the second."""
    from rich.table import Column, Table

    numbers = {name: made.numbers() for name, made in plans.items()}
    traffic, slo = demand.traffic, demand.slo
    title = f"{traffic.rate:g} requests/s of {len(traffic.shares)} tasks; SLO at p{slo.percentile:g}: TTFT {slo.ttft_ms:g} ms, TPOT {slo.tpot_ms:g} ms"
    shown = Table("", *(Column(name, justify="right") for name in plans), *([Column("ratio", justify="right")] if len(plans) == 2 else []), title=title)

    def row(title: str, key: str, form: str, scale: float = 1.0) -> None:
        values = [scale * n[key] for n in numbers.values()]
        shown.add_row(title, *(format(value, form) for value in values), *([f"{values[0] / values[1]:.2f}"] if len(values) == 2 else []))

    row("decode workers", "decode_workers", ".0f")
    shown.add_row("  for each task", *("shared" if isinstance(made.decode, int) else spread(made.decode) for made in plans.values()))
    row("prefill workers", "prefill_workers", ".0f")
    shown.add_row("  for each task", *(spread(made.prefill) for made in plans.values()))
    for name, share in product(("ttft", "tpot"), (50, 95)):
        row(f"{name.upper()} p{share}, ms", f"{name}_p{share}_ms", ".0f")
    row("requests a second within the SLO", "goodput_per_s", ".2f")
    row("sequences a decode step, mean", "mean_batch", ".1f")
    row("decode workers busy, %", "decode_utilisation", ".0f", 100)
    row("prefill workers busy, %", "prefill_utilisation", ".0f", 100)
    row("tokens/s a decode worker", "tokens_per_s_per_decode_worker", ".1f")
    row("tokens/s a worker of either kind", "tokens_per_s_per_worker", ".1f")
    return shown


def spread(workers: dict[str, int]) -> str:
    """"3 1 1" for a few tasks, "1 to 3" for many."""
    counts = list(workers.values())
    return " ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}" if min(counts) != max(counts) else f"{counts[0]}"
