"""A model's process runs on the cores and with the priority that its config.pbtxt names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sun.stubs import Stubs
from tests.server.conftest import CORE, NICE


@pytest.mark.parametrize(("model", "cores", "nice"), [
    ("decode_0", os.sched_getaffinity(0), 0), ("decode_1", {CORE}, 0), ("prefill_identity", {CORE}, NICE), ("prefill_math", os.sched_getaffinity(0), 0)])
def test_a_model_runs_where_its_configuration_says(server, client, model, cores, nice):
    client.generate("identity", "hi", sampling={"temperature": 0, "max_tokens": 2})
    (pid,) = Stubs(server.pid).pids(model)
    assert os.sched_getaffinity(pid) == cores and os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + nice
    there = [tid for task in Path(f"/proc/{pid}/task").iterdir() if os.sched_getaffinity(tid := int(task.name)) == cores]
    assert len(there) > 1  # the engine's threads, too, not only the one that Triton calls
