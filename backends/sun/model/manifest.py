"""What a base and a task say about themselves on disk: `sun_base.json` and `task.json`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sun.readable import readable_json
from sun.text.prompt import PromptSettings

PREFILL_SCHEMES = ("fp32", "int8")
"""Number formats that a prefill module can run in on the CPU."""
GPU_PREFILL_SCHEMES = ("fp32", "bf16")
"""And on a GPU."""
BASE_FILE = "sun_base.json"
TASK_FILE = "task.json"


class Rope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary position embedding: angle = position * inv_freq[i], cos and sin times ``scale`` (YaRN's attention factor)."""

    kind: str
    inv_freq: list[float]
    scale: float = 1.0


class Geometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything the KV cache's meaning depends on. Two modules may hand over KV only if these are equal."""

    layers: int
    kv_heads: int
    head_dim: int
    rope: Rope

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the K and V of ``tokens`` tokens over all layers."""
        return self.layers * 2 * self.kv_heads * tokens * self.head_dim * itemsize


class BaseManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base model as `sun base` laid it out: what the engine needs to know, and the digest of its weights."""

    source: str
    architecture: str
    digest: str
    geometry: Geometry
    hidden: int
    heads: int
    vocab: int
    norm_eps: float
    max_context: int
    eos_ids: list[int]
    prompt: PromptSettings

    def check_ids(self, field: str, ids: list[int]) -> None:
        """Raise ValueError naming the field and the limit unless all token ids are in the vocabulary."""
        if ids and not (0 <= min(ids) and max(ids) < self.vocab):
            raise ValueError(f"{field}: token ids must be 0 to {self.vocab - 1}")

    @classmethod
    def load(cls, base_dir: str | Path) -> BaseManifest:
        """Read ``sun_base.json``; raises FileNotFoundError with what to run if there is no base there."""
        path = Path(base_dir) / BASE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no base model at {base_dir}: make one with `sun base`")
        return msgspec.json.decode(path.read_bytes(), type=cls)


class TaskManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One task: the weights of its prefill module, the base they belong to, and what tuning knows about them.

    weights: "lora" (peft's files beside this one), "full" (a checkpoint beside this one) or "identity" (the base's own).
    weights_digest: "sha256:..." of the weights file; "identity" for the identity task.
    sampling: this task's defaults, overridden key by key by a request's.
    metric: what the task is scored by, and scores measured so far.
    whole_prompt: its prefill module runs xn, too, and the decode module chooses the first token from what that makes of it. It has to be trained so.
    """

    name: str
    weights: str
    weights_digest: str
    base_digest: str
    prompt: PromptSettings
    sampling: dict[str, float | int | bool] = {}
    metric: dict[str, str | float | int] = {}
    whole_prompt: bool = False

    @classmethod
    def load(cls, task_dir: str | Path) -> TaskManifest:
        """Read ``task.json`` of a task's version directory."""
        return msgspec.json.decode((Path(task_dir) / TASK_FILE).read_bytes(), type=cls)

    def prefilled(self, prompt: list[int]) -> list[int]:
        """Those of a prompt's tokens x1..xn that its prefill module runs."""
        return prompt if self.whole_prompt else prompt[:-1]

    def run_as(self, scheme: str) -> TaskManifest:
        """The manifest as the prefill module's tickets carry it if it runs in ``scheme``, one of `PREFILL_SCHEMES` or `GPU_PREFILL_SCHEMES`.

        Rounded weights make another KV than these: they have a digest of their own, "int8:sha256:...".
        """
        return self if scheme == "fp32" else msgspec.structs.replace(self, weights_digest=f"{scheme}:{self.weights_digest}")

    def made(self, digest: str) -> bool:
        """Whether a ticket with this digest is of these weights, in whichever format its prefill module ran them."""
        return any(digest == self.run_as(scheme).weights_digest for scheme in (*PREFILL_SCHEMES, *GPU_PREFILL_SCHEMES))


def write_manifest(directory: str | Path, manifest: BaseManifest | TaskManifest) -> None:
    """Write a manifest in its file of ``directory``, readable and stable under git."""
    name = BASE_FILE if isinstance(manifest, BaseManifest) else TASK_FILE
    (Path(directory) / name).write_bytes(readable_json(manifest))
