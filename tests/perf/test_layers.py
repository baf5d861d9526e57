"""The bench of linear layers runs every format both ways, and says so where our kernels do not run."""

from __future__ import annotations

import sys

import pytest

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_perf import layers
from tests.unit import tiny


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    build_base(str(tiny.checkpoint(folder / "source", "wide")), folder / "base", PromptSettings())
    return folder / "base"


def test_a_run_has_both_ways_of_every_format(base_dir):
    made = layers.report(base_dir, counts=(1, 3), rounds=1)
    assert [(row["scheme"], row["rows"]) for row in made["layers"]] == [(scheme, rows) for scheme in layers.SCHEMES for rows in (1, 3)]
    assert all(row["ours"] > 0 and row["library"] > 0 for row in made["layers"])


def test_a_cpu_without_avx512_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(layers, "VNNI", False)
    monkeypatch.setattr(sys, "argv", ["layers"])
    with pytest.raises(SystemExit, match="1"):
        layers.main()
    assert "no AVX-512" in capsys.readouterr().err
