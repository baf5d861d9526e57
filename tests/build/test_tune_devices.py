"""Runs on several devices: the steps of one device, one process that is told to stop, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch.distributed
from transformers import TrainerControl, TrainerState, TrainingArguments

from sun_build.tune.journal import read_steps
from sun_build.tune.run import begin, sources_of, tune
from sun_build.tune.stopping import Interrupt
from tests.build.test_tune_run import SMALL, losses, sun


def test_two_devices_take_the_steps_of_one_and_find_its_held_out_loss(root, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": "yes" * (1 + i % 4)} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", str(tmp_path / "d.jsonl"), "--root", str(root), "--steps", "4", "--rank", "2", "--held-out", "3", "--eval-every", "2", "--precision", "fp32"]
    sun("tune", "--out", str(tmp_path / "one"), *options, "--batch", "2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sun_client.cli", "tune",
         "--out", str(tmp_path / "two"), *options, "--batch", "1"], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("loss", "held_out_loss"):
        one, two = ([row[name] for row in read_steps(tmp_path / out / "steps.jsonl") if name in row] for out in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3)
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_two_devices_of_which_one_is_told_to_stop_save_the_same_step(root, data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sun_client.cli", "tune", "--data", str(data), "--out", str(out),
               "--root", str(root), "--batch", "1", "--rank", "2", "--save-every", "10000", "--precision", "fp32", "--steps", "5000"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while len(read_steps(out / "steps.jsonl")) < 3 and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    second = next(p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=120)
    stopped = len(losses(out))
    assert said.count("Interrupted; the step is saved") == 1 and 3 <= stopped < 5000, said
    saved, = (out / "checkpoints").iterdir()
    assert saved.name == f"checkpoint-{stopped}" and {"learnt.safetensors", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {p.name for p in saved.iterdir()}


def test_a_signal_that_comes_while_the_other_devices_are_waited_for_stops_the_next_step(tmp_path, monkeypatch):
    coming = [lambda: None, lambda: signal.raise_signal(signal.SIGTERM), lambda: None]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: coming.pop(0)())  # the others were asked nothing
    interrupt, arguments = Interrupt(), TrainingArguments(str(tmp_path), use_cpu=True)
    interrupt.on_train_begin(arguments, TrainerState(), TrainerControl())
    try:
        stops = [interrupt.on_step_end(arguments, TrainerState(), TrainerControl()).should_training_stop for _ in range(3)]
    finally:
        interrupt.release()
    assert stops == [False, False, True] and interrupt.stopped


def test_a_run_is_resumed_on_as_many_devices_as_it_began_on(base_dir, rows, tmp_path, monkeypatch):
    begin(tmp_path / "out", SMALL, sources_of(base_dir, rows, [], None), resume=False, overwrite=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="has another number of devices; give it the same"):
        begin(tmp_path / "out", SMALL, sources_of(base_dir, rows, [], None), resume=True, overwrite=False)


def test_fewer_examples_than_a_step_of_several_devices_takes_are_refused_before_it(base_dir, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"data: 3 examples, and a step on 2 devices takes 4 \(devices x batch x accumulate\)"):
        tune(base_dir, rows[:3], [], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()
