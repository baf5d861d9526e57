"""What the answers must be: plain transformers, a task's prefill model on x1..x(n-1), the base model on the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """Greedy decoding of one task in float32. adapter: peft's folder, None for the base's own weights."""

    def __init__(self, base_dir: Path, adapter: Path | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.decode = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        prefill = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        self.prefill = PeftModel.from_pretrained(prefill, adapter) if adapter else prefill

    def prompt(self, text: str) -> torch.Tensor:
        """Token ids [1, n] of a user message."""
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    @torch.inference_mode()
    def answer(self, text: str, max_tokens: int) -> tuple[list[int], list[float]]:
        """Token ids y1..ym, and how far each one's logit lies above the second best's."""
        ids = self.prompt(text)
        cache = self.prefill.get_decoder()(ids[:, :-1], use_cache=True).past_key_values
        token, tokens, gaps = ids[:, -1:], [], []
        while len(tokens) < max_tokens and (not tokens or tokens[-1] != self.tokenizer.eos_token_id):
            logits = self.decode(token, past_key_values=cache, use_cache=True).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            token = logits.argmax().view(1, 1)
            tokens.append(token.item())
            gaps.append(best - second)
        return tokens, gaps
