"""Prefill-only LoRA tuning of one task on its own data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from sun_build.tune.data import Example, batches
from sun_build.tune.loss import collate, handoff_loss


@dataclass(frozen=True)
class TuneSettings:
    """What a tuning run depends on besides base and data; written beside the adapter."""

    steps: int = 300
    batch: int = 16
    rank: int = 12
    alpha: int = 24
    lr: float = 2e-3
    warmup: float = 0.06
    clip: float = 1.0
    max_tokens: int = 512
    seed: int = 0


def target_modules(layers: int) -> str:
    """Regex of the linear layers that reach the handed-over KV: in the last layer only K and V do."""
    return rf".*layers\.(?!{layers - 1}\.)\d+\..*_proj|.*layers\.{layers - 1}\.self_attn\.[kv]_proj"


def tune(base_dir: str | Path, rows: list[Example], held_out: list[Example], out: str | Path, settings: TuneSettings,
         report: Callable[[int, float, float], None] = lambda step, loss, rate: None) -> dict:
    """Train a LoRA adapter for the prefill module and write it in peft's format (fp16 weights) to ``out``.

    report(step, loss, tokens per second) is called after every step. Returns what the task's card should say:
    the settings, the last losses and the held-out loss. The log of all steps goes to ``out/steps.jsonl``.
    """
    torch.manual_seed(settings.seed)
    decode = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).requires_grad_(False)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    prefill = get_peft_model(base, LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=target_modules(base.config.num_hidden_layers)))
    weights = [p for p in prefill.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(settings.warmup * settings.steps), settings.steps)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    stream = batches(rows, settings.batch, settings.seed)
    losses = []
    with (out / "steps.jsonl").open("w") as log:
        for step in range(1, settings.steps + 1):
            started = time.perf_counter()
            batch = collate(next(stream))
            loss = handoff_loss(prefill, decode, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            rate = int(batch["mask"].sum()) / (time.perf_counter() - started)
            log.write(json.dumps({"step": step, "loss": round(losses[-1], 4), "tokens_per_s": round(rate)}) + "\n")
            log.flush()
            report(step, losses[-1], rate)

    prefill.save_pretrained(out)
    adapter = out / "adapter_model.safetensors"
    save_file({name: w.half().contiguous() for name, w in load_file(adapter).items()}, adapter, metadata={"format": "pt"})
    with torch.no_grad():
        chunks = [held_out[i : i + settings.batch] for i in range(0, len(held_out), settings.batch)]
        held_out_loss = [handoff_loss(prefill, decode, collate(chunk)).item() for chunk in chunks]
    return {
        **asdict(settings), "examples": len(rows),
        "train_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "held_out_loss": round(sum(held_out_loss) / len(held_out_loss), 4) if held_out_loss else None,
    }
