"""`claims.json`: the claims' figures, gathered from what each measurement wrote. `python -m sun_perf.claims` makes it anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sun_perf.bench_ratios import throughput
from sun_perf.results import RESULTS, write_result

FILE = "claims.json"


def _by_alpha(name: str) -> Callable[[dict], dict[str, float]]:
    return lambda bench: {alpha: found[name]["median"] for alpha, found in bench["ratios"]["sun"].items()}


def _qsun_over_sun(bench: dict) -> dict[str, float]:
    """Of tokens a second through the server, by task mix; empty if QSUN did not run."""
    found = throughput(bench["runs"], bench["settings"]["plans"][0]["tasks"], "qsun", "sun")
    return {alpha: of["median"] for alpha, of in found.items()}


CLAIMS: dict[str, tuple[str, Callable[[dict], object]]] = {
    "throughput_per_worker_sun_over_partitioned": ("bench.json", _by_alpha("throughput_per_worker")),
    "tpot_sun_over_partitioned": ("bench.json", _by_alpha("tpot_p50")),
    "server_over_engine": ("bench.json", lambda bench: bench["server_over_engine"]["server_over_engine"]["median"]),
    "qsun_over_sun_server": ("bench.json", _qsun_over_sun),
    "qsun_over_sun": ("steps.json", lambda steps: steps["qsun_over_sun"]),
    "step_over_floor": ("steps.json", lambda steps: steps["step_over_floor"]),
    "over_peer": ("peers.json", lambda peers: peers["over_peer"]),
}
"""A claim's key -> the results file it comes from, and how to read it there."""


def gather(results: Path) -> dict:
    """The claims whose results there are, and under "measured" each file's machine and commit.

    Raises ValueError naming file and claim if a results file lacks what it should have.
    """
    claims: dict = {}
    measured: dict[str, dict] = {}
    for key, (name, read) in CLAIMS.items():
        path = results / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            claims[key] = read(content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: gives no {key} ({type(error).__name__}: {error}); run its measurement again") from error
        measured[name] = {field: content.get(field) for field in ("machine", "commit")}
    return {**claims, "measured": measured}


def write(results: Path) -> Path:
    """Write `claims.json` into a folder of results; the file."""
    path = results / FILE
    write_result(path, gather(results))
    return path


if __name__ == "__main__":
    print(write(RESULTS))
