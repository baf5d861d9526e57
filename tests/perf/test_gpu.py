"""The GPU bench's smoke run: every part, in Triton's interpreter, with nothing installed that a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.model.shape import load_shape
from sun_perf.gpu.__main__ import supervise
from sun_perf.gpu.books import Books, write
from sun_perf.gpu.checks import checks, result
from sun_perf.gpu.ipc import told
from sun_perf.gpu.plan import small_of, smoke
from tests.conftest import DEVICE
from tests.unit.harness import PATIENCE_S

BARE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"msgspec", "xxhash", "numba", "llvmlite", "typer", "rich", "tritonclient", "psutil", "peft", "simpy", "sun_build", "sun_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}, as on a bare machine")

sys.meta_path.insert(0, Refuse())
"""
"""Python runs it in each process that finds it on its path as sitecustomize."""
interpreted = pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 5), reason="triton 3.6's interpreter makes loop bounds of arrays that numpy 2.5 takes for none")


@interpreted
def test_a_smoke_run_checks_and_times_every_part(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sun_perf.gpu", "--smoke", "--out", str(tmp_path / "gpu.json"), "--schemes", "bf16", "int4"],
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert not made["failed"] and not made["not_run"] and made["interpreted"]
    assert all(check["passed"] for check in made["checks"])
    assert [(row["scheme"], row["batch"]) for scheme in ("bf16", "int4") for row in made[f"steps_{scheme}"]] == [("bf16", 2), ("int4", 2)]
    assert [(row["system"], row["scheme"]) for row in made["systems"]] == [("sun", "bf16"), ("qsun", "int4"), ("conventional", "bf16")]
    assert [(row["tokens"], row["dtype"]) for row in made["handoff"]] == [(4, "float32"), (4, "bfloat16")]
    assert [(row["tokens"], row["same"]) for row in made["handoff_ipc"]] == [(4, True)] and [row["tokens"] for row in made["prefill"]] == [9]
    assert sum("prefill" in check["check"] for check in made["checks"]) == 4
    assert "its times mean nothing" in done.stdout and "A decode step" in done.stdout


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "sun_perf.gpu"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


CHILD = """
import os, sys, time
from pathlib import Path
from sun_perf.gpu import books

path, made = Path(sys.argv[1]), books.read(Path(sys.argv[1]), 1.0) or {"failed": {}, "seconds": {}, "not_run": {}, "begun": [], "started": 1.0}
books.HANG_S = 1.0
ours = books.Books(path, made, lambda: "illegal address" if "loses" in list(made["failed"])[-1] else None)

def rows():
    yield {"row": 1}
    raise RuntimeError("no memory")

def pieces():
    yield "raises", rows
    yield "loses", lambda: 1 / 0
    yield "dies", lambda: os._exit(9)
    yield "hangs", lambda: time.sleep(100)
    yield "last", lambda: [{"row": 2}]
    raise RuntimeError("at the end")

def nothing():
    raise RuntimeError("no model")
    yield

print("started", flush=True)
ours.part("part", pieces)
ours.part("other", nothing)
ours.part("third", lambda: [("only", lambda: [{"row": 3}])])
"""


def test_what_fails_dies_hangs_or_loses_its_gpu_costs_its_own_rows_alone(tmp_path, capfd):
    made = supervise([sys.executable, "-c", CHILD, str(tmp_path / "books.json")], tmp_path / "books.json", 1.0, time.monotonic() + PATIENCE_S)
    assert (made["part"], made["other"], made["third"]) == ([{"row": 1}, {"row": 2}], [], [{"row": 3}])
    last = {name: said.strip().splitlines()[-1] for name, said in made["failed"].items()}
    assert last == {
        "part: raises": "RuntimeError: no memory", "part: loses": "ZeroDivisionError: division by zero", "part: dies": "its process ended with code 9",
        "part: hangs": "its process ended with code 1", "part": "RuntimeError: at the end", "other": "RuntimeError: no model"}
    assert capfd.readouterr().out.count("started") == 4 and made["seconds"].keys() == {"part", "other", "third"}


def test_the_time_is_kept_and_what_was_found_is_there(tmp_path):
    write(tmp_path / "books.json", {"failed": {}, "started": 1.0, "running": "steps: batch 8", "steps": [{"row": 1}]})
    began = time.monotonic()
    made = supervise([sys.executable, "-c", "import time; time.sleep(100)"], tmp_path / "books.json", 1.0, began + 0.5)
    assert made["steps"] == [{"row": 1}] and made["failed"] == {"steps: batch 8": "the time was up"} and time.monotonic() - began < 50


def test_a_process_that_only_dies_is_not_started_for_ever_and_old_books_are_not_this_runs(tmp_path):
    write(tmp_path / "books.json", {"failed": {}, "started": 1.0})
    dies = [sys.executable, "-c", "raise SystemExit(3)"]
    assert supervise(dies, tmp_path / "books.json", 1.0, time.monotonic() + PATIENCE_S)["failed"] == {"measuring": "its process ended with code 3"}
    with pytest.raises(SystemExit, match="3"):
        supervise(dies, tmp_path / "books.json", 2.0, time.monotonic() + PATIENCE_S)


@interpreted
@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU, and this process's kernels are compiled for it")
def test_a_scheme_that_raises_fails_its_own_checks_alone(tmp_path, monkeypatch):
    plan = smoke(("int4",))
    made = {"failed": {}, "seconds": {}, "not_run": {}, "begun": []}
    monkeypatch.setattr("sun.decode.cuda.formats.Int4.__call__", lambda self, x: 1 / 0)
    Books(tmp_path / "books.json", made, lambda: None).part("checks", partial(checks, plan))
    assert made["failed"].keys() == {"checks: int4 layer", "checks: int4 step"}
    assert {check["check"].split()[0] for check in made["checks"]} == {"attention", "fp32", "bf16", "100"} and all(check["passed"] for check in made["checks"])


def test_an_error_that_is_no_number_is_a_failed_check_and_valid_json():
    assert result("logits", float("nan"), None) == {"check": "logits", "error": None, "limit": None, "passed": False}


@pytest.mark.parametrize("config, heads, normed", [("llama-3.1-8b", 16, False), ("qwen3-8b", 16, True)])
def test_what_is_checked_has_the_heads_of_what_is_timed(config, heads, normed):
    small = small_of(load_shape(config))
    assert (small.head_dim, small.heads, small.kv_heads, small.normed, len(small.rope.inv_freq)) == (128, heads, 4, normed, 64)


def test_a_publisher_that_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("sun_perf.gpu.ipc.PUBLISH_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with pytest.raises(RuntimeError, match="published nothing in 0 s"):
            told(process)
        process.kill()
