"""From folders to models: a task's prefill module and the shared decode module."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from sun.model.calibration import TEXT, input_ranges
from sun.model.llama import Llama
from sun.model.manifest import PREFILL_SCHEMES, BaseManifest, TaskManifest
from sun.model.quantise import CALIBRATED, FULL, check_scheme, quantise
from sun.model.weights import ADAPTER_FILES, INDEX_FILE, checkpoint_files, load_lora, map_checkpoint, weights_digest


def task_weight_files(task_dir: str | Path, kind: str) -> list[Path]:
    """The files whose bytes a task's weights digest covers; none for the identity task."""
    if kind == "identity":
        return []
    if kind == "lora":
        return [Path(task_dir) / name for name in ADAPTER_FILES]
    return checkpoint_files(task_dir)


def task_files(task_dir: str | Path, kind: str) -> list[Path]:
    """All files that a task's weights are read from: those of its digest, and what names them if they are shards."""
    index = Path(task_dir) / INDEX_FILE
    return task_weight_files(task_dir, kind) + ([index] if kind == "full" and index.is_file() else [])


def task_digest(task_dir: str | Path, kind: str) -> str:
    """Digest of a task's weights as the manifest and every ticket carry it."""
    return "identity" if kind == "identity" else weights_digest(task_weight_files(task_dir, kind))


def load_decode(base_dir: str | Path, scheme: str = FULL, own: str | Path | None = None) -> tuple[BaseManifest, Llama]:
    """The decode module: the base's weights, memory-mapped, or a quantised copy of them.

    own: a checkpoint to decode with in place of the base's, as conventional serving does for each task.
    Raises ValueError for an unknown scheme or a checkpoint of another geometry.
    """
    base, tensors = BaseManifest.load(base_dir), map_checkpoint(base_dir)
    if own is not None:
        tensors, shared = map_checkpoint(own), tensors
        check_same_shapes(tensors, shared)
    return base, Llama(base, quantised_tensors(base_dir, base, tensors, scheme), scheme=scheme)


def module_name(base: BaseManifest, scheme: str = FULL, own: str | Path | None = None) -> str:
    """What `load_decode` gives, by scheme and digest: two modules of one name decode to the same bits."""
    return f"{scheme} {base.digest if own is None else weights_digest(checkpoint_files(own))}"


def quantised_tensors(base_dir: str | Path, base: BaseManifest, tensors: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by ``scheme``, calibrated on `calibration.TEXT` if it needs that."""
    if check_scheme(scheme) not in CALIBRATED:
        return quantise(tensors, scheme)
    ids = Tokenizer.from_file(str(Path(base_dir) / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    return quantise(tensors, scheme, input_ranges(Llama(base, tensors), ids))


def load_prefill(base_dir: str | Path, task_dir: str | Path, scheme: str = FULL) -> tuple[TaskManifest, Llama]:
    """A task's prefill module, and its manifest as tickets are to carry it (see `TaskManifest.run_as`).

    scheme: one of `PREFILL_SCHEMES`; int8 gives the module weights of its own, its adapter merged into them, and no head.
    Raises ValueError naming the manifest's field if base, digest or kind do not fit, and for an unknown scheme.
    """
    if scheme not in PREFILL_SCHEMES:
        raise ValueError(f"prefill scheme: got {scheme!r}, expected one of {', '.join(PREFILL_SCHEMES)}")
    base, task = BaseManifest.load(base_dir), TaskManifest.load(task_dir)
    if task.base_digest != base.digest:
        raise ValueError(f"task.json base_digest: {task.name} was made for base {task.base_digest}, this base is {base.digest}")
    if task.prompt != base.prompt:
        raise ValueError(f"task.json prompt: {task.name} was tuned with {task.prompt}, this repository prompts with {base.prompt}")
    got = task_digest(task_dir, task.weights)
    if got != task.weights_digest:
        raise ValueError(f"task.json weights_digest: says {task.weights_digest}, the weights of {task.name} are {got}")
    tensors, lora = map_checkpoint(base_dir), load_lora(task_dir) if task.weights == "lora" else {}
    if task.weights == "full":
        own = map_checkpoint(task_dir)
        check_same_shapes(own, tensors)
        tensors = own
    module = Llama(base, tensors, lora)
    if scheme == FULL:
        return task, module
    made = quantised_tensors(base_dir, base, merged(tensors, lora), scheme)
    made["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # mapped, and shared: K and V do not depend on it
    return task.run_as(scheme), Llama(base, made, scheme=scheme)


def merged(tensors: dict[str, Tensor], lora: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A checkpoint's tensors with adapters (see `load_lora`) added to its weights, those in float32."""
    added = {f"model.{layer}.weight": up @ down for layer, (down, up) in lora.items()}
    return tensors | {name: tensors[name].float() + change for name, change in added.items()}


def check_same_shapes(own: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """Raise ValueError naming the first tensor of the decoder that is missing, of another shape, or not the base's.

    The head is left out: a prefill module has no use for it, and whether it is stored depends on tied embeddings.
    """
    for name in sorted((own.keys() | base.keys()) - {"lm_head.weight"}):
        got, needed = (list(tensors[name].shape) if name in tensors else "none" for tensors in (own, base))
        if got != needed:
            raise ValueError(f"checkpoint: tensor {name} has shape {got}, the base's has {needed}; prefill and decode must be of one geometry")
