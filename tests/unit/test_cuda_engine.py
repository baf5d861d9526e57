"""The decode engine with the CUDA executor, in Triton's interpreter: the same answers as with plain torch."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="needs the triton package; its interpreter needs no GPU")

from sun.decode.cuda.table import FORMATS
from sun.decode.engine import DecodeEngine
from sun.decode.executors import EXECUTORS, formats, load, why_not

from ..conftest import DEVICE
from .harness import within

PROMPTS = {"a": [1, 2, 3], "b": [5] * 70, "c": [9]}
SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 2}


def test_sequences_get_the_tokens_that_they_get_from_plain_torch(bench, base_dir):
    plain = bench()
    loaded = load("cuda", base_dir, "fp32", kv_tokens=120, max_batch=2, device=DEVICE)
    other = bench()
    within(other.engine.close)
    other.engine = DecodeEngine(loaded.base, loaded.executor, loaded.pool, [other.transport], 2, pick=loaded.pick)
    answers = []
    for it in (plain, other):
        for id, prompt in PROMPTS.items():
            it.admit(id, prompt, max_tokens=3, **(SAMPLED if id == "a" else {}))
        answers.append(it.answers())
    assert answers[0] == answers[1] and {len(tokens) for tokens in answers[0].values()} == {3}
    # A sequence that another worker began goes on from the same KV and tokens.
    other.admit("b", PROMPTS["b"], generated=answers[0]["b"][:2], max_tokens=3)
    assert other.answers()["b"] == answers[0]["b"][2:]


def test_an_unknown_executor_or_format_is_refused_by_name(base_dir):
    with pytest.raises(ValueError, match="executor: got 'tpu', expected one of cpu, cuda"):
        load("tpu", base_dir, "fp32")
    with pytest.raises(ValueError, match="scheme: got 'nf4', executor cuda has fp32"):
        load("cuda", base_dir, "nf4", device=DEVICE)
    with pytest.raises(ValueError, match="scheme: got 'fp8', executor cpu has fp32"):
        load("cpu", base_dir, "fp8")


def test_the_schemes_that_the_cuda_executor_is_said_to_have_are_its_formats():
    assert EXECUTORS["cuda"] == tuple(FORMATS)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_without_a_gpu_it_is_said_why_there_is_no_cuda_executor(base_dir):
    assert "CUDA" in why_not("cuda") and formats("cuda") == {}
    with pytest.raises(RuntimeError, match="executor: cuda does not run here"):
        load("cuda", base_dir, "bf16", device="cuda:0")


@pytest.mark.parametrize("compiler, named, headers, words", [
    (None, None, True, "neither gcc nor clang is on PATH"), ("gcc", "icx", True, "CC=icx is not on PATH"), ("gcc", None, False, "there is no .*Python.h"),
    ("clang", None, True, None), ("icx", "icx", True, None)])
def test_what_compiles_launchers_is_looked_for_before_a_worker_needs_it(monkeypatch, tmp_path, compiler, named, headers, words):
    monkeypatch.setattr("sun.gpu.missing", lambda: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", named) if named else monkeypatch.delenv("CC", raising=False)
    if compiler:
        (tmp_path / compiler).touch(0o755)
    if headers:
        (tmp_path / "Python.h").touch()
    reason = why_not("cuda")
    assert reason is words is None or re.search(words, reason)


def test_all_formats_of_the_cpu_run_here():
    assert tuple(formats("cpu")) == EXECUTORS["cpu"] and not any(formats("cpu").values())
