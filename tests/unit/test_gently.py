"""Loading at a low priority leaves its caller's priority, and its errors, as they are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sun.gently import NICE, gently


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_only_what_is_loaded_gives_way():
    before = priority()
    assert gently(priority) == min(before + NICE, 19)
    assert priority() == before


def test_what_goes_wrong_is_raised_to_who_asked():
    with pytest.raises(ValueError, match="no such task"):
        gently(lambda: (_ for _ in ()).throw(ValueError("no such task")))


def test_a_process_that_goes_gives_way_and_leaves_its_garbage_to_the_kernel():
    code = "import gc, os\nfrom sun.gently import go_gently\ngo_gently()\nprint(os.getpriority(os.PRIO_PROCESS, 0), gc.get_freeze_count() > 1000)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(min(priority() + NICE, 19)), "True"]
