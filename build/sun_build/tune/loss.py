"""The two-module loss: the prompt through the task's prefill module, the response through the frozen decode module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sun_build.tune.data import Example


def collate(batch: list[Example]) -> dict[str, Tensor]:
    """Pad a batch for the handoff: prompts x1..x(n-1) on the left, decode inputs xn, y1..y(m-1) on the right.

    Returns int64 tensors: prefill_ids, prefill_mask, prefill_positions [B, P]; decode_ids, decode_positions [B, R];
    mask [B, P + R] (1 where a token may be attended to); labels [B, R] (-100 where there is no loss).
    """
    width = max(1, max(len(e.prompt) - 1 for e in batch))
    length = max(len(e.response) for e in batch)
    rows: dict[str, list[list[int]]] = {name: [] for name in (
        "prefill_ids", "prefill_mask", "prefill_positions", "decode_ids", "decode_positions", "mask", "labels")}
    for e in batch:
        n, m = len(e.prompt) - 1, len(e.response)
        left, right = width - n, length - m
        rows["prefill_ids"].append([0] * left + e.prompt[:-1])
        rows["prefill_mask"].append([0] * left + [1] * n)
        rows["prefill_positions"].append([0] * left + list(range(n)))
        rows["decode_ids"].append([e.prompt[-1], *e.response[:-1]] + [0] * right)
        rows["decode_positions"].append(list(range(n, n + m)) + [0] * right)
        rows["mask"].append([0] * left + [1] * (n + m) + [0] * right)
        rows["labels"].append(e.response + [-100] * right)
    return {name: torch.tensor(values) for name, values in rows.items()}


def handoff_loss(prefill: nn.Module, decode: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the response tokens, exactly at serving's boundary (SUN, arXiv 2603.02599).

    prefill, decode: transformers causal-LM *backbones and head* as `AutoModelForCausalLM` gives them; gradients reach
    the prefill module through its K and V alone, so the decode module's parameters should be frozen by the caller.
    """
    cache = prefill.get_decoder()(
        input_ids=batch["prefill_ids"], attention_mask=batch["prefill_mask"],
        position_ids=batch["prefill_positions"], use_cache=True,
    ).past_key_values
    logits = decode(
        input_ids=batch["decode_ids"], attention_mask=batch["mask"], position_ids=batch["decode_positions"],
        past_key_values=cache, use_cache=True,
    ).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100)
