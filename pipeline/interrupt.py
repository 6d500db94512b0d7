"""Ctrl-C: stop at a step boundary, on every rank at the same one, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class InterruptCallback(TrainerCallback):
    """On the first SIGINT the run saves a checkpoint after the current step and stops; a second one ends it at once.

    Ranks receive the signal at different moments, so they agree on it at each step's end: a rank that stopped alone
    would leave the others waiting in a collective.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over SIGINT."""
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
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
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous)
