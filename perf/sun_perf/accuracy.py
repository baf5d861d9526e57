"""The accuracy table: train what is missing, score it with the engine, write results and report.

`python -m sun_perf.accuracy --data DIR` goes on where an earlier run ended: a row whose result is there with the same settings
is not made again. Weights go to .run/accuracy, results to perf/results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from sun_build.tune.settings import TuneSettings
from sun_perf import accuracy_report
from sun_perf.accuracy_plan import HELD_OUT, ROWS, STARTS, TASKS, Row, Task, compares, fits, settings_of, training
from sun_perf.machine import commit, machine
from sun_perf.results import RESULTS, write_result

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / ".run" / "accuracy"
BASE = ROOT / "build" / "base"
# A training step allocates and frees the same large blocks over and over; glibc would give them back and fault them in anew.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}


def one_thread() -> dict[str, str]:
    """Environment of a process that trains beside others."""
    return {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}


def result_path(task: str, row: str) -> Path:
    """Where a row's result lies."""
    return RESULTS / "accuracy" / f"{task}.{row}.json"


def done(task: Task, row: Row) -> bool:
    """Whether the row's result is there and of these settings."""
    path = result_path(task.name, row.name)
    return path.is_file() and fits(json.loads(path.read_text()), task, row)


def train(task: Task, weights: str, data: Path) -> dict:
    """Tune one of `TRAININGS` into ``RUNS``, and first what it starts with; one that is there already is taken as it is, one that was cut off goes on."""
    from sun.model.manifest import TASK_FILE, BaseManifest
    from sun_build.tune.run import SETTINGS_FILE, read_settings
    from sun_client.tuning import Tuning

    out = RUNS / task.name / weights
    note = out / "accuracy.json"
    settings = training(task, weights)
    if (out / TASK_FILE).is_file() and note.is_file():
        known = json.loads(note.read_text())
        if compares(TuneSettings(**known["settings"]), settings):
            return known
    start = None
    if weights in STARTS:
        train(task, STARTS[weights], data)
        start = RUNS / task.name / STARTS[weights]
    run = Tuning(task.name, BASE, BaseManifest.load(BASE), str(task.file(data, "train.jsonl")), out, task.metric, settings, start=start)
    rows, held_out, _ = run.read(HELD_OUT)
    cut_off = (out / SETTINGS_FILE).is_file() and not settings.differences(read_settings(out)) and not note.is_file()
    spent = out / "seconds"
    before, started = int(spent.read_text()) if cut_off and spent.is_file() else 0, time.monotonic()
    result = run.train(rows, held_out, resume=cut_off, overwrite=not cut_off)
    seconds = before + round(time.monotonic() - started)
    if result is None:
        spent.write_text(str(seconds))
        raise KeyboardInterrupt
    known = {"settings": asdict(settings), "seconds": seconds, "held_out_loss": result["held_out_loss"],
             "train_loss": result["train_loss"], "examples": result["examples"]}
    write_result(note, known)
    return known


def evaluate(task: Task, row: Row, data: Path, trained: dict | None) -> None:
    """Score a row on the task's test set and write its result."""
    from sun_build.evaluate import engine_answers, score, summary, test_set, write_scored

    conversations = test_set(task.file(data, "test.jsonl"), task.metric, task.limit)
    answers = engine_answers(BASE, row.contestant(RUNS / task.name), conversations, max_tokens=task.max_tokens)
    scored = score(conversations, answers, task.metric)
    (RUNS / task.name).mkdir(parents=True, exist_ok=True)
    write_scored(RUNS / task.name / f"{row.name}.jsonl", scored)
    result = {
        **summary(scored).as_dict(), "also": {metric: summary(score(conversations, answers, metric)).score for metric in task.also},
        "trained": trained and {key: value for key, value in trained.items() if key != "settings"}, "settings": {**settings_of(task, row), "training": trained and trained["settings"]},
        "right": "".join(str(int(s.right)) for s in scored), "machine": machine(), "commit": commit(ROOT),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = result_path(task.name, row.name)
    write_result(path, result)
    print(f"{task.name} {row.name}: {task.metric} {result['score']:.3f} [{result['ci_low']:.3f}, {result['ci_high']:.3f}]", flush=True)


def make_rows(task: Task, names: list[str], data: Path) -> None:
    """Make the rows of one training, one after the other."""
    from sun_client.show import quiet_libraries

    with quiet_libraries():
        for row in (ROWS[name] for name in names):
            if not done(task, row):
                evaluate(task, row, data, None if row.weights is None else train(task, row.weights, data))


def main() -> None:
    """Make what is missing, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of banking/, math/ and bash/, each with train.jsonl and test.jsonl")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="columns to make (default: all)")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="rows to make (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows made at once, a CPU thread each (default: one per CPU)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        make_rows(TASKS[args.tasks[0]], args.rows, args.data)
        return
    missing = [(task, row) for task in args.tasks for row in args.rows if not done(TASKS[task], ROWS[row])]
    jobs = jobs_of(missing)
    if any(TASKS[task].metric == "bfcl" for task, _ in jobs):
        from sun_build.bfcl_data import write

        write(RUNS / "data" / "bfcl")
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(lambda job: _run(args, *job, jobs[job]), jobs))
    accuracy_report.write(RESULTS, ROOT / "perf" / "accuracy.md")
    sys.exit(max(codes, default=0))


def jobs_of(missing: list[tuple[str, str]]) -> dict[tuple[str, str | None], list[str]]:
    """Rows (task, row) by what one process has to do: {(task, training or None): rows}, in the order to begin them.

    Rows of one training share its weights, and so do those of trainings that go on with them: two processes would train the same twice, in one folder.
    """
    jobs: dict[tuple[str, str | None], list[str]] = {}
    for task, row in missing:
        weights = ROWS[row].weights
        jobs.setdefault((task, STARTS.get(weights, weights)), []).append(row)
    tasks = list(dict.fromkeys(task for task, _ in missing))
    # Full fine-tuning takes longest and is a task's first, what needs no training its last.
    return dict(sorted(jobs.items(), key=lambda job: (tasks.index(job[0][0]), job[0][1] is None)))


def _run(args: argparse.Namespace, task: str, weights: str | None, names: list[str]) -> int:
    data = args.data if TASKS[task].metric != "bfcl" else RUNS / "data"
    log = RUNS / task / f"{weights or 'base'}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{task}: {', '.join(names)} (log: {log.relative_to(ROOT)})", flush=True)
    command = [sys.executable, "-m", "sun_perf.accuracy", "--here", "--data", str(data), "--tasks", task, "--rows", *names]
    with log.open("w") as file:
        code = subprocess.run(command, env=one_thread(), stdout=file, stderr=subprocess.STDOUT).returncode
    last = log.read_text().strip().splitlines()[-1:]
    print(f"{task}: {', '.join(names)}: " + ("done" if code == 0 else f"failed ({code}): {last}"), flush=True)
    return code


if __name__ == "__main__":
    main()
