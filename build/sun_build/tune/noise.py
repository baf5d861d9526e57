"""Noise in the prompts of a training step, so that a prefill module learns the task and not its examples by heart."""

from __future__ import annotations

import torch
from torch import Tensor

from sun_build.tune.data import Example
from sun_build.tune.loss import common


class PromptNoise:
    """Replaces a share of the prompts' own tokens, at random, by others of the same batch (SwitchOut, arXiv 1808.07512; there by any of the vocabulary).

    What all prompts begin and end with (a chat template, a system prompt) is left as it is, wherever it stands.
    """

    def __init__(self, share: float, rows: list[Example]):
        prompts = [row.prompt for row in rows]
        first, last = common(prompts), common([prompt[::-1] for prompt in prompts])
        self.share, self.kept = share, torch.tensor(sorted({*first, *last}), dtype=torch.int64)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `collate` with other shared_ids [S] and prefill_ids [B, P]; drawn from torch's generator, whose state a checkpoint holds."""
        shared, width = len(batch["shared_ids"]), batch["prefill_ids"].shape[1]
        real = {"shared_ids": torch.ones_like(batch["shared_ids"], dtype=torch.bool), "prefill_ids": batch["mask"][:, shared : shared + width].bool()}
        text = {name: where & ~torch.isin(batch[name], self.kept.to(where.device)) for name, where in real.items()}
        pool = torch.cat([batch[name][where] for name, where in text.items()])
        if not len(pool):
            return batch
        return batch | {name: torch.where(where & (torch.rand(where.shape, device=where.device) < self.share),
                                          pool[torch.randint(len(pool), where.shape, device=where.device)], batch[name])
                        for name, where in text.items()}
