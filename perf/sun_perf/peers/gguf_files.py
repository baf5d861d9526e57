"""What llama.cpp loads: the embedded base as GGUF at several precisions, with a task's adapter merged in or as a GGUF adapter."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from sun.model.weights import ADAPTER_FILES

PRECISIONS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
"""transformers' names of a layer's linears: those of GGUF."""


def write_model(source: Path, out: Path, precision: str, adapter: Path | None = None) -> Path:
    """``source`` (a GGUF of the Llama architecture) as ``precision``, with a peft LoRA adapter merged into its weights.

    The file that is there already is taken as it is. Norms stay float32. Raises ValueError naming what of precision or adapter is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if out.is_file():
        return out
    kind, file_type = PRECISIONS[precision]
    reader = gguf.GGUFReader(source)
    factors = _factors(adapter, *_heads(reader)) if adapter else {}
    writer, made = _writer(out)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            array = field.types[0] is gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in factors:
            a, b, scale = factors.pop(tensor.name)
            values = values + scale * (b @ a)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    if factors:
        raise ValueError(f"adapter: {adapter} has factors of {', '.join(sorted(factors))}, which {source.name} lacks")
    return _finish(writer, made, out)


def write_adapter(source: Path, out: Path, adapter: Path) -> Path:
    """A peft LoRA adapter as llama.cpp applies it while it runs, float32. ``source``: the base's GGUF. Raises ValueError as `write_model`."""
    if out.is_file():
        return out
    factors = _factors(adapter, *_heads(gguf.GGUFReader(source)))
    writer, made = _writer(out)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp divides by the rank, as peft does.
    writer.add_float32("adapter.lora.alpha", float(_config(adapter)["lora_alpha"]))
    for name, (a, b, _) in factors.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
    return _finish(writer, made, out)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Q's or K's output rows [heads * head_dim, n], from transformers' order to GGUF's.

    The former rotates a head's halves against each other, the latter neighbours.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _config(adapter: Path) -> dict:
    return json.loads((adapter / ADAPTER_FILES[0]).read_text())


def _factors(adapter: Path, heads: int, kv_heads: int) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """GGUF tensor name -> A [rank, in], B [out, rank] with GGUF's order of rows, and the factor of B @ A."""
    config, tensors = _config(adapter), load_file(adapter / ADAPTER_FILES[1])
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        b = tensors[name.replace(".lora_A.", ".lora_B.")].astype(np.float32)
        layer, _, linear = name.split(".layers.")[1].removesuffix(".lora_A.weight").partition(".")
        if linear not in NAMES:
            raise ValueError(f"adapter: {adapter} changes {linear}; known are {', '.join(NAMES)}")
        short = NAMES[linear]
        if short in ("attn_q", "attn_k"):
            b = permute(b, heads if short == "attn_q" else kv_heads)
        found[f"blk.{layer}.{short}.weight"] = (a.astype(np.float32), b, config["lora_alpha"] / config["r"])
    return found


def _heads(reader: gguf.GGUFReader) -> tuple[int, int]:
    return tuple(int(reader.fields[f"llama.attention.{name}"].contents()) for name in ("head_count", "head_count_kv"))


def _writer(out: Path) -> tuple[gguf.GGUFWriter, Path]:
    """A writer to a file beside ``out``, so that one is there whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_suffix(".part")
    return gguf.GGUFWriter(made, "llama"), made


def _finish(writer: gguf.GGUFWriter, made: Path, out: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made.rename(out)
