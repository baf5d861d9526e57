"""Inference keys: whoever has one asks what it allows, as much as it allows; whoever has none learns nothing."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.router import key_file
from sun.router.bucket import Bucket
from sun.router.errors import Busy, RequestError
from sun.router.keys import Keys
from sun.router.request import Handover

from .harness import OPEN_ENDED, TEXT, Service
from .test_meter import Kept


class Clock:
    """A clock that a test turns."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(tmp_path, clock):
    """A function: keys with these bounds; the key itself, and the keys as the router has them."""

    def make(**bounds) -> tuple[str, Keys]:
        return key_file.add(tmp_path / "keys.json", "alice", **bounds), Keys(tmp_path / "keys.json", clock)

    return make


def refusal(keys: Keys, api_key: str | None, task: str = "plain", priority: str | None = None) -> RequestError:
    with pytest.raises(RequestError) as error:
        keys.holder(api_key).enter(task, priority, lambda: 7.2)
    return error.value


def test_a_wrong_and_a_missing_key_get_the_same_answer(keyring):
    secret, keys = keyring(tasks=["plain"])
    errors = [refusal(keys, api_key, task) for api_key in (None, "", "sun-wrong", secret + "x", secret.upper()) for task in ("plain", "lora")]
    assert {error.code for error in errors} == {"UNAUTHENTICATED"} and len({str(error) for error in errors}) == 1
    assert keys.holder(secret).name == "alice"


def test_only_its_tasks_and_priorities_may_be_asked_for(keyring):
    secret, keys = keyring(tasks=["plain", "lora"], priority_class="low")
    assert refusal(keys, secret, "full").code == "PERMISSION_DENIED" and "plain, lora" in str(refusal(keys, secret, "full"))
    assert refusal(keys, secret, "plain", "normal").code == "PERMISSION_DENIED"
    assert keys.holder(secret).enter("lora", None, lambda: 0.0).priority == keys.holder(secret).enter("lora", "low", lambda: 0.0).priority == "low"


def test_an_ordinary_key_has_normal_priority_and_may_ask_for_less(keyring):
    secret, keys = keyring()
    assert [keys.holder(secret).enter("plain", asked, lambda: 0.0).priority for asked in (None, "normal", "low")] == ["normal", "normal", "low"]
    assert "priority_class" in str(refusal(keys, secret, "plain", "high"))


def test_requests_a_minute_are_refused_with_the_time_until_the_next(keyring, clock):
    secret, keys = keyring(requests_per_minute=3)
    for _ in range(3):
        keys.holder(secret).enter("plain", None, lambda: 0.0).end(0)
    error = refusal(keys, secret)
    assert isinstance(error, Busy) and error.retry_after_s == 20 and str(error).startswith("requests_per_minute: ")
    assert str(error).endswith("; retry after 20 s")
    clock.now += 19.9
    assert refusal(keys, secret).retry_after_s == 1
    clock.now += 0.2
    keys.holder(secret).enter("plain", None, lambda: 0.0)


def test_requests_in_flight_are_bounded_and_an_end_makes_room(keyring):
    secret, keys = keyring(max_inflight=2)
    first, _ = (keys.holder(secret).enter("plain", None, lambda: 0.0) for _ in range(2))
    assert refusal(keys, secret).retry_after_s == 8 and str(refusal(keys, secret)).startswith("max_inflight: ")
    first.end(0)
    keys.holder(secret).enter("plain", None, lambda: 0.0)


def test_tokens_are_charged_before_and_what_was_not_used_comes_back(keyring, clock):
    secret, keys = keyring(tokens_per_minute=600)
    first, second, third = (keys.holder(secret).enter("plain", None, lambda: 0.0) for _ in range(3))
    first.charge(400)
    with pytest.raises(Busy, match=r"^tokens_per_minute: .*300.*600; retry after 10 s$"):
        second.charge(300)
    first.end(used=100)
    second.charge(300)
    with pytest.raises(RequestError, match="^tokens_per_minute: .*601.*600") as error:
        third.charge(601)
    assert error.value.code == "INVALID_ARG", "waiting does not help"


def test_what_ended_is_charged_nothing_any_more(keyring):
    secret, keys = keyring(tokens_per_minute=100)
    ended, next_one = (keys.holder(secret).enter("plain", None, lambda: 0.0) for _ in range(2))
    ended.end(used=0)
    ended.charge(100)
    next_one.charge(100)


