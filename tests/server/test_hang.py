"""A prefill module that hangs, though its process runs, ends itself; its requests go on when it is loaded anew, and others notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_client.client import SunClient
from sun_client.server import Server
from tests.server.conftest import REPO, free_ports, make_root, wait_until
from tests.server.test_faults import Watched
from tests.unit import tiny

MODEL = '''
import sys
import threading
from pathlib import Path

sys.path.append({backends!r})
from sun_prefill.model import TritonPythonModel as Prefill

class TritonPythonModel(Prefill):
    """Its passes do not end while the file is there when they begin."""

    def initialize(self, args):
        super().initialize(args)
        run = self.engine.executor.run

        def stuck(chunks):
            if Path({hang!r}).exists():
                Path({hang!r} + ".begun").touch()
                threading.Event().wait()
            run(chunks)

        self.engine.executor.run = stuck
'''
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


class Stuck(Watched):
    """A watched server of a tiny base, whose task `stuck` hangs while the file ``hang`` is there."""

    def __init__(self, server: Server, hang: Path):
        super().__init__(server)
        self.hang = hang

    def answer(self, task: str) -> list[int]:
        """The tokens of an answer."""
        with SunClient(f"127.0.0.1:{self.server.ports.grpc}") as client:
            return client.generate(task, "tell me", sampling=GREEDY, timeout=120).token_ids


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    """It."""
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    root, hang = make_root(tmp_path / "root", tmp_path / "base", ("sun", "decode_0")), tmp_path / "hang"
    for task in ("plain", "stuck"):
        tiny.task(root / "model_repository", tmp_path / "base", task)
    folder = root / "model_repository" / "prefill_stuck"
    (folder / "1" / "model.py").write_text(MODEL.format(hang=str(hang), backends=str(REPO / "backends")))
    (folder / "config.pbtxt").write_text('backend: "python"\nparameters { key: "hang_s" value { string_value: "3" } }\n')
    (root / "model_repository" / "prefill_plain" / "config.pbtxt").write_text('backend: "sun_prefill"\n')
    with Server(root, free_ports()) as server:
        yield Stuck(server, hang)
        server.stop(drain_s=0)  # Triton waits for calls of the dead
    assert server.leftovers() == []


def test_a_prefill_that_hangs_ends_itself_and_its_requests_go_on_when_it_is_back(stuck):
    expected = {task: stuck.answer(task) for task in ("plain", "stuck")}
    stuck.hang.touch()
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(stuck.answer, "stuck") for _ in range(3)]
        assert wait_until(stuck.hang.with_name("hang.begun").exists)
        assert stuck.answer("plain") == expected["plain"]
        stuck.hang.unlink()
        stuck.healed("prefill_stuck")
        assert [answer.result() for answer in held] == [expected["stuck"]] * 3
    log = stuck.server.log.read_text()
    assert "Timeout" in log and "in stuck" in log
