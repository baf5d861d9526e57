"""An exported module as an entry of a Triton model repository: its folder and `config.pbtxt`."""

from __future__ import annotations

from sun.model.manifest import BaseManifest
from sun.prefill.exported import INPUT, ONNX_FILE, OUTPUT, PLAN_FILE, STATES, ExportManifest, kv_model

BACKENDS = {"onnx": ("onnxruntime", ONNX_FILE), "tensorrt": ("tensorrt", PLAN_FILE)}
"""Format -> Triton's backend and the file that it looks for in a version's folder."""

CONFIG = """\
# {name}: prompts' token ids, padded on the right -> their K and V, keys after RoPE; the KV of padding means nothing.
# Written by `sun export`. `prefill_{task}` calls it with `executor` "triton".
{platform}max_batch_size: {max_batch}
input [{{ name: "{input}" data_type: TYPE_INT64 dims: [-1] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [{layers}, 2, {kv_heads}, -1, {head_dim}] }}{states}]
instance_group [{{ {instance} }}]
"""


def config_text(manifest: ExportManifest, base: BaseManifest, profiles: int = 0, gpu: bool = True) -> str:
    """The `config.pbtxt` of an export.

    profiles: a plan's optimisation profiles; Triton takes for each request the one whose shapes are nearest. gpu: ONNX Runtime on the
    GPU or the CPU; a plan needs a GPU.
    """
    geometry, states = base.geometry, f', {{ name: "{STATES}" data_type: TYPE_FP32 dims: [-1, {base.hidden}] }}' if manifest.states else ""
    backend, _ = BACKENDS[manifest.format]
    platform = 'platform: "tensorrt_plan"\n' if manifest.format == "tensorrt" else f'backend: "{backend}"\n'
    instance = f"kind: {'KIND_GPU' if gpu else 'KIND_CPU'} count: 1"
    if profiles:
        instance += f" profile: [{', '.join(f'{chr(34)}{i}{chr(34)}' for i in range(profiles))}]"
    return CONFIG.format(
        name=kv_model(manifest.task), task=manifest.task, platform=platform, max_batch=manifest.max_batch, input=INPUT, output=OUTPUT,
        layers=geometry.layers, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim, states=states, instance=instance)