@given(st.integers(1, 500), st.lists(st.tuples(st.floats(0, 90), st.integers(1, 500)), max_size=40))
def test_a_bucket_never_gives_more_than_a_minutes_worth_and_what_refills(per_minute, takes):
    clock = Clock()
    bucket, given_out, start = Bucket(per_minute, clock), 0, clock.now
    for passed, amount in takes:
        clock.now += passed
        wait = bucket.wait(amount)
        if not wait:
            bucket.take(amount)
            given_out += amount
        elif wait < float("inf"):
            clock.now += wait + 1e-6
            assert bucket.wait(amount) == 0, "it is there when it said so"
        assert given_out <= per_minute + (clock.now - start) * per_minute / 60 + 1e-6


# The file changes.


def test_a_change_of_the_file_is_seen_within_a_second_and_keeps_the_books(keyring, clock, tmp_path):
    path = tmp_path / "keys.json"
    secret, keys = keyring(max_inflight=1)
    keys.holder(secret).enter("plain", None, lambda: 0.0)
    other = key_file.add(path, "bob")
    assert refusal(keys, other).code == "UNAUTHENTICATED"
    clock.now += 1.1
    assert keys.holder(other).name == "bob"
    assert refusal(keys, secret).code == "UNAVAILABLE", "its request is still in flight"
    key_file.remove(path, "alice")
    clock.now += 1.1
    assert refusal(keys, secret).code == "UNAUTHENTICATED"


@pytest.mark.parametrize("harm", ["truncate", "mode", "remove"])
def test_a_file_that_goes_bad_leaves_the_keys_as_they_were(keyring, clock, tmp_path, harm):
    path = tmp_path / "keys.json"
    secret, keys = keyring()
    {"truncate": lambda: os.truncate(path, 9), "mode": lambda: path.chmod(0o644), "remove": path.unlink}[harm]()
    for _ in range(2):
        clock.now += 1.1
        assert keys.holder(secret).name == "alice"
    path.unlink(missing_ok=True)
    other = key_file.add(path, "bob")
    clock.now += 1.1
    assert keys.holder(other).name == "bob"
    assert refusal(keys, secret).code == "UNAUTHENTICATED"


# At the router.


def test_the_router_answers_with_a_key_and_refuses_without(serve, keyring):
    meter, (secret, keys) = Kept(), keyring(tasks=["plain"])
    service: Service = serve(keys=keys, meter=meter)
    assert service.ask(TEXT, more={"api_key": secret}).whole.text
    assert service.ask(TEXT).error.code == "UNAUTHENTICATED"
    assert service.ask(TEXT, "lora", more={"api_key": secret}).error.code == "PERMISSION_DENIED"
    assert service.ask(TEXT, more={"api_key": secret, "handover": Handover([1, 2], [b""])}).error.code == "PERMISSION_DENIED"
    assert meter.values("sun_request_refused_total", reason="UNAUTHENTICATED") == [1]
    assert meter.values("sun_key_requests_total", key="alice", outcome="length") == [1]
    assert len(meter.values("sun_key_requests_total", key="alice", outcome="PERMISSION_DENIED")) == 2, "the wrong task and the ticket"


def test_a_keys_limits_hold_while_its_requests_run_and_are_free_after_any_end(serve, keyring):
    secret, keys = keyring(max_inflight=2, tokens_per_minute=900)
    service: Service = serve(keys=keys)
    more = {"api_key": secret}
    gate = service.gate()
    running, cancelled = service.ask(TEXT, more=more, **OPEN_ENDED), service.ask(TEXT, more=more, **OPEN_ENDED)
    gate.wait_entered(1)
    busy = service.ask(TEXT, more=more).error
    assert busy.code == "UNAVAILABLE" and str(busy).startswith("max_inflight: this key")
    cancelled.gone = True
    assert cancelled.error.code == "CANCELLED"
    assert "tokens_per_minute" not in str(service.ask(TEXT, more=more, max_tokens=400, deadline_s=0.2).error), "the cancelled one's came back"
    over = service.ask(TEXT, more=more, max_tokens=480).error
    assert isinstance(over, Busy) and str(over).startswith("tokens_per_minute: ")
    gate.open()
    assert len(running.whole.token_ids) == 400
    service.idle()
