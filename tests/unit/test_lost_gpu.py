"""A process whose GPU takes nothing more ends, to be loaded anew, before it fails what others could still do; any other error is one sequence's or prompt's."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from sun import gpu

from .harness import PATIENCE_S

# The SystemExit below is the end that is asked for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PROMPT = [72, 101, 108, 108, 111, 5]
STICKY = "CUDA error: an illegal memory access was encountered"


class Faulty:
    """An executor, or a transport, whose every use raises what a lost GPU does."""

    continues, max_tokens, device, dtype = True, 0, torch.device("cpu"), torch.float32

    def step(self, *arguments):
        raise RuntimeError(STICKY)

    pull = run = step


@pytest.fixture
def ended(monkeypatch):
    """With a GPU that is lost: what an engine says when it ends its process, in whose place its thread ends here."""
    said: list[str] = []
    there = threading.Event()

    def end(why: str):
        said.append(why)
        there.set()
        raise SystemExit

    monkeypatch.setattr("sun.gpu.end", end)
    monkeypatch.setattr("sun.gpu.lost", lambda device: STICKY)
    return lambda: there.wait(PATIENCE_S) and said


@pytest.mark.parametrize("generated", [[], [5, 6]], ids=["a step", "a replay"])
def test_a_decode_worker_that_lost_its_gpu_ends_and_tells_no_router_that_its_sequences_failed(bench, ended, generated):
    it = bench()
    it.engine.executor = Faulty()
    it.admit("a", PROMPT, generated=generated)
    said, = ended()
    assert "decode worker ends" in said and said.count(STICKY) == 2
    assert [sequence.admit.id for sequence in it.scheduler.sequences] == ["a"]


def test_so_does_one_that_loses_it_over_a_prompts_kv(bench, ended):
    it = bench()
    shipment = it.shipment(PROMPT)
    it.engine.transports = dict.fromkeys(it.engine.transports, Faulty())
    it.admit("a", PROMPT, shipment)
    assert ended() and [sequence.admit.id for sequence in it.scheduler.sequences] == ["a"]


def test_a_prefill_module_that_lost_its_gpu_ends_and_answers_nobody(bench, ended):
    it = bench()
    it.prefill.executor = Faulty()
    future = it.prefill.submit(PROMPT)
    said, = ended()
    assert "prefill module ends" in said and not future.done()


def test_a_gpu_that_still_answers_is_not_lost_and_a_cpu_never_is(monkeypatch):
    def synchronize(device):
        if device.index == 1:
            raise torch.AcceleratorError(f"{STICKY}\nCUDA kernel errors might be reported later")

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    assert [gpu.lost(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")] == [None, None, STICKY]


def test_the_end_is_at_once_and_says_why():
    code = ("import threading\nfrom sun.watchdog import end\nthreading.Thread(target=threading.Event().wait).start()\n"
            "try:\n    end('the GPU is lost')\nfinally:\n    print('late')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the GPU is lost\n")
