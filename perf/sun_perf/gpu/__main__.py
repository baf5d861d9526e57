"""One command for one GPU: kernels are built and checked, then timed. Writes JSON after every part, so that a run that is cut off leaves what it has.

Needs torch, triton, numpy and transformers, and neither weights nor a network: `PYTHONPATH=backends:perf python -m sun_perf.gpu`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton

from sun.decode.cuda.table import FORMATS
from sun.model.shape import load_shape
from sun_perf.gpu.checks import checks
from sun_perf.gpu.clock import Bandwidth
from sun_perf.gpu.decode_steps import steps
from sun_perf.gpu.handoff import handoff
from sun_perf.gpu.ipc import ipc
from sun_perf.gpu.plan import Plan, for_gpu, smoke
from sun_perf.gpu.prefill import prefill
from sun_perf.gpu.systems import systems
from sun_perf.gpu.table import table
from sun_perf.gpu.tiles import tiles
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

SCHEMES = [scheme for scheme in FORMATS if scheme != "fp32"]
TILES_S = 60.0
"""A part that only shows what could be tuned is left out with less time than this left."""


def report(plan: Plan, config: str, out: Path) -> dict:
    """Run all parts; a part that fails leaves its traceback under "failed", and the others go on."""
    limits: list[Bandwidth] = []
    made: dict = {
        "machine": machine(), "triton": triton.__version__, "commit": commit(RESULTS), "config": config, "interpreted": plan.device.type == "cpu",
        "load_format": "dummy", "schemes": list(plan.schemes), "not_run": {}, "failed": {}, "seconds": {}}

    def part(name: str, run: Callable[[], object], least_s: float = 0.0) -> None:
        if plan.left_s < least_s:
            made["not_run"][name] = f"{plan.left_s:.0f} s of the budget were left"
            return
        started = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            made[name] = run()
        except Exception:
            made["failed"][name] = traceback.format_exc()
            print(made["failed"][name], file=sys.stderr, flush=True)
        made["seconds"][name] = round(time.monotonic() - started, 1)
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        write_result(out, made)

    def measure_limits() -> dict:
        limits.append(Bandwidth.measure(plan.device, plan.buffer))
        return limits[0].as_dict()

    part("limits", measure_limits)
    part("checks", lambda: list(checks(plan)))
    for scheme in plan.schemes:
        part(f"steps_{scheme}", lambda scheme=scheme: steps(plan, scheme, limits[0]), least_s=20.0)
    part("prefill", lambda: prefill(plan), least_s=20.0)
    part("handoff", lambda: handoff(plan), least_s=10.0)
    part("handoff_ipc", lambda: ipc(plan), least_s=20.0)
    part("systems", lambda: systems(plan), least_s=45.0)
    for scheme in ("int4", "int8"):
        if scheme in plan.schemes:
            part(f"tiles_{scheme}", lambda scheme=scheme: tiles(plan, scheme), least_s=TILES_S)
    return made


def main() -> None:
    """Exit code 1 if a check or a part failed, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m sun_perf.gpu", description=__doc__)
    parser.add_argument("--load-format", choices=["dummy"], default="dummy", help="random weights of --config, made on the device")
    parser.add_argument("--config", default="llama-3.1-8b", help="llama-3.1-8b, qwen3-8b, or a Hugging Face config.json")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--context", type=int, default=512, help="tokens that each sequence attends to")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further part begins")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU in Triton's interpreter: that it runs, not how fast")
    parser.add_argument("--out", type=Path, help="default: perf/results/gpu.json; none with --smoke")
    arguments = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("sun_perf.gpu: torch finds no CUDA device; --smoke runs a tiny form of it on the CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cpu") if SMOKE else torch.device("cuda", torch.cuda.current_device())
    missing = {scheme: FORMATS[scheme].missing(device) for scheme in arguments.schemes}
    schemes = tuple(scheme for scheme, reason in missing.items() if reason is None)
    if SMOKE:
        plan, config = smoke(schemes), "tiny"
    else:
        plan, config = for_gpu(load_shape(arguments.config), device, schemes, arguments.context, arguments.budget), arguments.config
    out = arguments.out or (Path(os.devnull) if SMOKE else RESULTS / "gpu.json")
    made = report(plan, config, out)
    made["not_run"] |= {scheme: reason for scheme, reason in missing.items() if reason is not None}
    if out.name != "null":
        write_result(out, made)
    print(table(made))
    wrong = not all(check["passed"] for check in made.get("checks", [])) or not all(row["same"] for row in made.get("handoff_ipc", []))
    sys.exit(1 if made["failed"] or wrong else 0)


if __name__ == "__main__":
    main()
