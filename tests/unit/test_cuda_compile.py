"""The kernels become machine code for an H100, which Triton's compiler makes without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the triton package, whose compiler needs no GPU")

STEP = {"add_norm", "rotate_and_keep", "attend_parts", "join_parts", "silu_product"}
LEAST = 99 << 10
"""Shared memory that a program may have on the GPUs of compute capability 8.0 or later that have least of it (8.6, 8.9, 12.0)."""


def test_all_kernels_compile_fit_into_shared_memory_and_layers_use_matrix_instructions(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_cuda.py")), "1", "32", "64"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made: dict[str, list[list[str]]] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == 1:
            kernels = made[words[0]] = []
        else:
            kernels.append(words)
    assert {scheme: {name for name, *_ in kernels} - STEP for scheme, kernels in made.items()} == {
        "fp32": set(), "bf16": set(), "int8": {"multiply"}, "int4": {"multiply"}}
    for scheme, kernels in made.items():
        attention = "-" if scheme == "fp32" else "mma.sync"
        assert STEP <= {name for name, *_ in kernels}
        for name, warps, shared, instructions in kernels:
            assert int(shared) <= LEAST, (scheme, name)
            # Hopper's own take four warps at least.
            assert instructions == {"multiply": "wgmma" if int(warps) >= 4 else "mma.sync", "attend_parts": attention}.get(name, "-"), (scheme, name, warps)
