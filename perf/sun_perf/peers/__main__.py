"""SUN on Triton against llama.cpp, vLLM and transformers: same weights, CPUs and prompts, by turns in one run.

`make peers` measures every peer that is installed; `make peers ARGS="--setup llama vllm"` installs two.
Results: perf/results/peers.json and peers.png.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path

from sun_client.errors import SunError
from sun_client.root import Root
from sun_client.server import interruptible
from sun_perf.machine import commit, machine
from sun_perf.peers import report
from sun_perf.peers.duel import Load, duel
from sun_perf.peers.environment import PINS, Environment, check_peer
from sun_perf.peers.ours import Ours
from sun_perf.peers.plan import VARIANTS, Variant, chosen
from sun_perf.peers.system import CONTEXT, Place

MOST_TOKENS = CONTEXT // 2
"""Longest answer: the other half of a peer's room is its prompt's."""


def main() -> None:
    """Install or measure."""
    parser = argparse.ArgumentParser(prog="make peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"which of {', '.join(PINS)} (default: all)")
    parser.add_argument("--setup", action="store_true", help="make the peers' environments and measure nothing")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"these only: {', '.join(VARIANTS)}")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[8, 16, 32], help="requests at once (default: 8 16 32)")
    parser.add_argument("--tokens", type=int, default=64, help="of every answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="waves of each side at each concurrency (default: 5)")
    parser.add_argument("--cpus", type=int, default=2, help="that each side has (default: 2)")
    parser.add_argument("--port", type=int, default=18400, help="first of ten TCP ports (default: 18400)")
    parser.add_argument("--out", type=Path, help="JSON to write, a figure beside it (default: perf/results/peers.json)")
    args = parser.parse_args()
    for name, values, most in (("concurrency", args.concurrency, 256), ("tokens", [args.tokens], MOST_TOKENS), ("rounds", [args.rounds], 1000),
                               ("cpus", [args.cpus], len(os.sched_getaffinity(0))), ("port", [args.port], 65525)):
        if not all(1 <= value <= most for value in values):
            parser.error(f"--{name}: got {' '.join(map(str, values))}, expected 1 to {most}")
    root = Root.find()
    runs = root.path / ".run" / "peers"
    peers = args.peers or list(PINS)
    try:
        for peer in peers:
            check_peer(peer)
        if args.setup:
            for peer in peers:
                Environment(peer, runs).setup()
            return
        variants = chosen(peers, args.variants)
        # Clients and servers, ours and the peers': all inherit it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])
        place = Place(root, runs, args.port, args.cpus, max(args.concurrency))
        with interruptible():
            out = args.out or root.path / "perf" / "results" / "peers.json"
            measure(place, variants, Load(sorted(args.concurrency), args.tokens, args.rounds), out)
    except (SunError, ValueError, RuntimeError) as error:
        parser.exit(1, f"peers: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "peers: interrupted; everything that was started is stopped\n")


def measure(place: Place, variants: list[Variant], load: Load, out: Path) -> None:
    """Each variant against ours, the results written after each; one that does not run is noted with its reason, and the next one follows."""
    result: dict = {
        "machine": machine(), "commit": commit(place.root.path), "date": time.strftime("%Y-%m-%d"),
        "settings": {"cpus": place.threads, "tokens": load.tokens, "rounds": load.rounds, "systems": {}}, "rows": [], "over_peer": {}, "skipped": {}}
    scheme, ours = None, None
    with ExitStack() as stack:
        for variant in variants:
            if missing := Environment(variant.peer, place.runs).missing:
                skip(result, variant, missing)
                continue
            if variant.scheme != scheme:
                stack.close()
                scheme, ours = variant.scheme, stack.enter_context(Ours(place, variant.scheme))
            print(f"{variant.title}, beside SUN in {scheme}", flush=True)
            try:
                ours.freeze()
                with variant.make(place) as theirs:
                    ours.thaw()
                    waves = duel(ours, theirs, load, lambda line: print(f"  {line}", flush=True))
                    result["settings"]["systems"] |= {f"sun-{scheme}": ours.settings, variant.name: theirs.settings}
            except (SunError, RuntimeError, OSError) as error:
                ours.thaw()
                skip(result, variant, str(error))
                continue
            result["rows"] += report.rows(variant, waves)
            result["over_peer"] = report.over_peer(result["rows"])
            report.write(result, out)
    if result["rows"]:
        print(f"\n{report.table(result['rows'])}\nover_peer: {result['over_peer']}; {out}")


def skip(result: dict, variant: Variant, reason: str) -> None:
    """Note why a variant has no rows."""
    result["skipped"][variant.name] = reason
    print(f"{variant.name} skipped: {reason}", flush=True)


if __name__ == "__main__":
    main()
