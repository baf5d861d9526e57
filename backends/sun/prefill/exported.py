"""What an exported prefill module says about itself: `export.json` beside the ONNX file or TensorRT plan."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sun.model.manifest import BaseManifest, TaskManifest
from sun.readable import readable_json

EXPORT_FILE = "export.json"
ONNX_FILE, PLAN_FILE = "model.onnx", "model.plan"
INPUT, OUTPUT, STATES = "input_ids", "kv", "states"
"""The graph's tensors: token ids [batch, length] int64, padded on the right; K and V [batch, layers, 2, kv_heads, length, head_dim]
float32, keys after RoPE; of a task of whole prompts also the tokens' states after the last layer [batch, length, hidden] float32.
Attention is causal, so padding changes nothing of what stands before it; what comes of padding means nothing."""


def outputs(states: bool) -> tuple[str, ...]:
    """The graph's outputs, in their order."""
    return (OUTPUT, STATES) if states else (OUTPUT,)


def kv_model(task: str) -> str:
    """The name of a task's exported module as a Triton model."""
    return f"kv_{task}"


def checkpoint_of(base_dir: str | Path, task_dir: str | Path, task: TaskManifest) -> Path:
    """The folder of the checkpoint that a task's module is made of: its own if its weights are full ones, else the base's."""
    return Path(task_dir if task.weights == "full" else base_dir)


class Parity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far an export is from the float32 torch module. runtime: what ran it. max_error, largest: of |difference| and of |value|, of the output that is further off."""

    runtime: str
    tokens: int
    max_error: float
    largest: float


class ExportManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One export. Base, task and weights digest are the task's own when it was exported, so that a stale one is found out.

    format: "onnx" or "tensorrt". dtype: of linear layers and attention. lora: "merged", "separate" or "none". max_batch, max_tokens:
    the largest batch and the longest prompt (0: no limit of its own). states: whether it gives `STATES`. parity: None if nothing here could run it.
    versions: of what made it.
    """

    format: str
    task: str
    base_digest: str
    weights_digest: str
    dtype: str
    lora: str
    opset: int
    max_batch: int
    max_tokens: int = 0
    states: bool = False
    parity: Parity | None = None
    versions: dict[str, str] = {}

    @classmethod
    def load(cls, folder: str | Path) -> ExportManifest:
        """Read ``export.json``; FileNotFoundError says how to make one."""
        path = Path(folder) / EXPORT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no exported prefill module at {folder}: make one with `sun export`")
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def save(self, folder: Path) -> None:
        """Write ``export.json``."""
        (folder / EXPORT_FILE).write_bytes(readable_json(self))

    def check(self, base: BaseManifest, task: TaskManifest, format: str | None = None) -> None:
        """Raise ValueError naming the field by which this is not an export of ``task`` as it is now, in ``format``."""
        expected = {"format": format or self.format, "task": task.name, "base_digest": base.digest, "weights_digest": task.weights_digest,
                    "states": task.whole_prompt}
        for field, value in expected.items():
            got = getattr(self, field)
            if got != value:
                raise ValueError(f"{EXPORT_FILE} {field}: is {got!r}, here it must be {value!r}: export it again with `sun export`")
