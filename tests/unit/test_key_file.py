"""The file of keys: what is added can be read, by its owner alone, and holds no key."""

from __future__ import annotations

import json
import threading

import pytest

from sun.router import key_file


def test_an_added_key_is_kept_as_its_digest_alone(tmp_path):
    path = tmp_path / "keys.json"
    secret = key_file.add(path, "alice", tokens_per_minute=500, tasks=["bash"])
    (key,) = key_file.read(path)
    assert key == key_file.Key("alice", key_file.digest(secret), tokens_per_minute=500, tasks=["bash"])
    assert secret not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert len({secret, *(key_file.add(path, f"k{i}") for i in range(5))}) == 6


def test_a_removed_key_is_gone_and_others_stay(tmp_path):
    path = tmp_path / "keys.json"
    for name in ("a", "b", "c"):
        key_file.add(path, name)
    key_file.remove(path, "b")
    assert [key.name for key in key_file.read(path)] == ["a", "c"]
    with pytest.raises(ValueError, match="no key 'b'"):
        key_file.remove(path, "b")
    with pytest.raises(ValueError, match="'a' exists"):
        key_file.add(path, "a")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_file_that_others_may_read_or_write_is_refused_with_what_to_do(tmp_path, mode):
    path = tmp_path / "keys.json"
    key_file.add(path, "alice")
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"mode {mode:04o}.*chmod 600"):
        key_file.read(path)


GOOD = {"name": "a", "sha256": "0" * 64}


@pytest.mark.parametrize(("content", "words"), [
    ("{", "truncated"), ({"keys": [{**GOOD, "max_inflight": 0}]}, "max_inflight"), ({"keys": [{**GOOD, "max_infligt": 1}]}, "max_infligt"),
    ({"keys": [{**GOOD, "sha256": "abc"}]}, "sha256"), ({"keys": [{**GOOD, "name": "a b"}]}, "name"), ({"keys": [GOOD, GOOD]}, "name a is there twice"),
    ({"keys": [GOOD, {**GOOD, "name": "b"}]}, "sha256 0+ is there twice"), ({"keys": [{**GOOD, "priority_class": "urgent"}]}, "priority_class"),
])
def test_a_bad_file_is_refused_naming_the_field(tmp_path, content, words):
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    with pytest.raises(ValueError, match=f"keys: {path}: .*{words}"):
        key_file.read(path)


@pytest.mark.parametrize("bounds", [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"priority_class": "urgent"}])
def test_bad_bounds_are_refused_and_leave_the_file_alone(tmp_path, bounds):
    with pytest.raises(ValueError, match=next(iter(bounds))):
        key_file.add(tmp_path / "keys.json", "alice", **bounds)
    assert not (tmp_path / "keys.json").exists()


def test_keys_added_at_once_are_all_there(tmp_path):
    threads = [threading.Thread(target=key_file.add, args=(tmp_path / "keys.json", f"k{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(key_file.read(tmp_path / "keys.json")) == 8
