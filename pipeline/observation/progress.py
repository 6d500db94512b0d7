"""What a person sees while a run trains: a bar, one line of plain words per logging step, and a file of both."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from pipeline.errors import UserError

# Our words for what trl logs; what is not named here goes to TensorBoard only.
NAMES = {
    "loss": "loss",
    "orthogonality": "orthogonality",
    "eval_validation_loss": "validation_loss",
    "eval_validation_loss_stderr": "validation_loss_stderr",
    "eval_probe_loss": "probe_loss",
    "eval_probe_loss_stderr": "probe_loss_stderr",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "clip_fraction": "clip_fraction",
    "update_norm": "update_norm",
    "bad_steps": "bad_steps",
    "tokens_per_second": "tokens_per_second",
    "data_wait": "data_wait",
    "communication": "communication",
    "flops_per_second": "flops_per_second",
    "mfu": "mfu",
    "hfu": "hfu",
    "peak_memory_bytes": "peak_memory_bytes",
}

WORDS = {
    "loss": "loss {:.4f}",
    "orthogonality": "orthogonality term in it {:.3f}",
    "validation_loss": "validation loss {:.4f}",
    "probe_loss": "training probe {:.4f}",
    "generalization_gap": "generalisation gap {:+.4f}",
    "learning_rate": "learning rate {:.1e}",
    "gradient_norm": "gradient norm {:.2f}",
    "clip_fraction": "clipped {:.0%}",
    "update_norm": "update norm {:.2g}",
    "bad_steps": "{:.0f} bad steps",
    "tokens_per_second": "{:,.0f} tokens/s",
    "data_wait": "data wait {:.0%}",
    "communication": "communication {:.0%}",
    "tflops_per_second": "{:,.3g} TFLOP/s",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "peak memory {:.1f} GiB",
}
"""How a record is said, in this order."""

WORTH_A_WORD = 0.005
"""A smaller share of time spent waiting for data is not mentioned on the screen."""


def renamed(logs: dict[str, Any]) -> dict[str, float]:
    """What transformers logs, under our names; what has none is left out."""
    return {ours: float(logs[theirs]) for theirs, ours in NAMES.items() if theirs in logs}


def plain_words(record: dict[str, Any], steps: int) -> str:
    """One line for a person.

    step 40/200 · loss 1.234 · learning rate 1.9e-04 · gradient norm 0.81 · 5,210 tokens/s · peak memory 1.2 GiB
    """
    record = dict(record)
    if "peak_memory_bytes" in record:
        record["peak_memory_gib"] = record["peak_memory_bytes"] / 2**30
    if "flops_per_second" in record:
        record["tflops_per_second"] = record["flops_per_second"] / 1e12
    if record.get("data_wait", 0.0) < WORTH_A_WORD:
        record.pop("data_wait", None)
    parts = [words.format(record[name]) for name, words in WORDS.items() if name in record]
    return " · ".join([f"step {record['step']}/{steps}", *parts])


class PlainWordsCallback(ProgressCallback):
    """transformers' progress bar, its lines in plain words and kept in ``history.jsonl``.

    Validation and probe are logged as two evaluations; their line waits for the second, since the generalisation
    gap is their difference at one checkpoint.
    """

    def __init__(self, history: Path) -> None:
        """Args: history: the file to append to, one JSON object per line."""
        super().__init__()
        self.history = history
        self._evaluated: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, on a terminal; a log file's lines say enough."""
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step further."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """A batch of a measured set further."""
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing is left to show."""
        self.close()

    def close(self) -> None:
        """Leave the bars as they are, and the line after them to the next word, an error's, say."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say and keep what was logged."""
        if not state.is_world_process_zero or logs is None:
            return
        record = renamed(logs)
        if "loss" in record:
            self._speak(state, record)
        elif record:
            self._evaluated.update(record)
            if {"validation_loss", "probe_loss"} <= self._evaluated.keys():
                evaluated, self._evaluated = self._evaluated, {}
                evaluated["generalization_gap"] = evaluated["validation_loss"] - evaluated["probe_loss"]
                self._speak(state, evaluated)

    def _speak(self, state: TrainerState, record: dict[str, Any]) -> None:
        record = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **record}
        try:
            with self.history.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.history} cannot be written: {error.strerror}.\n"
                "Make room, or give back the right to write there, and start the same command again: it goes on from "
                "the last checkpoint."
            ) from error
        tqdm.write(plain_words(record, state.max_steps))  # above the bar, where there is one
        sys.stdout.flush()
