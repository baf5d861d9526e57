"""The profile: what a sampled stack counts as, the tables made of that, a steady load, and py-spy itself where there is one."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from sun.decode import cpu
from sun_perf import profile, stacks
from sun_perf.stacks import WAITING, Stack, parse, part
from sun_perf.workload import Request

ENGINE = "/root/backends/sun/decode/engine.py"
LOOP = f"run (/lib/threading.py:982);DecodeEngine._step_loop ({ENGINE}:10);"
STEP_LINES = {
    number: (name, source) for name in ("step", "_logits") for lines, first in [inspect.getsourcelines(getattr(cpu.CpuExecutor, name))]
    for number, source in enumerate(lines, first)}


def at(text: str, inner: str = "") -> str:
    """A stack inside the line of a decode step that has ``text``."""
    line, name = next((number, name) for number, (name, source) in STEP_LINES.items() if text in source)
    outer = f"CpuExecutor.step ({cpu.__file__}:1);" if name != "step" else ""
    return f"{LOOP}DecodeEngine._run_step ({ENGINE}:20);{outer}CpuExecutor.{name} ({cpu.__file__}:{line}){inner}"


LAMBDA = f";CpuExecutor._each.<locals>.<lambda> ({cpu.__file__}:111)"


@pytest.mark.parametrize(("frames", "expected"), [
    (at("kernels.attention", LAMBDA), "kernel attention"), (at("kernels.logits"), "kernel logits"),
    (at("qkv.packed", ";OneDnn.__call__ (/root/backends/sun/decode/packed.py:30)"), "linear qkv"), (at("self._head.packed"), "linear head"),
    (at("np.array(positions)"), "CpuExecutor.step (sun/decode/cpu.py), the rest"),
    (f"{LOOP}choose ({ENGINE}:200);argmax (/lib/torch/x.py:3)", "choose (sun/decode/engine.py)"),
    (f"{LOOP}<listcomp> ({ENGINE}:12)", "DecodeEngine._step_loop (sun/decode/engine.py)"),
    (f"{LOOP}Condition.wait_for (/lib/threading.py:350);Condition.wait (/lib/threading.py:320)", WAITING),
    ("run (/lib/threading.py:982);loop (/lib/grpc/x.py:1)", stacks.NOT_OURS),
    ("thread (0x1): a name;work (/root/backends/sun_triton/meter.py:40)", "work (sun_triton/meter.py)"),
])
def test_a_sample_counts_for_a_kernel_a_linear_layer_or_our_innermost_function(frames, expected):
    (stack,) = parse(f"{frames} 7\n")
    assert part(stack) == expected and stack.count == 7


def test_what_is_not_py_spys_output_is_refused_by_line():
    with pytest.raises(ValueError, match="line 2: no count at the end of 'b"):
        parse("a (b.py:1) 3\nb (c.py:1) x\n")


def test_a_steps_parts_add_up_to_its_time_less_what_it_waited():
    wait = f"{LOOP}Condition.wait (/lib/threading.py:320) 20\n"
    worker = parse(f"{at('qkv.packed')} 60\n{at('kernels.attention')} 20\n{wait}") + parse(f"serve ({ENGINE}:5) 900")
    runs, router = parse(f"{at('qkv.packed')} 60\nserve ({ENGINE}:5) 3\nx (/lib/y.py:1) 1"), parse("ask (/root/backends/sun/router/router.py:9) 2")
    made = profile.summary(worker, runs, router, step_ms=50.0)
    assert made["waiting_ms"] == 10 and made["step"] == {"linear qkv": 30.0, "kernel attention": 10.0}
    assert made["worker_others"] == {"serve (sun/decode/engine.py)": 0.75, stacks.NOT_OURS: 0.25}
    assert made["router"] == {"ask (sun/router/router.py)": 1.0}
    lines = "\n".join(profile.table({**made, "tokens_per_s": 1, "steps": 2, "batch": 3, "cpus": {"sun": 0.1}}))
    assert "30.000  linear qkv" in lines and "CPUs: sun 0.1" in lines
    with pytest.raises(RuntimeError, match="saw nothing of _step_loop"):
        profile.summary([Stack((), 3)], [], [], 1.0)


def test_a_steady_load_keeps_its_requests_in_flight_and_raises_what_they_raise():
    calls, together = itertools.count(), threading.Barrier(4)

    def stream(task, prompt, sampling):
        if next(calls) < 4:
            together.wait(10)  # raises unless all four are in flight at once
        yield from range(3)

    with profile.loaded(SimpleNamespace(stream=stream), [Request("a", "hi", 3)], 4):
        assert next(calls) >= 4

    def broken(task, prompt, sampling):
        raise RuntimeError("no server")
        yield

    with pytest.raises(RuntimeError, match="no server"), profile.loaded(SimpleNamespace(stream=broken), [Request("a", "hi", 3)], 2):
        pass


def test_without_py_spy_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install py-spy=="):
        stacks.py_spy()


def test_py_spy_sees_our_functions_in_another_process(tmp_path):
    try:
        stacks.py_spy()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if os.geteuid():
        pytest.skip("sampling another process needs root")
    code = "from sun.cores import parse_cores\nprint(flush=True)\nwhile True: parse_cores('0-9999')"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        seen = stacks.shares(stacks.record(child.pid, 1, idle=False, out=tmp_path / "raw")())
        assert next(iter(seen)) == "parse_cores (sun/cores.py)"
    finally:
        child.kill()
        child.communicate()
    with pytest.raises(RuntimeError, match="py-spy failed"):
        stacks.record(child.pid, 1, idle=False, out=tmp_path / "raw")()
