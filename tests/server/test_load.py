"""Two hundred mixed requests: all are answered and nothing grows."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import psutil

from sun.handoff.shm import default_root
from sun_client.shm import REGION, session_files
from tests.server.conftest import SHIPPED, wait_until
from tests.server.prompts import PROMPTS

WARM_UP, REQUESTS, AT_ONCE = 64, 136, 16
RSS_GROWTH_MB = 64
"""Bound on all of the server's processes together, after a first round has filled allocators, Triton's pools and the prefix caches."""


def rss_mb(pid: int) -> float:
    """Memory that belongs to the server's processes alone, in MB: mapped weights and shared memory are not counted."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(p.memory_info().rss - p.memory_info().shared for p in processes) / 2**20


def shm_files(pid: int) -> set[str]:
    """The server's regions of Triton's in shared memory, and ours: other servers and tests, which may run beside this one, have others."""
    return {name for name in session_files(pid) if REGION.fullmatch(name)} | {str(path) for path in default_root().rglob("*") if path.is_file()}


def one(client, seed: int) -> None:
    """A request of random task, length and sampling; its answer must be whole."""
    rng = random.Random(seed)
    task = rng.choice([*SHIPPED, "identity"])
    text = " ".join(rng.choices(PROMPTS[rng.choice(SHIPPED)], k=rng.choice([1, 1, 1, 4])))
    sampling = {"max_tokens": rng.randint(1, 24), "ignore_eos": rng.random() < 0.3}
    sampling |= rng.choice([{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20, "seed": seed}, {"repetition_penalty": 1.2, "min_p": 0.05}])
    if rng.random() < 0.5:
        answer = client.generate(task, text, sampling=sampling)
        finish, tokens = answer.finish_reason, answer.token_ids
    else:
        pieces = list(client.stream(task, text, sampling=sampling))
        finish, tokens = pieces[-1].finish_reason, [t for piece in pieces for t in piece.token_ids]
    assert finish in ("stop", "length")
    assert len(tokens) == sampling["max_tokens"] if finish == "length" else 1 <= len(tokens) <= sampling["max_tokens"]


def test_two_hundred_mixed_requests_are_answered_and_nothing_grows(client, server, idle):
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda seed: one(client, seed), range(1000, 1000 + WARM_UP)))
        assert wait_until(idle)
        files, memory = shm_files(server.pid), rss_mb(server.pid)
        list(pool.map(lambda seed: one(client, seed), range(REQUESTS)))
    assert wait_until(idle)
    assert not shm_files(server.pid) - files
    assert rss_mb(server.pid) - memory < RSS_GROWTH_MB
