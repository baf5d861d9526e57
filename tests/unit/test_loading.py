"""A task's module is loaded only with the base, prompt and weights that its manifest names."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from sun.model.loading import load_prefill
from sun.model.manifest import TaskManifest, write_manifest
from sun.text.prompt import PromptSettings


@pytest.fixture
def task_dir(repository, tmp_path) -> Path:
    """A copy of the LoRA task, to be changed."""
    shutil.copytree(repository / "prefill_lora" / "1", tmp_path / "task")
    return tmp_path / "task"


def retell(folder: Path, **values) -> None:
    write_manifest(folder, msgspec.structs.replace(TaskManifest.load(folder), **values))


@pytest.mark.parametrize(("field", "value"), [
    ("base_digest", "sha256:other"), ("weights_digest", "sha256:other"), ("prompt", PromptSettings(system_prompt="be brief")),
])
def test_a_manifest_that_does_not_fit_is_refused_naming_the_field(base_dir, task_dir, field, value):
    retell(task_dir, **{field: value})
    with pytest.raises(ValueError, match=rf"^task\.json {field}: "):
        load_prefill(base_dir, task_dir)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_weights_that_were_changed_are_refused(base_dir, task_dir, file):
    data = bytearray((task_dir / file).read_bytes())
    data[-2] ^= 1
    (task_dir / file).write_bytes(data)
    with pytest.raises(ValueError, match=r"^task\.json weights_digest: "):
        load_prefill(base_dir, task_dir)


def test_every_kind_of_task_is_loaded_under_its_name(base_dir, repository):
    for kind, name in (("identity", "plain"), ("lora", "lora"), ("full", "full")):
        task, module = load_prefill(base_dir, repository / f"prefill_{name}" / "1")
        assert (task.name, task.weights) == (name, kind) and len(module.layers) == 2


def test_a_manifest_survives_its_file(repository, tmp_path):
    task = TaskManifest.load(repository / "prefill_terse" / "1")
    write_manifest(tmp_path, task)
    assert TaskManifest.load(tmp_path) == task and task.sampling == {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
