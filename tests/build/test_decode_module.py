"""`sun decode replace` where no server runs, and what it refuses."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.config_file import set_parameter
from sun_build.tasks import add_task
from sun_client.cli import app
from tests.unit import tiny

CONFIG = 'backend: "sun_decode"\n'


@pytest.fixture
def config(root):
    """The setting of the root's one worker; there is a task, too."""
    add_task(root / "model_repository", root / "build" / "base", "plain")
    config = root / "model_repository" / "decode_0" / "config.pbtxt"
    config.parent.mkdir()
    config.write_text(CONFIG)
    return config


def replace(root, *options):
    return CliRunner().invoke(app, ["decode", "replace", *map(str, options), "--root", str(root)])


def test_without_a_server_the_setting_is_written_for_the_next(root, config):
    done = replace(root, "--scheme", "int8")
    assert done.exit_code == 0 and "the next one decodes with it" in done.output
    assert '"int8"' in config.read_text()


def test_a_checkpoint_of_the_same_base_is_taken_and_the_base_itself_sets_it_back(root, config, tmp_path):
    same = tmp_path / "elsewhere"
    same.symlink_to((root / "build" / "base").resolve())
    copied = tmp_path / "copied"
    build_base(str(root / "build" / "base"), copied, PromptSettings())
    assert replace(root, "--weights", copied).exit_code == 0 and str(copied) in config.read_text()
    assert replace(root, "--weights", same).exit_code == 0 and config.read_text() == CONFIG


@pytest.mark.parametrize("in_place", [True, False])
def test_a_module_of_another_base_than_a_tasks_is_refused_naming_both(root, config, tmp_path, in_place):
    other = build_base(str(tiny.checkpoint(tmp_path / "source", seed=5)), tmp_path / "other", PromptSettings()).digest
    if in_place:
        (root / "build" / "base").unlink()
        (root / "build" / "base").symlink_to(tmp_path / "other")
    refused = replace(root, *([] if in_place else ["--weights", tmp_path / "other"]), "--scheme", "int8")
    assert refused.exit_code and other in str(refused.exception) and "task 'plain' was made for base sha256:" in str(refused.exception)
    assert config.read_text() == CONFIG


@pytest.mark.parametrize(("executor", "taken", "refused"), [("cpu", "nf4", "fp8"), ("cuda", "fp8", "nf4")])
def test_a_workers_executor_says_which_schemes_it_takes(root, config, executor, taken, refused):
    set_parameter(config, "executor", executor)
    before = config.read_text()
    done = replace(root, "--scheme", refused)
    assert done.exit_code and f"--scheme: decode_0: scheme: got '{refused}', executor {executor} has fp32, " in str(done.exception)
    assert config.read_text() == before
    assert replace(root, "--scheme", taken).exit_code == 0 and f'"{taken}"' in config.read_text()


@pytest.mark.parametrize(("options", "reason"), [(["--scheme", "int3"], "int3"), (["--weights", "/nowhere"], "--weights: /nowhere is not a folder")])
def test_bad_options_are_refused_by_name(root, config, options, reason):
    refused = replace(root, *options)
    assert refused.exit_code and reason in str(refused.exception) and config.read_text() == CONFIG
