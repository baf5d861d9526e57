"""Starting: what keeps a server from starting says so, and a plain tritonserver line is all it takes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sun_build.config_file import set_parameter
from sun_build.tasks import add_task
from sun_client import shm
from sun_client.client import SunClient
from sun_client.control import Control
from sun_client.errors import ServerError, SunError
from sun_client.server import Server, Tls, ready
from tests.server.conftest import REPO, free_ports, make_root, wait_until

TOKENS = 120


def refusal(root: Path) -> str:
    """The log of a server that does not start."""
    server = Server(root, free_ports())
    # Triton 24.10 was seen to die of signal 11 on its way out, having said why it does not start.
    with pytest.raises(ServerError, match="ended with code|was killed by signal 11"):
        server.start()
    assert server.leftovers() == []
    return server.log.read_text(errors="replace")


def only(root: Path, *models: str) -> Path:
    """The root with these models alone."""
    for folder in (root / "model_repository").iterdir():
        if folder.name not in models:
            shutil.rmtree(folder)
    return root


def test_a_certificate_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ServerError, match="^tls-cert: .*none.pem is no file"):
        Server(make_root(tmp_path / "root"), free_ports(), tls=Tls(tmp_path / "none.pem", tmp_path / "none.key")).start()


def test_numpy_2_in_the_serving_environment_is_refused_with_what_to_do(tmp_path):
    venv, root = tmp_path / "venv", only(make_root(tmp_path / "root"), "tokenize")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    # The environment of these tests, but for the version that numpy reports.
    # Not in a sitecustomize.py: Debian's Python has one of its own, which hides it.
    (packages / "inherit.pth").write_text(
        f"import site; site.addsitedir({str(next(Path(sys.prefix).glob('lib/python*/site-packages')))!r})\n"
        "import numpy; numpy.__version__ = '2.1.0'\n")
    with (root / "model_repository" / "tokenize" / "config.pbtxt").open("a") as config:
        config.write(f'parameters {{ key: "EXECUTION_ENV_PATH" value {{ string_value: "{venv}" }} }}\n')
    log = refusal(root)
    assert "numpy 2.1.0 silently corrupts tensors" in log
    assert 'pip install "numpy<2"' in log


def test_an_unknown_parameter_is_refused_by_name(tmp_path):
    root = only(make_root(tmp_path / "root"), "sun", "decode_0")
    config = root / "model_repository" / "sun" / "config.pbtxt"
    config.write_text(config.read_text().replace('"policy"', '"polcy"'))
    log = refusal(root)
    assert "polcy" in log
    assert "known are policy" in log


def test_a_task_tuned_for_another_base_is_refused_by_field(tmp_path):
    root = only(make_root(tmp_path / "root"), "sun", "decode_0")
    add_task(root / "model_repository", root / "build" / "base", "mine")
    manifest = root / "model_repository" / "prefill_mine" / "1" / "task.json"
    manifest.write_text(re.sub(r'"base_digest": "sha256:....', '"base_digest": "sha256:dead', manifest.read_text()))
    assert "task.json base_digest" in refusal(root)


def test_without_room_for_its_controls_file_the_server_serves_and_says_so(tmp_path, monkeypatch):
    def full(control, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Control, "write", full)
    with Server(only(make_root(tmp_path / "root"), "tokenize"), free_ports()) as server:
        (warning,) = server.warnings()
        assert server.running and "control" in warning and "could not be written" in warning
    assert server.leftovers() == []


def test_a_kv_pool_that_does_not_fit_keeps_the_server_from_starting_and_says_what_would(tmp_path):
    root = only(make_root(tmp_path / "root"), "decode_0")
    set_parameter(root / "model_repository" / "decode_0" / "config.pbtxt", "kv_tokens", str(10**9))
    assert re.search(r"kv_tokens: 1000000000 tokens of KV need \d+\.\d GiB, .* would fit", refusal(root))


def test_the_readmes_plain_tritonserver_line_serves_and_lets_streams_end(tmp_path):
    root, ports = only(make_root(tmp_path / "root"), "sun", "tokenize", "decode_0"), free_ports()
    add_task(root / "model_repository", root / "build" / "base", "mine")
    line = next(line for line in (REPO / "README.md").read_text().splitlines() if line.startswith("tritonserver "))
    flags = f"--http-port={ports.http} --grpc-port={ports.grpc} --metrics-port={ports.metrics}"
    command = f"PATH={Path(sys.prefix) / 'bin'}:$PATH exec {line} {flags}"
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(["bash", "-c", command], cwd=root, stdout=log, stderr=log, start_new_session=True)
    try:
        assert wait_until(lambda: ready("127.0.0.1", ports.http) or child.poll() is not None, seconds=180)
        assert child.poll() is None, (tmp_path / "log").read_text(errors="replace")[-2000:]
        with SunClient(f"127.0.0.1:{ports.grpc}") as client:
            pieces = client.stream("mine", "hello", sampling={"max_tokens": TOKENS, "ignore_eos": True})
            first = next(pieces)
            child.terminate()
            assert sum(len(piece.token_ids) for piece in [first, *pieces]) == TOKENS, "the server was told to stop meanwhile"
            with pytest.raises(SunError):
                client.generate("mine", "hello")
    finally:
        child.terminate()
        child.wait()
    assert shm.processes(child.pid) == []
