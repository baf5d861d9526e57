"""Where training begins if not with the base: the weights of an earlier run, to go on with other data, a lower rate or another decode module."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn

from sun.model.loading import load_prefill
from sun.model.manifest import TASK_FILE, TaskManifest
from sun_build.contestants import staged
from sun_build.tasks import weights_kind
from sun_build.tune.settings import TuneSettings


def adapter_size(start: Path) -> tuple[int, float] | None:
    """(rank, alpha) of the LoRA adapter in ``start``; None for a whole checkpoint. ValueError if it holds neither."""
    if weights_kind(start) != "lora":
        return None
    config = LoraConfig.from_pretrained(start)
    return config.r, config.lora_alpha


def check_start(base_dir: Path, start: Path, settings: TuneSettings) -> None:
    """Raises ValueError if a run of ``settings`` cannot begin with the weights in ``start``, or they are not for the base."""
    size = adapter_size(start)
    with staged(base_dir, "start", start) as repository:
        load_prefill(base_dir, repository / "prefill_start" / "1")
    if settings.adapter != "lora":
        return
    if size is not None and (start / TASK_FILE).is_file() and TaskManifest.load(start).whole_prompt != settings.whole_prompt:
        raise ValueError(f"whole_prompt: got {settings.whole_prompt}, and the adapter in {start} to start from was trained the other way")
    if size is None and settings.method == "sun":
        raise ValueError(f"start: {start} holds a whole checkpoint, and an adapter is one of the base; start from an adapter, or take adapter none")
    for name, got in zip(("rank", "alpha"), size or (), strict=False):
        if getattr(settings, name) != got:
            raise ValueError(f"{name}: got {getattr(settings, name)}, and the adapter in {start} to start from has {got}")


def with_start(model: nn.Module, start: Path, settings: TuneSettings) -> nn.Module:
    """The base ``model`` with the adapter in ``start`` on it, ready to learn, or, for `adapter` none, merged into it."""
    if settings.adapter != "lora":
        return PeftModel.from_pretrained(model, start).merge_and_unload().requires_grad_(True)  # peft has frozen the base
    config = LoraConfig.from_pretrained(start)
    config.lora_dropout = settings.dropout
    return PeftModel.from_pretrained(model, start, is_trainable=True, config=config)
