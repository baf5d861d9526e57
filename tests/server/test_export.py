"""A task is served from its export as from torch: in its prefill model, and as a model of Triton's that prefill calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from sun.text.prompt import PromptSettings
from sun_build.config_file import set_parameter
from sun_build.base import build_base
from sun_build.export.entry import Export
from sun_build.tasks import add_task, describe_weights
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.server import Server
from tests.server.conftest import free_ports, make_root
from tests.unit import tiny

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

TASKS = ("torch", "onnx", "triton")
WHOLE = ("whole", "whole_triton")
"""Of whole prompts."""
STAND_IN = '''
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb_utils
from sun.prefill.onnx import session

class TritonPythonModel:
    def initialize(self, args):
        self.session = session(Path(args["model_repository"]) / args["model_version"] / "model.onnx", 1)[0]

    def execute(self, requests):
        answers = []
        for request in requests:
            ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
            if ids.shape[1] > 300:
                answers.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("too long", pb_utils.TritonError.INVALID_ARG)))
                continue
            made = zip(self.session.get_outputs(), self.session.run(None, {"input_ids": ids}), strict=True)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor(output.name, values) for output, values in made]))
        return answers
'''
"""What Triton's ONNX Runtime backend does, which the server of these tests does not have: the exported file, by the exported config."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three tasks of the same weights on a tiny base, one for each executor, and two of whole prompts."""
    folder = tmp_path_factory.mktemp("export")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "base", PromptSettings())
    root = make_root(folder / "root", folder / "base")
    models = root / "model_repository"
    adapter = tiny.adapter(folder / "adapter", folder / "base")
    for name in (*TASKS, *WHOLE):
        describe_weights(folder / "base", adapter, name, whole_prompt=name in WHOLE)
        add_task(models, folder / "base", name, adapter)
    shutil.rmtree(models / "decode_1")
    manifest, _ = (Export(models, folder / "base", name, merged=False, gpu=False).onnx(models) for name in ("triton", "whole_triton"))
    # The other has the same weights: a second export would give the same file.
    shutil.copytree(models / "kv_triton" / "1", models / "prefill_onnx" / "1", dirs_exist_ok=True)
    msgspec.structs.replace(manifest, task="onnx").save(models / "prefill_onnx" / "1")
    for name in ("onnx", "triton", "whole_triton"):
        set_parameter(models / f"prefill_{name}" / "config.pbtxt", "executor", name.removeprefix("whole_"))
    for kv in (models / "kv_triton", models / "kv_whole_triton"):
        config = kv / "config.pbtxt"
        config.write_text(config.read_text().replace('"onnxruntime"', '"python"'))
        (kv / "1" / "model.py").write_text(STAND_IN)
    return root


@pytest.fixture(scope="module")
def client(root):
    """A client of a server of that root."""
    with Server(root, free_ports()) as server, SunClient(f"127.0.0.1:{server.ports.grpc}") as client:
        yield client
    assert server.leftovers() == []


def test_greedy_texts_are_those_of_torch_whatever_runs_the_prefill(client):
    prompts = ["hello", "a much longer prompt " * 8, "x", "tell me more about it, please", "y" * 200]
    for tasks in (TASKS, WHOLE):
        wanted, *others = ([client.generate(task, prompt, sampling={"temperature": 0, "max_tokens": 12}).token_ids for prompt in prompts] for task in tasks)
        assert all(other == wanted for other in others)
        assert len(set(map(tuple, wanted))) == len(prompts)


def test_what_the_exported_model_refuses_reaches_the_client_as_its_error(client):
    with pytest.raises(SunError, match="kv_triton: .*too long"):
        client.generate("triton", "z" * 350)
    assert client.generate("triton", "hello", sampling={"temperature": 0, "max_tokens": 2}).token_ids
