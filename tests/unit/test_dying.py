"""What `sun serve` starts ends with it, however it ends, and is else as if a shell had started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from sun.stubs import stat
from sun_client.server import dying_with_us

from .harness import eventually

PARENT = """
import subprocess, sys
from sun_client.server import dying_with_us
child = subprocess.Popen(dying_with_us(["/bin/sleep", "600"]), start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def lives(pid: int) -> bool:
    seen = stat(pid)
    return seen is not None and seen.lives


def test_it_is_told_to_stop_when_its_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        eventually(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])
        assert lives(pid)
        parent.kill()
    eventually(lambda: not lives(pid))


def test_it_does_not_start_if_its_parent_is_gone_already(tmp_path):
    command = dying_with_us(["/bin/touch", str(tmp_path / "started")])
    command[command.index(str(os.getpid()))] = "1"
    assert subprocess.run(command).returncode == 1 and not (tmp_path / "started").exists()


def test_it_ignores_no_signal_that_its_parent_does_not():
    said = subprocess.run(dying_with_us(["/bin/cat", "/proc/self/status"]), capture_output=True, text=True, check=True).stdout
    ignored = int(next(line.split()[1] for line in said.splitlines() if line.startswith("SigIgn")), 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)
