"""`sun task add` beside a running server: what the server cannot load is taken back, from disk as from the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sun.router.tasks import TaskRegistry
from sun_build.config_file import parameter, set_parameter
from sun_client.cli import app
from sun_client.control import Control
from sun_client.errors import ServerError
from tests.unit import tiny

MODELS = ["prefill_mine", "mine"]


class Served:
    """Control of a server that is not there: the folder of each model as it was when it was loaded. A model in ``refused`` does not load."""

    http_port = 8000

    def __init__(self, models: Path):
        self._models = models
        self.loaded: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, BaseException] = {}

    def load(self, *models):
        for model in models:
            if error := self.refused.pop(model, None):
                raise error
            self.loaded[model] = files(self._models / model)

    def unload(self, *models):
        for model in models:
            if model not in self.loaded:
                raise ServerError(f"{model}: is not loaded")
            del self.loaded[model]


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def root(root, base_dir, tmp_path) -> Path:
    """The root, and an adapter for a task beside it."""
    tiny.adapter(tmp_path / "adapter", base_dir)
    return root


@pytest.fixture
def servers(root, monkeypatch) -> list[Served]:
    """Two servers of the root."""
    servers = [Served(root / "model_repository") for _ in range(2)]
    monkeypatch.setattr(Control, "running", lambda root: iter(servers))
    return servers


def add(root: Path, *words: str) -> str:
    return CliRunner().invoke(app, ["task", "add", "mine", "--root", str(root), *words], catch_exceptions=False).stdout


def test_an_added_task_is_served_and_nothing_else_is_left(root, servers):
    assert add(root).count("serves it now") == 2
    assert "added with lora weights" in add(root, "--weights", str(root.parent / "adapter"))
    assert all(served.loaded == {model: files(root / "model_repository" / model) for model in MODELS} for served in servers)
    assert TaskRegistry(root / "model_repository").get("mine").weights == "lora" and sorted(path.name for path in root.iterdir()) == ["build", "model_repository"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("error", [ServerError("prefill_mine: cores: got 'many'"), KeyboardInterrupt()], ids=["refused", "interrupted"])
def test_an_update_that_one_server_does_not_load_leaves_disk_and_all_servers_as_they_were(root, servers, model, error):
    add(root)
    set_parameter(root / "model_repository" / "prefill_mine" / "config.pbtxt", "nice", "5")
    for served in servers:
        served.load(*MODELS)
    before = files(root)
    servers[1].refused[model] = error
    run = CliRunner().invoke(app, ["task", "add", "mine", "--root", str(root), "--weights", str(root.parent / "adapter")])
    assert run.exit_code != 0 and "added" not in run.stdout
    if isinstance(error, ServerError):
        assert str(run.exception) == f"{error}; mine is as it was before, files and answers"
    assert files(root) == before and parameter(root / "model_repository", "prefill_mine", "nice") == "5"
    assert all(served.loaded == {model: files(root / "model_repository" / model) for model in MODELS} for served in servers)


def test_a_new_task_that_one_server_does_not_load_is_nowhere(root, servers):
    servers[1].refused["prefill_mine"] = ServerError("prefill_mine: no memory")
    with pytest.raises(ServerError, match="^prefill_mine: no memory; mine was not added$"):
        add(root)
    assert list((root / "model_repository").iterdir()) == [] and all(served.loaded == {} for served in servers)


def test_a_task_whose_folder_cannot_be_moved_in_leaves_the_old_one(root, servers, monkeypatch):
    add(root)
    before, rename = files(root), Path.rename

    def full(self, target):
        if self.name == "mine" and self.parent.name.startswith(".task-"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        add(root, "--weights", str(root.parent / "adapter"))
    assert files(root) == before
