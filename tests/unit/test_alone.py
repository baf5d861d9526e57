"""Work for all is done by one while the others wait, but not for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

from sun.alone import alone


def test_a_second_one_waits_until_the_first_is_done(tmp_path):
    order = []

    def second() -> None:
        with alone(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone(tmp_path):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_whoever_has_waited_long_enough_goes_in_all_the_same(tmp_path):
    with alone(tmp_path), alone(tmp_path, most_s=0.1):
        pass


def test_where_nothing_can_be_locked_nobody_waits(tmp_path, monkeypatch):
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(tmp_path), alone(tmp_path):
        pass
