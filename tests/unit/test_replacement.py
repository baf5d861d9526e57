"""A decode module is replaced worker by worker; what cannot be loaded leaves the worker as it was and ends the roll."""

from __future__ import annotations

import pytest

from sun.messages import Ack, Load, Stats
from sun_client import replacement
from sun_client.errors import ServerError
from sun_client.replacement import Replacement

BEFORE = 'backend: "sun_decode"\n'


class Workers:
    """Control of workers that are not there: what each runs, and what was done. A module named "bad" does not load.

    left: a worker's sequences, of which one ends at each look; stuck: they end only when evicted.
    """

    def __init__(self, configs, left=0, stuck=False):
        self.configs, self.stuck = configs, stuck
        self.loaded = {worker: self.module(worker) for worker in configs}
        self.left = dict.fromkeys(configs, left)
        self.draining: set[str] = set()
        self.done: list[str] = []

    def module(self, worker):
        text = self.configs[worker].read_text()
        return text.split('string_value: "')[1].split('"')[0] if "scheme" in text else "fp32"

    def stats(self, worker):
        if worker not in self.loaded:
            raise ServerError(f"{worker}: is not loaded")
        left = self.left[worker]
        if worker in self.draining and left and not self.stuck:
            self.left[worker] -= 1
        return Stats(running=left, waiting=0, load=Load(left, left), free_tokens=10 - left, budget_tokens=10, step=0, steps=[],
                     draining=worker in self.draining, module=self.loaded[worker])

    def drain(self, worker, on=True, evict=False):
        self.stats(worker)
        self.done.append(f"drain {worker}" if on else f"undrain {worker}")
        (self.draining.add if on else self.draining.discard)(worker)
        if evict:
            self.done.append(f"evict {worker}")
            self.left[worker] = 0
        return Ack(load=Load(0, 0))

    def unload(self, worker):
        assert any(other not in self.draining for other in self.loaded if other != worker), "nobody serves"
        assert not self.left[worker], "it has sequences"
        self.done.append(f"unload {worker}")
        self.loaded.pop(worker, None)
        self.draining.discard(worker)

    def load(self, worker):
        self.done.append(f"load {worker}")
        if self.module(worker) == "bad":
            raise ServerError(f"{worker}: does not load")
        self.loaded[worker] = self.module(worker)


@pytest.fixture
def configs(tmp_path):
    paths = {worker: tmp_path / worker / "config.pbtxt" for worker in ("decode_0", "decode_1", "decode_2")}
    for path in paths.values():
        path.parent.mkdir()
        path.write_text(BEFORE)
    return paths


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(replacement, "LOOK_S", 0.001)
    monkeypatch.setattr(replacement, "BACK_S", 0.0)


def replace(workers, configs, grace_s=60.0, **values):
    Replacement(workers, configs, values, grace_s, lambda line: None).run()


def test_one_after_the_other_drains_and_is_loaded_with_the_new_setting(configs):
    workers = Workers(configs, left=3)
    replace(workers, configs, scheme="int8")
    assert workers.done == [f"{step} {worker}" for worker in configs for step in ("drain", "unload", "load")]
    assert set(workers.loaded.values()) == {"int8"} and not workers.draining


def test_without_a_setting_each_is_loaded_anew(configs):
    workers = Workers(configs)
    replace(workers, configs)
    assert workers.done.count("load decode_1") == 1 and all(path.read_text() == BEFORE for path in configs.values())


def test_what_does_not_end_within_the_grace_is_evicted(configs):
    workers = Workers(configs, left=3, stuck=True)
    replace(workers, configs, grace_s=0.01, scheme="int8")
    assert [step for step in workers.done if "evict" in step] == ["evict decode_0", "evict decode_1", "evict decode_2"]
    assert set(workers.loaded.values()) == {"int8"}


def test_one_that_does_not_load_is_put_back_and_no_other_is_touched(configs):
    workers = Workers(configs)
    with pytest.raises(ServerError, match="decode_0: does not load; decode_0 serves as before; replaced before it: none"):
        replace(workers, configs, scheme="bad")
    assert set(workers.loaded.values()) == {"fp32"} and len(workers.loaded) == 3 and not workers.draining
    assert all(path.read_text() == BEFORE for path in configs.values())


def test_those_that_were_replaced_before_one_that_does_not_load_are_named(configs, monkeypatch):
    workers = Workers(configs)
    loaded, load = [], workers.load
    monkeypatch.setattr(workers, "load", lambda worker: load(worker) if loaded.append(worker) or len(loaded) != 2 else failing(worker))

    def failing(worker):
        raise ServerError(f"{worker}: no memory")

    with pytest.raises(ServerError, match="decode_1: no memory; decode_1 serves as before; replaced before it: decode_0"):
        replace(workers, configs, scheme="int8")
    assert workers.loaded == {"decode_0": "int8", "decode_1": "fp32", "decode_2": "fp32"}


def test_a_full_disk_leaves_setting_and_worker_as_they_were(configs, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sun_build.config_file.write_whole", full)
    workers = Workers(configs)
    with pytest.raises(ServerError, match="No space left on device; decode_0 serves as before"):
        replace(workers, configs, scheme="int8")
    assert workers.done == ["drain decode_0", "undrain decode_0"] and configs["decode_0"].read_text() == BEFORE


def test_an_interrupt_puts_the_worker_back(configs, monkeypatch):
    workers = Workers(configs, left=1, stuck=True)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(replacement.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace(workers, configs, scheme="int8")
    assert workers.done == ["drain decode_0", "undrain decode_0"] and not workers.draining


@pytest.mark.parametrize("others", ["none", "draining", "not loaded"])
def test_the_last_that_serves_is_not_replaced(configs, others):
    if others == "none":
        configs = {"decode_0": configs["decode_0"]}
    workers = Workers(configs)
    if others == "draining":
        workers.draining |= {"decode_1", "decode_2"}
    if others == "not loaded":
        workers.loaded = {"decode_0": "fp32"}
    with pytest.raises(ServerError, match="decode_0: no other decode worker serves"):
        replace(workers, configs, scheme="int8")
    assert workers.done == [] and workers.loaded["decode_0"] == "fp32"


def test_a_worker_that_an_earlier_try_left_unloaded_is_loaded(configs):
    workers = Workers(configs)
    del workers.loaded["decode_1"]
    replace(workers, configs, scheme="int8")
    assert len(workers.loaded) == 3 and set(workers.loaded.values()) == {"int8"}
