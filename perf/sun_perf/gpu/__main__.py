"""One command for one GPU: kernels are built and checked, then timed. Needs torch, triton, numpy and transformers, and neither weights nor a network.

This process only looks after those that measure (`sun_perf.gpu.measure`), so that a lost GPU, a hang or the end of the time costs no row that was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sun_perf.gpu import books
from sun_perf.gpu.table import table
from sun_perf.results import RESULTS

GRACE_S = 40.0
"""After the budget, in which no part begins, one that has begun may go on for so long."""


def options() -> argparse.ArgumentParser:
    """What both processes read."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--budget", type=float, default=420.0, help=f"seconds in which parts begin; {GRACE_S:.0f} s later it ends with what it has")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU in Triton's interpreter: that it runs, not how fast")
    parser.add_argument("--out", type=Path, help="default: perf/results/gpu.json; none with --smoke")
    return parser


def supervise(command: list[str], path: Path, started: float, until: float) -> dict:
    """The books (`sun_perf.gpu.books`) that ``command`` keeps in ``path``: run again until it ends well or, by the monotonic clock, it is ``until``.

    What was running when it ended otherwise has failed. Exits with its code if it has no books.
    """
    before = None
    while True:
        process = subprocess.Popen(command)
        try:
            ended = f"its process ended with code {process.wait(max(0.0, until - time.monotonic()))}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "the time was up"
        made = books.read(path, started)
        if made is None:
            sys.exit(process.returncode)
        if process.returncode == 0:
            return made
        if (running := made.pop("running", None)) or made == before:
            made["failed"][running or "measuring"] = ended
        books.write(path, made)
        if "measuring" in made["failed"] or time.monotonic() >= until:
            return made
        before = made


def main() -> None:
    """Exit code 1 if a check or a part failed, 2 without a CUDA device."""
    started, parser = time.monotonic(), options()
    arguments, _ = parser.parse_known_args()
    if arguments.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.out or (Path(folder) if arguments.smoke else RESULTS) / "gpu.json"
        if path.exists() and not path.is_file():
            parser.error(f"--out: {path} is no file")
        command = [sys.executable, "-m", "sun_perf.gpu.measure", str(path), str(started), *sys.argv[1:]]
        made = supervise(command, path, started, started + arguments.budget + GRACE_S)
        for key in ("begun", "running", "started"):
            made.pop(key, None)
        books.write(path, made)
    print(table(made))
    wrong = not all(check["passed"] for check in made.get("checks", [])) or not all(row["same"] for row in made.get("handoff_ipc", []))
    sys.exit(1 if made["failed"] or wrong else 0)


if __name__ == "__main__":
    main()
