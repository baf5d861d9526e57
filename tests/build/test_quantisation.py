"""`sun quantize`: what a number format loses is measured, and workers are told to run it."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from sun_build.quantisation import ids_of, loss
from sun_client.cli import app
from sun_build.config_file import set_parameter

TEXT = "A text of a few dozen bytes, each a token of its own."


def test_full_precision_loses_nothing_and_a_low_bit_module_something_in_every_layer(base_dir):
    ids = ids_of(base_dir, TEXT)
    whole, low = loss(base_dir, "fp32", ids), loss(base_dir, "int8", ids)
    assert whole.top1 == 1 and whole.kl == pytest.approx(0, abs=1e-6) and whole.perplexity == whole.full_perplexity
    assert set(whole.layers.values()) == {0.0}
    assert low.kl > 0 and len(low.layers) == 2 * 7 + 1
    assert all(0 < error < 0.1 for error in low.layers.values())


def test_too_short_a_text_is_refused(base_dir):
    with pytest.raises(ValueError, match="text: 2 tokens, at least 32"):
        ids_of(base_dir, "ab")


def test_the_command_reports_and_applies(root, tmp_path):
    config = root / "model_repository" / "decode_0" / "config.pbtxt"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('backend: "sun_decode"\n')
    made = CliRunner().invoke(app, ["quantize", "--batch", "2", "--report", str(tmp_path / "r.json"), "--scheme", "int8", "--apply", "--root", str(root)])
    assert made.exit_code == 0, made.output
    assert "int8: as asked for" in made.output and "Largest errors" in made.output
    assert json.loads((tmp_path / "r.json").read_text())["scheme"] == "int8"
    assert config.read_text() == 'backend: "sun_decode"\nparameters { key: "scheme" value { string_value: "int8" } }\n'
    set_parameter(config, "scheme", "int4")
    assert config.read_text().count("scheme") == 1 and '"int4"' in config.read_text()
    set_parameter(config, "scheme", "")
    assert config.read_text() == 'backend: "sun_decode"\n' and list(config.parent.iterdir()) == [config]


def test_a_scheme_whose_package_is_missing_is_left_out_and_refused_where_asked_for(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused = CliRunner().invoke(app, ["quantize", "--scheme", "bnb-int8", "--root", str(root)])
    assert refused.exit_code and "--scheme: bnb-int8 does not run here" in str(refused.exception) and "pip install" in str(refused.exception)
    made = CliRunner().invoke(app, ["quantize", "--batch", "1", "--root", str(root)])
    assert made.exit_code == 0, made.output
    assert "bnb-nf4  left out: scheme bnb-nf4 needs the package bitsandbytes" in made.output and ": the fastest at this batch." in made.output


def test_an_unknown_scheme_is_refused_by_name(root):
    refused = CliRunner().invoke(app, ["quantize", "--scheme", "int3", "--root", str(root)])
    assert refused.exit_code and "int3" in str(refused.exception)
