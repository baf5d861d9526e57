"""What one process of `python -m sun_perf.gpu` measures: all parts that its books do not have yet."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton

from sun.decode.cuda.table import FORMATS
from sun.gpu import lost
from sun.model.shape import load_shape
from sun_perf.gpu import books
from sun_perf.gpu.__main__ import options
from sun_perf.gpu.books import Books, Piece
from sun_perf.gpu.checks import checks
from sun_perf.gpu.clock import Bandwidth
from sun_perf.gpu.decode_steps import steps
from sun_perf.gpu.handoff import handoff
from sun_perf.gpu.ipc import ipc
from sun_perf.gpu.plan import Plan, for_gpu, smoke
from sun_perf.gpu.prefill import prefill
from sun_perf.gpu.systems import systems
from sun_perf.gpu.tiles import tiles
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS

SCHEMES = [scheme for scheme in FORMATS if scheme != "fp32"]
LEAST_S = {"limits": 0.0, "checks": 0.0, "handoff": 10.0, "systems": 45.0, "tiles_int4": 60.0, "tiles_int8": 60.0}
"""A part is left out with less time than this left; others with less than 20 s."""


def limits(plan: Plan) -> Iterator[Piece]:
    """What the steps' floor is of."""
    yield "bandwidth", lambda: [Bandwidth.measure(plan.device, plan.buffer).as_dict()]


def report(plan: Plan, ours: Books) -> None:
    """All parts, in order: what the others need or are worth nothing without comes first."""
    made = ours.made

    def bandwidth() -> Bandwidth | None:
        return Bandwidth(**made["limits"][0]) if made.get("limits") else None

    parts = {"limits": limits, "checks": checks}
    parts |= {f"steps_{scheme}": partial(steps, scheme=scheme, limits=bandwidth) for scheme in plan.schemes}
    parts |= {"prefill": prefill, "handoff": handoff, "handoff_ipc": ipc, "systems": systems}
    parts |= {f"tiles_{scheme}": partial(tiles, scheme=scheme) for scheme in ("int4", "int8") if scheme in plan.schemes}
    made["not_run"] = {name: "not reached" for name in parts if name not in made["seconds"]} | made["not_run"]
    for name, pieces in parts.items():
        if plan.left_s < LEAST_S.get(name, 20.0):
            made["not_run"][name] = f"{plan.left_s:.0f} s of the budget were left"
            continue
        ours.part(name, partial(pieces, plan))
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    books.write(ours.path, made)


def main() -> None:
    """Exit code 0 if all was tried, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m sun_perf.gpu", parents=[options()])
    parser.add_argument("--load-format", choices=["dummy"], default="dummy", help="random weights of --config, made on the device")
    parser.add_argument("--config", default="llama-3.1-8b", help="llama-3.1-8b, qwen3-8b, or a Hugging Face config.json")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--context", type=int, default=512, help="tokens that each sequence attends to")
    path, started = Path(sys.argv[1]), float(sys.argv[2])
    arguments = parser.parse_args(sys.argv[3:])
    if not arguments.smoke and not torch.cuda.is_available():
        print("sun_perf.gpu: torch finds no CUDA device; --smoke runs a tiny form of it on the CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cpu") if arguments.smoke else torch.device("cuda", torch.cuda.current_device())
    missing = {scheme: FORMATS[scheme].missing(device) for scheme in arguments.schemes}
    schemes = tuple(scheme for scheme, reason in missing.items() if reason is None)
    if arguments.smoke:
        plan, config = smoke(schemes), "tiny"
    else:
        plan, config = for_gpu(load_shape(arguments.config), device, schemes, arguments.context, arguments.budget), arguments.config
    made = books.read(path, started) or {
        "machine": machine(), "triton": triton.__version__, "commit": commit(RESULTS), "config": config, "interpreted": arguments.smoke,
        "load_format": "dummy", "schemes": list(schemes), "not_run": {scheme: reason for scheme, reason in missing.items() if reason is not None},
        "failed": {}, "seconds": {}, "begun": [], "started": started}
    report(replace(plan, started=started), Books(path, made, partial(lost, device)))


if __name__ == "__main__":
    main()
