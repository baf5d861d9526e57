"""A server's models and their processes are told apart, living from dead, and others' processes are not counted."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

from sun.stubs import Holders, Stubs


def test_each_model_has_its_processes(start_stub):
    one, two, other = start_stub("decode_0"), start_stub("decode_0"), start_stub("prefill_bash")
    start_stub("decode_1", "other.py")
    start_stub("decode_1", instance="")  # completes a configuration
    assert Stubs(os.getpid()).models() == {"decode_0": {one.pid, two.pid}, "prefill_bash": {other.pid}}
    assert Stubs(os.getpid()).pids("decode_0") == {one.pid, two.pid} and Stubs(os.getpid()).pids("decode_1") == frozenset()


def test_a_killed_process_is_dead_though_nobody_has_waited_for_it(start_stub):
    stubs, process = Stubs(os.getpid()), start_stub("decode_0")
    pids = stubs.pids("decode_0")
    assert stubs.alive(pids) and stubs.killed(pids) == frozenset()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not stubs.alive(pids) and stubs.pids("decode_0") == frozenset() and stubs.killed(pids) == pids
    process.wait()
    assert stubs.killed(pids) == frozenset(), "whoever waits for it knows"


def test_a_stopped_process_is_told_from_others_and_killed_only_as_its_models(start_stub):
    stubs, one, other = Stubs(os.getpid()), start_stub("decode_0"), start_stub("decode_1")
    both = frozenset((one.pid, other.pid))
    one.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, one.pid, os.WSTOPPED)
    assert stubs.stopped(both) == {one.pid} and stubs.alive(both)
    Stubs(os.getppid()).kill("decode_0", both)
    assert stubs.alive(both), "another server's"
    stubs.kill("decode_0", both)
    assert one.wait() == -signal.SIGKILL and stubs.alive(frozenset((other.pid,))), "another model's"
    stubs.kill("decode_0", both)


def test_what_is_killed_is_dead_afterwards_however_long_that_takes(start_stub, monkeypatch):
    stubs, kill = Stubs(os.getpid()), os.kill
    start_stub("decode_0")
    pids = stubs.pids("decode_0")
    monkeypatch.setattr(os, "kill", lambda *of: threading.Timer(0.3, kill, of).start())
    stubs.kill("decode_0", pids)
    assert not stubs.alive(pids) and stubs.pids("decode_0") == frozenset()


def test_a_new_process_of_the_model_is_found_and_the_old_ones_callers_still_know_it_is_dead(start_stub):
    stubs, first = Stubs(os.getpid()), start_stub("decode_0")
    pids = stubs.pids("decode_0")
    first.kill()
    first.wait()
    second = start_stub("decode_0")
    assert stubs.pids("decode_0") == {second.pid} and not stubs.alive(pids)


def test_another_servers_models_are_not_its_own(start_stub):
    start_stub("decode_0")
    assert Stubs(os.getppid()).pids("decode_0") == frozenset()


def dead(process: subprocess.Popen) -> None:
    """Kill a process that nobody waits for yet."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def ended(process: subprocess.Popen) -> None:
    """End a process as its server does, which waits for it."""
    process.kill()
    process.wait()


def test_a_call_may_be_with_the_new_process_when_the_server_ends_the_old_one_and_is_lost_with_that(start_stub):
    stubs, old = Stubs(os.getpid()), start_stub("prefill_bash")
    before = Holders(stubs, "prefill_bash")
    new = start_stub("prefill_bash")
    assert not before.lost()
    meanwhile = Holders(stubs, "prefill_bash")
    ended(old)
    for holders in (before, meanwhile):
        assert not holders.lost(answered=True) and not holders.lost() and holders.pids == {new.pid}
    dead(new)
    assert before.lost() and meanwhile.lost(answered=True)


def test_a_call_is_lost_at_once_with_the_only_process_and_with_none_to_be_healed(start_stub):
    stubs, first = Stubs(os.getpid()), start_stub("prefill_bash")
    seen, unseen = (Holders(stubs, "prefill_bash") for _ in range(2))
    dead(first)
    assert seen.lost()
    first.wait()
    start_stub("prefill_bash")
    assert seen.lost() and unseen.lost(), "the new one never had it"


def test_a_call_may_have_been_with_the_killed_one_of_two(start_stub):
    one, two = start_stub("prefill_bash"), start_stub("prefill_bash")
    holders, other = (Holders(Stubs(os.getpid()), "prefill_bash") for _ in range(2))
    dead(one)
    assert other.lost(answered=True)
    assert not holders.lost() and holders.lost(), "once, it may be one that the server ends"
    assert two.poll() is None
