"""Time of a prefill pass in float32 and in int8, by the prompt's length: `python -m sun_perf.prefill_formats`."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import parse
from sun.model.loading import load_prefill
from sun.model.manifest import PREFILL_SCHEMES
from sun.prefill.engine import PrefillEngine
from sun_perf import samples
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

LENGTHS = (32, 128, 512)


def report(base_dir: str | Path, task_dir: str | Path, threads: int, lengths: Sequence[int] = LENGTHS, rounds: int = 7) -> dict:
    """What `prefill_formats.json` holds: median ms of a prompt of random tokens alone, from queued to published, by format and length.

    kv_error: of K and V together, the difference to float32's as a share of them. over_int8: float32's ms over int8's, the
    median of the rounds. Formats and lengths take turns, so that other load hits them alike; a first round warms up.
    """
    with contextlib.ExitStack() as stack:
        engines: dict[str, PrefillEngine] = {}
        for scheme in PREFILL_SCHEMES:
            task, module = load_prefill(base_dir, task_dir, scheme)
            engines[scheme] = PrefillEngine(module, task, Inline(), max(lengths), threads)
            stack.callback(engines[scheme].close)
        vocab = module.base.vocab
        prompts = {length: torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths}
        times: dict[tuple[str, int], list[float]] = {(scheme, length): [] for scheme in engines for length in lengths}
        kv: dict[tuple[str, int], torch.Tensor] = {}
        for turn in range(rounds + 1):
            for (scheme, length), kept in times.items():
                started = time.perf_counter()
                shipment = engines[scheme].submit(prompts[length]).result()
                if turn:
                    kept.append((time.perf_counter() - started) * 1e3)
                else:
                    ticket = parse(shipment[0])
                    with Inline().pull(ticket, shipment) as buffer:
                        kv[scheme, length] = verified_kv(ticket, buffer).clone()
    return {
        "machine": machine(), "commit": commit(RESULTS),
        "passes": [{"scheme": scheme, "threads": threads, "tokens": length, "ms": round(statistics.median(kept), 1)}
                   for (scheme, length), kept in times.items()],
        "over_int8": {str(n): round(samples.ratio(list(zip(times["fp32", n], times["int8", n], strict=True)))["median"], 2) for n in lengths},
        "kv_error": {str(n): round(float((kv["int8", n] - kv["fp32", n]).norm() / kv["fp32", n].norm()), 4) for n in lengths},
    }


def main() -> None:
    """Print a line per format and write `perf/results/prefill_formats.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="build/base", help="the base model's folder")
    parser.add_argument("--task", default="model_repository/prefill_banking/1", help="folder of a task's weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a pass; a prefill model of the server has 1")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill_formats.json")
    arguments = parser.parse_args()
    made = report(arguments.base, arguments.task, arguments.threads, rounds=arguments.rounds)
    for scheme in PREFILL_SCHEMES:
        print(f"{scheme:5} " + "  ".join(f"{row['tokens']}: {row['ms']:7.1f} ms" for row in made["passes"] if row["scheme"] == scheme))
    for key in ("over_int8", "kv_error"):
        print(f"{key}: {made[key]}")
    write_result(arguments.out, made)


if __name__ == "__main__":
    main()
