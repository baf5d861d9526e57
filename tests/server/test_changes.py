"""Tasks come, change and go while the server serves, through the command line; nobody without its key can do that."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from sun_build.config_file import set_parameter
from sun_client.control import HEADER, Control
from sun_client.errors import SunError
from sun_client.metrics import read, total
from sun_client.shm import REGION, SHM, session_files
from tests.server.conftest import GREEDY, REPO, sun, wait_until

PROMPT = "find big files"
TASKS, WEIGHTS = REPO / "build" / "tasks", "adapter_model.safetensors"


def words(root: Path, weights: Path) -> list[str]:
    """The command that adds the task `guest` with these weights."""
    return ["task", "add", "guest", "--weights", str(weights), "--root", str(root)]


def test_a_task_is_added_updated_and_removed_and_other_streams_go_on(server, client, root):
    expected = {task: client.generate(task, PROMPT, sampling=GREEDY).token_ids for task in ("bash", "math")}
    other = client.stream("banking", PROMPT, sampling={"max_tokens": 1500, "ignore_eos": True})
    next(other)
    added = subprocess.run([sys.executable, "-m", "sun_client.cli", *words(root, TASKS / "bash")], check=True, capture_output=True, text=True)
    assert f"The server on port {server.ports.http} serves it now." in added.stdout
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids == expected["bash"]
    assert requests.post(f"http://127.0.0.1:{server.ports.http}/v2/models/guest/generate", json={"text_input": PROMPT, "max_tokens": 4}).status_code == 200
    begun = client.stream("guest", PROMPT, sampling=GREEDY)
    first = next(begun).token_ids
    sun(*words(root, TASKS / "math"))
    assert [*first, *(token for piece in begun for token in piece.token_ids)] == expected["bash"], "it had begun with the old weights"
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids == expected["math"]
    assert sun("task", "remove", "guest", "--root", str(root)).endswith("guest: removed.\n")
    with pytest.raises(SunError, match="task: 'guest' is not known"):
        client.generate("guest", PROMPT)
    assert wait_until(lambda: math.isnan(total(read(f"127.0.0.1:{server.ports.metrics}"), "sun_prefill_up", task="guest"))), "else it would look dead"
    assert next(other).token_ids
    other.close()


def test_whoever_asks_while_a_task_is_updated_gets_the_old_or_the_new_weights_answer(client, root):
    sun(*words(root, TASKS / "bash"))
    old, new = (client.generate(task, PROMPT, sampling=GREEDY).token_ids for task in ("bash", "math"))
    answers: list[list[int]] = []
    updated = threading.Event()

    def ask_on() -> None:
        while not updated.is_set():
            answers.append(client.generate("guest", PROMPT, sampling=GREEDY).token_ids)

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask_on) for _ in range(3)]
        try:
            assert wait_until(lambda: bool(answers))
            sun(*words(root, TASKS / "math"))
            assert wait_until(lambda: answers[-1] == new)
        finally:
            updated.set()
        for one in asking:
            one.result()
    assert old in answers and [answer for answer in answers if answer not in (old, new)] == []
    sun("task", "remove", "guest", "--root", str(root))


def test_what_does_not_fit_leaves_the_old_task_serving(client, root, tmp_path):
    sun(*words(root, TASKS / "bash"))
    expected = client.generate("guest", PROMPT, sampling=GREEDY).token_ids
    broken = tmp_path / "math"
    shutil.copytree(TASKS / "math", broken)
    os.truncate(broken / WEIGHTS, (broken / WEIGHTS).stat().st_size - 100)
    with pytest.raises(ValueError, match="weights_digest"):
        sun(*words(root, broken))
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids == expected
    sun("task", "remove", "guest", "--root", str(root))


def test_what_only_the_server_finds_unfit_leaves_the_old_task_on_disk_and_serving(server, client, root):
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for name in ("prefill_guest", "guest") for path in (root / "model_repository" / name).rglob("*") if path.is_file()}

    sun(*words(root, TASKS / "bash"))
    expected = client.generate("guest", PROMPT, sampling=GREEDY).token_ids
    config = root / "model_repository" / "prefill_guest" / "config.pbtxt"
    good = config.read_text()
    set_parameter(config, "cores", "many")  # which `sun task add` keeps, and only the load reads
    before = files()
    refused = subprocess.run([sys.executable, "-m", "sun_client.cli", *words(root, TASKS / "math")], capture_output=True, text=True)
    assert refused.returncode == 1 and "cores" in refused.stderr and "guest is as it was before" in refused.stderr, refused.stderr
    assert files() == before and [path for path in root.iterdir() if path.name.startswith(".task-")] == []
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids == expected
    config.write_text(good)
    sun(*words(root, TASKS / "math"))
    url = f"http://127.0.0.1:{server.ports.http}/v2/models/guest/generate"
    assert requests.post(url, json={"text_input": PROMPT, "max_tokens": 4}).status_code == 200
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids != expected
    sun("task", "remove", "guest", "--root", str(root))


@pytest.mark.parametrize("path", ["repository/models/bash/unload", "repository/index", "logging", "trace/setting", "systemsharedmemory/status"])
def test_without_the_key_there_is_no_control_over_http(server, path):
    url = f"http://127.0.0.1:{server.ports.http}/v2/{path}"
    call = requests.post if "repository" in path else requests.get
    assert call(url, json={}).status_code == call(url, json={}, headers={HEADER: "guess"}).status_code == 403


def test_without_the_key_nobody_has_the_router_take_no_more(http):
    told = requests.post(f"{http}/sun/generate", json={"text_input": "", "leave": "guess"})
    assert told.status_code == 400 and "leave: key: is not this server's" in told.json()["error"]
    assert requests.post(f"{http}/sun/generate", json={"task": "bash", "text_input": PROMPT, "max_tokens": 2}).status_code == 200


def test_without_the_key_there_is_no_control_over_grpc(server):
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}") as client:
        for call in (lambda: client.unload_model("bash"), client.get_model_repository_index, client.get_log_settings,
                     client.get_trace_settings, client.get_system_shared_memory_status):
            with pytest.raises(InferenceServerException, match="expecting header"):
                call()


def test_the_key_is_its_users_alone(server, root):
    (control,) = [control for control in Control.running(root) if control.pid == server.pid]
    (path,) = [path for path in (root / ".run").glob("control*.json") if str(control.http_port) in path.name]
    assert path.stat().st_mode & 0o777 == 0o600 and control == server.control


def test_tritons_regions_are_their_users_alone_also_those_of_a_task_that_came_later(server, client, root):
    before = session_files(server.pid)
    sun(*words(root, TASKS / "bash"))
    assert client.generate("guest", PROMPT, sampling=GREEDY).token_ids
    regions = {name for name in session_files(server.pid) if REGION.fullmatch(name)}
    assert regions - before and {(SHM / name).stat().st_mode & 0o777 for name in regions} == {0o600}
    sun("task", "remove", "guest", "--root", str(root))
