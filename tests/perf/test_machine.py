"""A result tells machines apart by the instruction sets that its figures depend on, and names the code that it is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from sun_perf import machine as place
from sun_perf.machine import commit, in_words

CPU = "processor\t: {index}\nmodel name\t: Some CPU @ 2.4: GHz\nflags\t\t: fpu avx2 {flags}\n\n"


@pytest.mark.parametrize(("flags", "told"), [
    ("avx512f avx512_bf16 avx512_vnni amx_tile", " avx512_vnni avx512_bf16"), ("avx_vnni", " avx_vnni"), ("avx512_vnniw amx_int", ""),
])
def test_instruction_sets_are_in_a_result(tmp_path, monkeypatch, flags, told):
    (tmp_path / "cpuinfo").write_text("".join(CPU.format(index=index, flags=flags) for index in range(2)) + "no field\n")
    monkeypatch.setattr(place, "CPUINFO", tmp_path / "cpuinfo")
    made = place.machine()
    assert made["cpu"] == "Some CPU @ 2.4: GHz" and made["instructions"] == torch.backends.cpu.get_cpu_capability() + told
    assert in_words(made).startswith(f"Some CPU @ 2.4: GHz, {made['instructions']}, {made['cpus']} CPUs, ")


def test_without_cpuinfo_it_is_what_torch_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "CPUINFO", tmp_path / "none")
    assert place.machine()["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_an_older_result_has_none():
    assert in_words({"cpu": "Some CPU", "cpus": 2, "gpu": "none", "torch": "2.13.0"}) == "Some CPU, 2 CPUs, GPU none, torch 2.13.0"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with code and a result."""
    for name in ("code.py", "perf/results/bench.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_results_written_earlier_in_a_run_do_not_make_the_code_another(checkout):
    clean = commit(checkout)
    (checkout / "perf" / "results" / "bench.json").write_text("two")
    assert not clean.endswith("+") and commit(checkout) == commit(checkout / "perf" / "results") == clean
    (checkout / "code.py").write_text("two")
    assert commit(checkout) == commit(checkout / "perf" / "results") == f"{clean}+"


def test_outside_of_git_the_commit_is_unknown(tmp_path):
    assert commit(tmp_path) == "unknown"
