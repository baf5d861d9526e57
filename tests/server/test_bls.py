"""The router's calls of other models, by the ten thousand: Triton's stub must outlive them."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from sun_client.server import Server
from tests.server.conftest import REPO, free_ports

CONFIG = """
backend: "python"
input [{ name: "message" data_type: TYPE_STRING dims: [-1] }]
output [{ name: "reply" data_type: TYPE_STRING dims: [-1] }]
"""
WORKER = '''
import numpy as np
import triton_python_backend_utils as pb_utils
from sun.messages import Ack, Load, encode

class TritonPythonModel:
    def execute(self, requests):
        reply = pb_utils.Tensor("reply", np.array([encode(Ack(load=Load(7, 1)))], dtype=np.object_))
        return [pb_utils.InferenceResponse([reply]) for _ in requests]
'''
CALLER = '''
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import triton_python_backend_utils as pb_utils
from sun_router.fleet import BlsFleet

class TritonPythonModel:
    def execute(self, requests):
        fleet = BlsFleet()
        with ThreadPoolExecutor(4) as pool:
            loads = list(pool.map(lambda i: fleet.abort("decode_0", [str(i)]).load.tokens, range(20000)))
        reply = pb_utils.Tensor("reply", np.array([str(sum(loads)).encode()], dtype=np.object_))
        return [pb_utils.InferenceResponse([reply]) for _ in requests]
'''


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """A server of a worker that only answers, and a model that calls it as the router does."""
    for name, code in (("decode_0", WORKER), ("caller", CALLER)):
        folder = tmp_path / "model_repository" / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(CONFIG)
        (folder / "1" / "model.py").write_text(code)
    (tmp_path / "backends").symlink_to(REPO / "backends")
    with Server(tmp_path, free_ports()) as server:
        yield server
    assert server.leftovers() == []


def test_twenty_thousand_calls_are_answered(server):
    url = f"http://127.0.0.1:{server.ports.http}/v2/models/caller/generate"
    assert requests.post(url, json={"message": "go"}, timeout=120).json()["reply"] == "140000"
