"""A task is a folder: added whole or not at all, and what does not fit is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sun.router.tasks import TaskRegistry
from sun_build.config_file import parameter, set_parameter
from sun_build.task_entries import remove_task
from sun_build.tasks import add_task, describe_weights
from tests.unit import tiny


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / "model_repository" / "sun" / "1").mkdir(parents=True)
    return tmp_path / "model_repository"


def names(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.iterdir())


def test_add_writes_a_prefill_model_and_an_ensemble_and_remove_deletes_both(repository, base_dir, tmp_path):
    weights = tiny.adapter(tmp_path / "adapter", base_dir)
    describe_weights(base_dir, weights, "tuned", {"temperature": 0.5}, {"name": "exact"})
    manifest = add_task(repository, base_dir, "mine", weights)
    assert (manifest.name, manifest.sampling, manifest.metric) == ("mine", {"temperature": 0.5}, {"name": "exact"})
    assert names(repository) == ["mine", "prefill_mine", "sun"]
    assert TaskRegistry(repository).get("mine") == manifest
    (repository / "kv_mine" / "1").mkdir(parents=True)  # as `sun export` leaves it
    remove_task(repository, "mine")
    assert names(repository) == ["sun"]
    with pytest.raises(ValueError, match="no task 'mine'"):
        remove_task(repository, "mine")


def test_removing_a_task_does_not_wait_for_torch(repository):
    code = "import sys; from sun_client.cli import app; app(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "task", "remove", "mine", "--root", str(repository.parent)]
    for folder in ("mine", "prefill_mine"):
        (repository / folder / "1").mkdir(parents=True)
    (repository / "prefill_mine" / "1" / "task.json").write_text("{}")
    subprocess.run(command, check=True)
    assert names(repository) == ["sun"]


def test_a_full_checkpoint_and_the_bases_own_weights_are_tasks_too(repository, base_dir, tmp_path):
    assert add_task(repository, base_dir, "full", tiny.checkpoint(tmp_path / "full", seed=5)).weights == "full"
    assert add_task(repository, base_dir, "same").weights == "identity"


@pytest.mark.parametrize(("kind", "layers", "words"), [("qwen2", 2, "bias"), ("llama", 3, "layers.2"), ("llama", 1, "layers.1")])
def test_a_checkpoint_of_another_geometry_is_refused_by_tensor(repository, base_dir, tmp_path, monkeypatch, kind, layers, words):
    monkeypatch.setitem(tiny.SIZE, "num_hidden_layers", layers)
    with pytest.raises(ValueError, match=f"^checkpoint: tensor .*{words}"):
        add_task(repository, base_dir, "mine", tiny.checkpoint(tmp_path / "full", kind))
    assert names(repository) == ["sun"]


def test_adding_again_replaces(repository, base_dir, tmp_path):
    add_task(repository, base_dir, "mine")
    assert add_task(repository, base_dir, "mine", tiny.adapter(tmp_path / "adapter", base_dir)) == TaskRegistry(repository).get("mine")


@pytest.mark.parametrize(("executor", "stays"), [("onnx", ""), ("triton", ""), ("cuda", "cuda"), ("torch", "torch")])
def test_what_an_operator_has_set_stays_when_the_weights_change_but_for_an_export_of_the_old_ones(repository, base_dir, tmp_path, executor, stays):
    add_task(repository, base_dir, "mine")
    for name, value in (("scheme", "int8"), ("executor", executor), ("nice", "5")):
        set_parameter(repository / "prefill_mine" / "config.pbtxt", name, value)
    add_task(repository, base_dir, "mine", tiny.adapter(tmp_path / "adapter", base_dir))
    assert [parameter(repository, "prefill_mine", name) for name in ("scheme", "executor", "nice")] == ["int8", stays, "5"]


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../x", "sun", "prefill_x", "decode_0", "kv_x", "x" * 64])
def test_a_name_that_cannot_be_is_refused(repository, base_dir, name):
    with pytest.raises(ValueError, match="^name: "):
        add_task(repository, base_dir, name)
    assert names(repository) == ["sun"]


def test_weights_of_another_base_or_changed_ones_are_refused_by_field(repository, base_dir, tmp_path):
    weights = tiny.adapter(tmp_path / "adapter", base_dir)
    describe_weights(base_dir, weights, "tuned")
    card = weights / "task.json"
    whole = json.loads(card.read_text())
    for field, value in {"base_digest": "sha256:0", "weights_digest": "sha256:0", "prompt": {"system_prompt": "other"}}.items():
        card.write_text(json.dumps({**whole, field: value}))
        with pytest.raises(ValueError, match=f"task.json {field}"):
            add_task(repository, base_dir, "mine", weights)
    assert names(repository) == ["sun"]


def test_a_folder_without_weights_is_refused(repository, base_dir, tmp_path):
    with pytest.raises(ValueError, match="^weights: "):
        add_task(repository, base_dir, "mine", tmp_path)


@pytest.mark.parametrize("fits", [0, 1])
def test_a_full_disk_leaves_the_old_version_whole_and_no_half_folder(repository, base_dir, tmp_path, monkeypatch, fits):
    before = add_task(repository, base_dir, "mine")
    copy, copied = shutil.copyfile, []

    def full(source, target):
        copied.append(target)
        if len(copied) > fits:
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        add_task(repository, base_dir, "mine", tiny.adapter(tmp_path / "adapter", base_dir))
    with pytest.raises(OSError, match="No space left on device"):
        add_task(repository, base_dir, "new", tmp_path / "adapter")
    assert names(repository) == ["mine", "prefill_mine", "sun"] and TaskRegistry(repository).get("mine") == before
    assert [path.name for path in repository.parent.iterdir() if path.name.startswith(".task-")] == []
