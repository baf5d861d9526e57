"""Ways a tuning run ends early: Ctrl-C at the end of the step and no more memory, which can be resumed, a loss that is no number, and a held-out loss that no longer falls."""

from __future__ import annotations

import math
import signal
import threading

import torch
import torch.distributed
from transformers import EarlyStoppingCallback, TrainerCallback


class Interrupt(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint at the end of the step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Take the signals over; in another thread than the main one Python does not allow it."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if this process or, with several devices, another one was asked to: they save and stop together or not at all."""
        self.stopped = self.asked
        if torch.distributed.is_initialized():
            # Not into self.asked: a signal that comes while the others are waited for would be forgotten.
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(asked)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


DIVERGED = "training has diverged: take a lower --lr, or a longer --warmup"


class Finite(TrainerCallback):
    """Ends a run whose loss is no longer a number: the weights are not, either, and would be kept and served."""

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        """Raises RuntimeError; checkpoints stay as they are."""
        for name, title in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise RuntimeError(f"step {state.global_step}: the {title} is {logs[name]}; {DIVERGED}")


class Patience(EarlyStoppingCallback):
    """Ends the run after so many looks in a row without a lower held-out loss; a resumed run counts on from its checkpoint's count.

    transformers takes a callback's state over only with a flag that takes over the checkpoint's wish to save, stop or evaluate too.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Count on, if this is a resumed run."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


class OptimizerGuard(TrainerCallback):
    """Knows whether weights are whole: not while the optimiser changes them."""

    def __init__(self) -> None:
        self.whole = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """From here on weights and optimiser state may differ by part of a step."""
        self.whole = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """A whole step is done and counted."""
        self.whole = True


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the CPU's allocator."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
