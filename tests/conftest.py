"""For all tests: one thread a process, nothing from a hub, and hypothesis without deadlines."""

from __future__ import annotations

import os
import secrets

# Torch's own setting holds for the thread that makes it only, and the engines have threads of their own. On a busy machine
# several threads wait for each other longer than one takes.
os.environ["OMP_NUM_THREADS"] = "1"
# Hub look-ups would only cost time: every model here is a local folder.
os.environ["HF_HUB_OFFLINE"] = "1"
# KV of this run's servers lies apart from that of others, which run beside it: theirs would look like what a test left behind.
os.environ["SUN_SHM"] = f"{os.environ.get('SUN_SHM', '/dev/shm/sun-kv')}-test-{secrets.token_hex(8)}"
# Tables whose cells are not folded; pytest-xdist says 80, and rich keeps what it finds first.
os.environ["COLUMNS"] = "200"

import pytest
import torch
from hypothesis import HealthCheck, settings

WITH_SERVERS = ("tests/server/", "tests/perf/test_bench.py")
"""Tests that start a tritonserver: never two of them at a time in one run, since they share the run's server, and what its workers hold."""

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests of the CUDA executor run: without a GPU, its kernels run in Triton's interpreter."""
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which transformers may do
# Deadlines are timed assertions; a busy machine would fail them. The same examples every run: a failure is a change's, not the day's.
settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in items:
        if DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Of several workers (`make test` has two) one runs all tests with servers, which mostly wait, and the others the rest, a file at a time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "servers" if nodeid.startswith(WITH_SERVERS) else super()._split_scope(nodeid)

    return Scheduling(config, log)
