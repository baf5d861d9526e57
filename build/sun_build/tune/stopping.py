"""Ways a tuning run ends early and can be resumed: Ctrl-C at the end of the step, and no more memory."""

from __future__ import annotations

import signal
import threading

import torch
from transformers import TrainerCallback


class Interrupt(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint at the end of the step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
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
        """Save and stop if asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


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
