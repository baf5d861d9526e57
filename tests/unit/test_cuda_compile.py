"""The kernels become machine code for an H100, which Triton's compiler makes without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the triton package, whose compiler needs no GPU")


def test_all_kernels_of_a_step_compile_and_layers_use_hoppers_matrix_instructions(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_cuda.py")), "int4", "8"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert made == {("add_norm",), ("rotate_and_keep",), ("attend_parts",), ("join_parts",), ("silu_product",), ("multiply", "wgmma")}
