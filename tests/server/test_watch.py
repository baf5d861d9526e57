"""What an operator sees: metrics by task and worker at Triton's own endpoint, `sun top`, and `sun doctor`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import requests

from sun_client.metrics import read, total
from tests.server.conftest import GREEDY, SHIPPED, sun, wait_until


def test_requests_are_counted_and_timed_by_task_and_steps_by_worker(server, client):
    url = f"127.0.0.1:{server.ports.metrics}"
    before = read(url)
    for _ in range(2):
        answer = client.generate("math", "What is 2 plus 2?", sampling={**GREEDY, "max_tokens": 12, "ignore_eos": True})

    def grown(name: str, **labels: str) -> float:
        now = read(url)
        return total(now, name, **labels) - total(before, name, **labels)

    assert wait_until(lambda: grown("sun_request_success_total", task="math", finished_reason="length") == 2)
    assert wait_until(lambda: grown("sun_time_per_output_token_seconds_count", task="math") == 2)
    assert wait_until(lambda: grown("sun_inter_token_latency_seconds_bucket", task="math", le="+Inf") == 22)
    assert grown("sun_inter_token_latency_seconds_count", task="math") == 22 and 0 < grown("sun_handoff_seconds_sum", task="math")
    assert grown("sun_request_prompt_tokens_sum", task="math") == 2 * answer.num_input_tokens
    assert grown("sun_request_generation_tokens_sum", task="math") == 24
    assert 0 < grown("sun_time_to_first_token_seconds_sum", task="math") < grown("sun_e2e_request_latency_seconds_sum", task="math")
    assert wait_until(lambda: grown("sun_decode_batch_size_sum") == 24), "one sequence in each step"
    assert grown("sun_handoff_bytes_total", task="math") > 0
    assert {worker: total(read(url), "sun_worker_up", worker=worker) for worker in client.workers()} == {"decode_0": 1, "decode_1": 1}
    assert wait_until(lambda: [total(read(url), "sun_prefill_up", task=task) for task in (*SHIPPED, "identity")] == [1, 1, 1, 1])


def test_a_refusal_is_counted_by_its_reason(server, http):
    url = f"127.0.0.1:{server.ports.metrics}"
    before = total(read(url), "sun_request_refused_total", reason="NOT_FOUND")
    requests.post(f"{http}/sun/generate", json={"text_input": "hi", "task": "poetry"})
    assert wait_until(lambda: total(read(url), "sun_request_refused_total", reason="NOT_FOUND") == before + 1)


def test_top_shows_workers_and_tasks(server, client):
    client.generate("bash", "find big files", sampling=GREEDY)
    text = sun("top", "--once", "--url", f"127.0.0.1:{server.ports.metrics}")
    assert all(word in text for word in ("decode_0", "decode_1", "bash", "TTFT", "refused:"))


def test_top_without_a_server_says_so():
    done = subprocess.run([sys.executable, "-m", "sun_client.cli", "top", "--once", "--url", "127.0.0.1:9"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("sun: no metrics at 127.0.0.1:9")


def test_top_at_the_wrong_port_says_so(server):
    done = subprocess.run([sys.executable, "-m", "sun_client.cli", "top", "--once", "--url", f"127.0.0.1:{server.ports.grpc}"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"sun: no metrics at 127.0.0.1:{server.ports.grpc}: what answers there is no HTTP server\n"


def test_the_doctor_finds_a_whole_installation_whole_and_names_what_is_broken(root, tmp_path):
    assert " error " not in sun("doctor", "--root", str(root))
    task = root / "model_repository" / "prefill_bash" / "1" / "adapter_model.safetensors"
    whole = task.read_bytes()
    try:
        task.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        text = sun("doctor", "--root", str(root), code=1)
    finally:
        task.write_bytes(whole)
    assert "task bash" in text and "its weights are not those that its manifest names" in text


def test_the_doctor_says_what_to_do_where_there_is_nothing(tmp_path: Path):
    (tmp_path / "model_repository").mkdir()
    done = subprocess.run([sys.executable, "-m", "sun_client.cli", "doctor", "--root", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "run `sun setup`" in done.stdout
