"""Ctrl-C and SIGTERM: stop at a step boundary, on every rank at the same one, with a checkpoint."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)

REPEATED_SECONDS = 3.0
"""A second Ctrl-C within this time is a launcher passing on the first: torchrun does, after the terminal has."""


class InterruptCallback(TrainerCallback):
    """On the first signal the run saves a checkpoint after the current step and stops; a second Ctrl-C ends it at once.

    SIGTERM counts as a first signal: it is what the deepspeed launcher makes of a Ctrl-C, with 30 seconds of grace,
    and what schedulers send. Ranks receive signals at different moments, so they agree at each step's end: a rank that
    stopped alone would leave the others waiting in a collective.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._received: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the signals."""
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received > REPEATED_SECONDS:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree, and stop."""
        flag = torch.tensor([float(self.interrupted)], device=args.device)
        if PartialState().num_processes > 1:
            flag = reduce(flag, "sum")
        if flag.item() > 0:
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
