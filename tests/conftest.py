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

OWN_SERVERS = (
    "tests/perf/test_bench.py", *(f"tests/server/test_{name}.py" for name in ("bls", "export", "faults", "prefill", "serve", "soak", "start", "tuned")))
"""Files of tests that start a tritonserver of their own. One at a time: each takes a good part of two cores."""
SHARED_SERVER = "tests/server/"
"""The other tests there share the run's server, and what its workers hold, so they are one at a time, too; beside one with its own server they may be."""

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
    """Of several workers (`make test` has two) one runs all tests that share a server, one all that have their own, and they and others the rest, a file at a time."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(OWN_SERVERS):
                return "own servers"
            return "shared server" if nodeid.startswith(SHARED_SERVER) else super()._split_scope(nodeid)

    return Scheduling(config, log)
