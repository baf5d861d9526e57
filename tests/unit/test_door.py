"""Prefill modules and decode workers answer nobody but the router, where keys are on."""

from __future__ import annotations

import json

import pytest

from sun import door


def test_without_a_secret_every_door_is_open(monkeypatch):
    monkeypatch.delenv(door.VARIABLE, raising=False)
    door.check("")
    assert not door.closed()
    assert door.pass_on() == {}
    with pytest.raises(ValueError, match=f"^keys: .*{door.VARIABLE}"):
        door.demand()


def test_with_one_only_the_router_comes_in(monkeypatch):
    monkeypatch.setenv(door.VARIABLE, "s3cret")
    door.demand()
    assert door.closed()
    door.check(json.dumps(door.pass_on()))
    for parameters in ("", "{}", '{"sun_door": ""}', '{"sun_door": "s3cre"}', '{"sun_door": 7}', '{"sun_door": "\\ud800"}', '{"api_key": "s3cret"}'):
        with pytest.raises(ValueError, match="answers `sun` alone"):
            door.check(parameters)
