"""The tasks are the folders that are there now."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from sun.model.manifest import TaskManifest
from sun.router.errors import RequestError
from sun.router.tasks import TaskRegistry

from . import tiny


@pytest.fixture
def registry(base_dir, tmp_path) -> TaskRegistry:
    tiny.task(tmp_path / "repository", base_dir, "a")
    tiny.task(tmp_path / "repository", base_dir, "b", sampling={"top_k": 3})
    return TaskRegistry(tmp_path / "repository")


def test_tasks_are_named_in_order_and_found(registry):
    assert registry.names() == ["a", "b"]
    assert registry.get("b").sampling == {"top_k": 3}


def test_a_task_that_comes_or_goes_is_seen_without_a_restart(registry, base_dir):
    tiny.task(registry.repository, base_dir, "c")
    assert registry.names() == ["a", "b", "c"] and registry.get("c").name == "c"
    shutil.rmtree(registry.repository / "prefill_a")
    with pytest.raises(RequestError, match="^task: 'a' is not known; the tasks here are b, c"):
        registry.get("a")


def test_a_task_that_goes_while_it_is_read_is_not_found(registry, monkeypatch):
    def gone(folder):
        raise FileNotFoundError(folder)

    monkeypatch.setattr(TaskManifest, "load", gone)
    with pytest.raises(RequestError, match="^task: 'a' is not known") as error:
        registry.get("a")
    assert error.value.code == "NOT_FOUND"


def test_a_task_that_is_replaced_is_read_again(registry, base_dir):
    assert registry.get("a").sampling == {}
    shutil.rmtree(registry.repository / "prefill_a")
    tiny.task(registry.repository, base_dir, "a", sampling={"top_k": 9})
    assert registry.get("a").sampling == {"top_k": 9}


def test_a_task_whose_folder_is_being_replaced_is_there_all_the_while(registry, base_dir):
    tiny.task(registry.repository.parent / "new", base_dir, "a", sampling={"top_k": 9})
    old, new = registry.repository / "prefill_a", registry.repository.parent / "new" / "prefill_a"
    assert registry.get("a").sampling == {}
    old.rename(registry.repository.parent / "old")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(registry.get, "a")
        assert not wait((asked,), 0.05).done
        new.rename(old)
        assert asked.result().sampling == {"top_k": 9}


def test_no_task_at_all_is_an_invalid_argument(registry):
    with pytest.raises(RequestError, match="^task: is missing; the tasks here are a, b") as error:
        registry.get(None)
    assert error.value.code == "INVALID_ARG"


@pytest.mark.parametrize("name", ["", "z", "A", "../prefill_a", "a/1", "a\n", "a\x00", "x" * 100_000])
def test_a_name_that_is_no_task_is_not_found(registry, name):
    with pytest.raises(RequestError, match="^task: .* is not known") as error:
        registry.get(name)
    assert error.value.code == "NOT_FOUND" and len(str(error.value)) < 500
