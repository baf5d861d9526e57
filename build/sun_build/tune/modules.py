"""The two modules of a tuning run, as one thing that a trainer can train, save and export."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sun.model.codes import Codes
from sun.model.loading import quantised_tensors
from sun.model.manifest import BaseManifest
from sun.model.quantise import FULL, codes_for
from sun_build.tasks import weights_kind
from sun_build.tune.checkpointing import checkpoint_layers
from sun_build.tune.loss import IGNORE, cross_entropy, distillation, handoff_logits
from sun_build.tune.settings import TuneSettings
from sun_build.tune.start import with_start


def target_modules(layers: int, everything: bool) -> str:
    """Regex of the linear layers to adapt: ``everything``, or those that reach the handed-over KV alone (in the last layer K and V)."""
    if everything:
        return r".*layers\.\d+\..*_proj"
    return rf".*layers\.(?!{layers - 1}\.)\d+\..*_proj|.*layers\.{layers - 1}\.self_attn\.[kv]_proj"


class TwoModules(nn.Module):
    """A prefill module that learns and a decode module: frozen (SUN), or the same model (ordinary fine-tuning).

    teacher: an ordinarily fine-tuned model to learn from, frozen; distill: its share of the loss while training.
    """

    def __init__(self, prefill: nn.Module, decode: nn.Module, teacher: nn.Module | None = None, distill: float = 0.0):
        super().__init__()
        self.prefill, self.decode, self.teacher, self.distill = prefill, decode, teacher, distill

    @classmethod
    def load(cls, base_dir: str | Path, settings: TuneSettings, teacher: str | Path | None = None, start: str | Path | None = None) -> TwoModules:
        """Both modules at the base's weights, the one that learns at those in ``start`` if given (see `check_start`); ``teacher`` is a checkpoint's folder.

        What learns is float32. Weights that do not learn are in memory once, and as `settings.precision` multiplies by them.
        """
        kind = None if start is None else weights_kind(Path(start))
        prefill = load_model(start if kind == "full" else base_dir)
        decode = None
        if settings.method == "sun":
            shared = settings.adapter == "lora" and settings.decode == FULL
            decode = twin(prefill) if shared else frozen(base_dir, settings.decode)
        if settings.checkpointing:
            checkpoint_layers(prefill)
        if settings.adapter == "lora":
            prefill.name_or_path = BaseManifest.load(base_dir).source  # what peft writes into the adapter: a name, not this machine's path
        if kind == "lora":
            prefill = with_start(prefill, Path(start), settings)
        elif settings.adapter == "lora":
            prefill = get_peft_model(prefill, LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, task_type="CAUSAL_LM",
                target_modules=target_modules(prefill.config.num_hidden_layers, settings.method == "full" or settings.whole_prompt)))
        if settings.whole_prompt:
            # What is handed over is before it, and the decode module's is put on that.
            norm = prefill.get_decoder().norm.requires_grad_(False)
            norm.load_state_dict(decode.get_decoder().norm.state_dict())
        modules = cls(prefill, decode or prefill, None if teacher is None else frozen(teacher, FULL), settings.distill)
        if settings.precision == "bf16" and decode is not None:  # an ordinary fine-tune's adapter is merged into its base in the end, in float32
            halve_frozen(modules)
        return modules

    def forward(self, num_items_in_batch: Tensor | int | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """The loss of a batch of `collate`: summed over its response tokens, over ``num_items_in_batch`` (those of a whole step) or their number."""
        logits, labels = handoff_logits(self.prefill, self.decode, batch), batch["labels"]
        loss = cross_entropy(logits, labels)
        if self.teacher is not None and self.training:
            with torch.no_grad():
                target = handoff_logits(self.teacher, self.teacher, batch)
            loss = (1 - self.distill) * loss + self.distill * distillation(logits, target, labels)
        return {"loss": loss / ((labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)}

    def learnt(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: str | Path) -> None:
        """Write what training changes to ``folder``, for `restore`."""
        save_file({name: p.detach().contiguous() for name, p in self.learnt().items()}, Path(folder) / "learnt.safetensors")

    @torch.no_grad()
    def restore(self, folder: str | Path) -> None:
        """Take over what `save` wrote."""
        saved = load_file(Path(folder) / "learnt.safetensors")
        for name, parameter in self.learnt().items():
            parameter.copy_(saved[name])

    def export(self, out: Path) -> None:
        """Write what `sun task add` takes: an adapter in peft's format (float16), or a whole checkpoint (float32).

        An ordinary fine-tune with LoRA is merged: it is a whole model's, not a prefill module's.
        """
        if hasattr(self.prefill, "peft_config") and self.decode is not self.prefill:
            self.prefill.save_pretrained(out)
            adapter = out / "adapter_model.safetensors"
            save_file({name: w.half().contiguous() for name, w in load_file(adapter).items()}, adapter, metadata={"format": "pt"})
            return
        model = self.prefill.merge_and_unload() if hasattr(self.prefill, "peft_config") else self.prefill
        model.save_pretrained(out, max_shard_size="1000GB")


def load_model(folder: str | Path) -> nn.Module:
    """A checkpoint as transformers' causal LM, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def twin(model: nn.Module) -> nn.Module:
    """Another module over the same weights, which no longer learn: layers put into either are not in the other."""
    model.requires_grad_(False)
    return deepcopy(model, {id(p): p for p in model.parameters()})


def halve_frozen(model: nn.Module) -> None:
    """Keep the weights of linear layers that do not learn in bfloat16, to which autocast would round them at each use; in place.

    A head that is tied to the embedding stays as it is: lookups are not rounded.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.bfloat16()


def frozen(folder: str | Path, scheme: str) -> nn.Module:
    """A checkpoint that does not learn, its linear layers as ``scheme`` has them: the very module that serving packs."""
    model = load_model(folder)
    if scheme != FULL:
        made = quantised_tensors(folder, BaseManifest.load(folder), model.state_dict(), scheme)
        model.lm_head.weight = nn.Parameter(made["lm_head.weight"])
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and (codes := codes_for(scheme, name, made.pop(f"{name}.columns", None))):
                round_inputs(layer, codes)
        model.load_state_dict(made)
    return model.requires_grad_(False)


def round_inputs(layer: nn.Linear, codes: Codes) -> None:
    """Give a layer its inputs as its codes stand for them, with the gradient of the inputs themselves (straight-through, arXiv 1308.3432)."""
    # As buffers, so that they go where the layer goes.
    layer.register_buffer("smooth", codes.smooth, persistent=False)
    layer.register_buffer("whole", codes.whole, persistent=False)
    layer.register_forward_pre_hook(partial(_rounded, codes))


def _rounded(codes: Codes, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    x, = inputs
    codes = replace(codes, smooth=layer.smooth, whole=layer.whole)
    return x + (codes.rounded(x.detach()) - x.detach())
