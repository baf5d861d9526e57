"""Ways to compute a `Case`. All do the same work: rotary embedding, the new token's K and V into their place, attention."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numba
import numpy as np
import torch
import torch.nn.functional as F

from sun.decode import kernels
from sun_perf.attention.case import Case, Shape

Run = Callable[[int], np.ndarray]
"""Layer -> its output [batch, heads * head_dim], good until the next call."""
FLAGS = ("-O3", "-march=native", "-ffast-math")
SOURCE = Path(__file__).with_name("ragged.cpp")


class Way(Protocol):
    """title: for the table. version: of what computes."""

    title: str

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here; None if it can."""

    @property
    def version(self) -> str:
        """Of what computes it."""

    def prepare(self, case: Case) -> Run:
        """Get a case ready, as a step does once for all of its layers; the function returned computes one of them."""


class Numba:
    """What serves: `sun.decode.kernels.attention`."""

    title, missing, version = "numba (ours)", None, f"numba {numba.__version__}"

    def prepare(self, case: Case) -> Run:
        """See `Way.prepare`."""
        shape, none = case.shape, np.empty(0, np.float32)
        ones, bias = np.ones(case.batch, np.float32), np.zeros(shape.width, np.float32)
        out, columns = _out(case), np.ones(shape.heads * shape.head_dim, np.float32)

        def run(layer: int) -> np.ndarray:
            kernels.attention(
                0, case.batch, case.y, ones, bias, none, none, np.float32(0), case.cos, case.sin, case.starts, case.positions,
                case.kv[layer], columns, kernels.PLAIN, out, ones)
            return out

        return run


class Cpp:
    """The same in C++, compiled for this very machine."""

    title = "C++, g++ on the spot"

    @property
    def missing(self) -> str | None:
        """See `Way.missing`."""
        return None if shutil.which("g++") else "there is no g++"

    @property
    def version(self) -> str:
        """See `Way.version`."""
        return f"{subprocess.run(['g++', '--version'], capture_output=True, text=True, check=True).stdout.splitlines()[0]} {' '.join(FLAGS)}"

    def prepare(self, case: Case) -> Run:
        """See `Way.prepare`. Raises CalledProcessError if it does not compile."""
        compiled, shape, out = _compile(case.shape), case.shape, _out(case)

        def run(layer: int) -> np.ndarray:
            compiled.attention(
                *map(ctypes.c_int64, (case.batch, shape.kv_heads, case.kv.shape[3])), *map(_pointer, (
                    case.y, case.cos, case.sin, case.starts, case.positions, case.kv[layer], out)))
            return out

        return run


class OnnxRuntime:
    """ONNX Runtime's contrib operator GroupQueryAttention, K and V in place by IO binding."""

    title = "ONNX Runtime GQA"

    @property
    def missing(self) -> str | None:
        """See `Way.missing`."""
        gone = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        return f"not installed: {', '.join(gone)}" if gone else None

    @property
    def version(self) -> str:
        """See `Way.version`."""
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}"

    def prepare(self, case: Case) -> Run:
        """See `Way.prepare`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(_gqa_model(case.shape), options, providers=["CPUExecutionProvider"])
        value, out = onnxruntime.OrtValue.ortvalue_from_numpy, _out(case)  # on a CPU the array's own memory
        common = {
            "qkv": value(case.y[:, None]), "seqlens": value(case.positions.astype(np.int32)), "total": value(np.array(case.context, np.int32)),
            "cos": value(case.cos_table), "sin": value(case.sin_table)}
        bindings = []
        for keys, values in case.padded:
            binding = session.io_binding()
            for name, given in common.items():
                binding.bind_ortvalue_input(name, given)
            for name, given in (("key", value(keys)), ("value", value(values))):
                binding.bind_ortvalue_input(f"past_{name}", given)
                binding.bind_ortvalue_output(f"present_{name}", given)
            binding.bind_ortvalue_output("out", value(out[:, None]))
            bindings.append(binding)

        def run(layer: int) -> np.ndarray:
            session.run_with_iobinding(bindings[layer])
            return out

        return run


class Sdpa:
    """Plain torch: scaled_dot_product_attention on the padded batch, with a mask."""

    title, missing, version = "torch SDPA, padded", None, f"torch {torch.__version__}"

    def prepare(self, case: Case) -> Run:
        """See `Way.prepare`."""
        shape, y, kv, rows = case.shape, torch.from_numpy(case.y), torch.from_numpy(case.padded), torch.arange(case.batch)
        cos, sin, positions = (torch.from_numpy(part) for part in (case.cos[:, None], case.sin[:, None], case.positions))
        mask = (torch.arange(case.context) <= positions[:, None])[:, None, None]

        @torch.inference_mode()
        def run(layer: int) -> np.ndarray:
            parts = y.view(case.batch, -1, shape.head_dim)
            turned, values = parts.split([shape.heads + shape.kv_heads, shape.kv_heads], dim=1)
            low, high = turned.chunk(2, dim=-1)
            turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
            kv[layer, 0][rows, :, positions] = turned[:, shape.heads:]
            kv[layer, 1][rows, :, positions] = values
            return F.scaled_dot_product_attention(turned[:, :shape.heads, None], *kv[layer], attn_mask=mask, enable_gqa=True).flatten(1).numpy()

        return run


WAYS: tuple[Way, ...] = (Numba(), Cpp(), OnnxRuntime(), Sdpa())
"""Ours first."""


def _out(case: Case) -> np.ndarray:
    return np.empty((case.batch, case.shape.heads * case.shape.head_dim), np.float32)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@cache
def _compile(shape: Shape) -> ctypes.CDLL:
    """The C++ kernel of a shape; its file is gone again once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = Path(folder) / "ragged.o", Path(folder) / "ragged.so"
        sizes = (f"-DHEAD_DIM={shape.head_dim}", f"-DGROUP={shape.heads // shape.kv_heads}")
        subprocess.run(["g++", *FLAGS, *sizes, "-fPIC", "-c", "-o", compiled, SOURCE], check=True)
        # Linked without -ffast-math, which would switch off denormal numbers in the whole process, the other ways' too.
        subprocess.run(["g++", "-shared", "-o", library, compiled, "-lm"], check=True)
        return ctypes.CDLL(str(library))


def _gqa_model(shape: Shape) -> bytes:
    """A model of one GroupQueryAttention node that takes Q, K and V in one tensor and turns them itself."""
    from onnx import TensorProto, helper

    def tensor(name: str, *dims: str | int, kind: int = TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, dims)

    node = helper.make_node(
        "GroupQueryAttention", ["qkv", "", "", "past_key", "past_value", "seqlens", "total", "cos", "sin"], ["out", "present_key", "present_value"],
        domain="com.microsoft", num_heads=shape.heads, kv_num_heads=shape.kv_heads, do_rotary=1)
    kv = ("batch", shape.kv_heads, "context", shape.head_dim)
    graph = helper.make_graph(
        [node], "attention",
        [tensor("qkv", "batch", 1, shape.width), tensor("past_key", *kv), tensor("past_value", *kv), tensor("seqlens", "batch", kind=TensorProto.INT32),
         tensor("total", kind=TensorProto.INT32), tensor("cos", "most", shape.head_dim // 2), tensor("sin", "most", shape.head_dim // 2)],
        [tensor("out", "batch", 1, shape.heads * shape.head_dim), tensor("present_key", *kv), tensor("present_value", *kv)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
