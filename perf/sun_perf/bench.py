"""The load bench: conventional disaggregation against SUN, side by side. `make bench` takes 12 minutes, `make bench-full` 46."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sun_client.errors import SunError
from sun_client.server import Ports, interruptible
from sun_client.show import quiet_libraries, say
from sun_perf import claims, figures, server_over_engine
from sun_perf.bench_plan import BENCHES, Bench
from sun_perf.bench_ratios import ratios
from sun_perf.bench_run import SEED, Runner
from sun_perf.fleet_layout import KV_TOKENS, SYSTEMS, Material
from sun_perf.load import Load, OwnLoad
from sun_perf.machine import commit, machine
from sun_perf.perf_analyzer import perf_analyzer
from sun_perf.results import RESULTS, write_result
from sun_perf.samples import Slo

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / ".run" / "bench"
QUIET_CPUS = 0.2


def material(threads: int = Material.threads, scheme: str = Material.scheme) -> Material:
    """Repositories of this checkout's base and adapters."""
    adapters = sorted(path.parent for path in (ROOT / "build" / "tasks").glob("*/adapter_config.json"))
    return Material(ROOT / "build" / "base", ROOT / "backends", adapters, threads, scheme)


def measure(bench: Bench, material: Material, load: Load, ports: Ports, slo: Slo, scratch: Path) -> dict:
    """Run a bench with repositories in ``scratch``. Returns the content of `bench.json` but for machine and commit."""
    runner = Runner(scratch, ports, load, material, slo)
    for plan in bench.plans:
        runner.compare(plan)
    main = bench.plans[0]
    for tasks in bench.memory_tasks:
        for name in main.systems:
            runner.measure_memory(name, tasks)
    memory = [{"system": name, "tasks": tasks, "workers": SYSTEMS[name].workers(tasks), "pss_mib": mib} for (name, tasks), mib in runner.memory.items()]
    say("server and bare engine in turn ...")
    engine = server_over_engine.measure(scratch, ports, load, material, bench.engine_rounds)
    say(f"server over engine: {engine['server_over_engine']['median']:.3f}")
    settings = {
        "plans": [asdict(plan) for plan in bench.plans], "slo": asdict(slo), "load": load.name, "seed": SEED, "threads_per_worker": material.threads,
        "kv_tokens": KV_TOKENS, "low_bit_scheme": material.scheme, "weights": "adapter merged into the base, a file for each task (partitioned); adapter (others)",
        "systems": {name: SYSTEMS[name].title for plan in bench.plans for name in plan.systems}}
    return {
        "settings": settings, "ratios": ratios(runner.runs, main), "server_over_engine": engine, "memory": memory, "agreement": runner.agreement,
        "runs": runner.runs}


def write(found: dict, results: Path) -> None:
    """Write `bench.json`, and what follows from it: claims and figures."""
    whole = {"machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d"), **found}
    write_result(results / "bench.json", whole)
    claims.write(results)
    for path in figures.draw(results):
        say(f"drawn: {path}")


def main() -> None:
    """Run, write, and leave nothing but the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bench", choices=BENCHES, nargs="?", default="quick")
    parser.add_argument("--scheme", default="int8", help="weights of QSUN's decode workers (full bench; default int8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each prefill module and decode worker (default 1)")
    parser.add_argument("--slo-ttft-ms", type=float, default=Slo.ttft_ms, help=f"limit on time to first token (default {Slo.ttft_ms:g})")
    parser.add_argument("--slo-tpot-ms", type=float, default=Slo.tpot_ms, help=f"limit on time per output token (default {Slo.tpot_ms:g})")
    parser.add_argument("--load", choices=("perf_analyzer", "own"), default="perf_analyzer", help="load generator; own needs no download")
    parser.add_argument("--port", type=int, default=18200, help="first of three free ports (default 18200)")
    args = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with interruptible(), quiet_libraries(), contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SCRATCH)))
        load = OwnLoad() if args.load == "own" else stack.enter_context(perf_analyzer(SCRATCH))
        ports = Ports(args.port, args.port + 1, args.port + 2)
        found = measure(BENCHES[args.bench], material(args.threads, args.scheme), load, ports, Slo(args.slo_ttft_ms, args.slo_tpot_ms), scratch)
    write(found, RESULTS)
    most = max(run["other_cpus"] for run in found["runs"])
    if most > QUIET_CPUS:
        say(f"other processes used up to {most:g} CPUs meanwhile: these are figures of a busy machine", "yellow")
    say(f"done in {(time.monotonic() - started) / 60:.1f} minutes: {RESULTS / 'bench.json'}, {RESULTS / 'claims.json'}")


if __name__ == "__main__":
    try:
        main()
    except (SunError, RuntimeError, ValueError, OSError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
