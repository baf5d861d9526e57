"""A worker is kept to its cores: lists of cores are read as taskset reads them, and every thread of an engine is where it was told to be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.cores import format_cores, parse_cores, run_on
from sun.decode.params import SamplingParams
from sun.local import LocalFleet
from sun.messages import Admit

from .test_settings import place

T = TypeVar("T")
HERE = sorted(os.sched_getaffinity(0))
TASKS = Path("/proc/self/task")


def in_a_thread(run: Callable[[], T]) -> T:
    """The result of ``run`` in a thread of its own, which takes its cores and priority with it when it ends."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return future.result()


@given(st.frozensets(st.integers(0, 200), min_size=1))
def test_a_list_of_cores_is_read_as_it_was_written(cores):
    assert parse_cores(format_cores(cores)) == cores


@pytest.mark.parametrize(("text", "cores"), [("0", {0}), ("1-3", {1, 2, 3}), ("0,2-3", {0, 2, 3}), (" 4 , 2 - 2 ", {2, 4}), ("1,1-2", {1, 2})])
def test_lists_of_cores(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", " ", "a", "-1", "3-1", "1-", "0,,1", "0;1", "1.5", "0-65536", "9" * 30, "²"])
def test_what_is_no_list_of_cores_is_refused_by_field(text):
    with pytest.raises(ValueError, match=r'^cores: got .*, expected .*"0,2-3"'):
        parse_cores(text)


@pytest.mark.parametrize(("parameters", "error"), [
    ({"cores": "5000"}, f"cores: got '5000', this process may use {format_cores(HERE)}"),
    ({"cores": str(HERE[0]), "threads": 2}, f"cores: '{HERE[0]}' is fewer than threads, 2"),
    ({"cores": "all"}, "cores: got 'all', expected"),
    ({"nice": 20}, "nice: got 20, expected 0 to 19"),
    ({"nice": -1}, "nice: got -1, expected 0 to 19"),
])
def test_a_wrong_setting_is_refused_by_model_and_field_and_changes_nothing(parameters, error):
    def run() -> tuple[set[int], int]:
        with pytest.raises(ValueError, match=f"config.pbtxt of decode_0: parameters: {error}"):
            place().run_on(**{"cores": "", "threads": 1, **parameters})
        return os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)

    assert in_a_thread(run) == (set(HERE), os.getpriority(os.PRIO_PROCESS, 0))


@pytest.mark.skipif(len(HERE) < 2, reason="one core: there is nothing to choose")
def test_every_thread_of_an_engine_torchs_own_included_runs_where_the_engine_was_started(base_dir, repository):
    core, before = HERE[-1], set(TASKS.iterdir())

    def run() -> tuple[list[set[int]], set[int]]:
        run_on(str(core), nice=3)
        fleet = LocalFleet(base_dir, {"plain": repository / "prefill_plain" / "1"}, threads=2)
        try:
            shipment = fleet.prefill("plain", [1, 2, 3])
            params = SamplingParams(temperature=0, max_tokens=9)
            for name in ("a", "b", "c"):
                fleet.admit("decode_0", Admit(id=name, router="r", task="plain", prompt=[1, 2, 3, 4], params=params), shipment)
            assert sum(len(step.events) for step in fleet.listen("decode_0", "r")) > 9
            torch.set_num_threads(2)
            torch.randn(600, 600) @ torch.randn(600, 600)
            new = [int(path.name) for path in set(TASKS.iterdir()) - before]
            return [os.sched_getaffinity(tid) for tid in new], {os.getpriority(os.PRIO_PROCESS, tid) for tid in new}
        finally:
            fleet.close()

    cores, nice = in_a_thread(run)
    assert len(cores) >= 5  # this thread and torch's second one; prefill; pull and step of decode
    assert all(seen == {core} for seen in cores) and nice == {os.getpriority(os.PRIO_PROCESS, 0) + 3}
    assert os.sched_getaffinity(0) == set(HERE)
