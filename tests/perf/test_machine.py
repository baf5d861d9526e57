"""A result tells machines apart by the instruction sets that its figures depend on."""

from __future__ import annotations

import pytest
import torch

from sun_perf import machine as place
from sun_perf.machine import in_words

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
