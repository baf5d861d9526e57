"""The GPU bench's smoke run: every part, in Triton's interpreter, with nothing installed that a bare GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

BARE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"msgspec", "xxhash", "numba", "llvmlite", "typer", "rich", "tritonclient", "psutil", "peft", "simpy", "sun_build", "sun_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}, as on a bare machine")

sys.meta_path.insert(0, Refuse())
runpy.run_module("sun_perf.gpu", run_name="__main__", alter_sys=True)
"""


def test_a_smoke_run_checks_and_times_every_part(tmp_path: Path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE, "--smoke", "--out", str(tmp_path / "gpu.json"), "--schemes", "bf16", "int4"],
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
