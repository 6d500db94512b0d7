"""What a trainer does, told to ``status.json`` and to the rank's log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.observation.progress import renamed
from pipeline.observation.rank_log import LOG
from pipeline.observation.status import RunStatus
from pipeline.process.rank import is_main
from pipeline.run.provenance import versions


class RunObserver(TrainerCallback):
    """Writes the status at every line of the log, evaluation and checkpoint; the heartbeat does in between."""

    def __init__(self, status: RunStatus) -> None:
        """Args: status: of the run."""
        self.status = status
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where the run stands, and how far it goes."""
        self._began, self._first_step = time.monotonic(), state.global_step
        now = self.status.now
        now.resumed_from = state.global_step or None
        now.last_checkpoint = now.last_checkpoint if state.global_step else None
        LOG.info("versions", extra=versions())
        LOG.info("training begins", extra={"step": state.global_step, "steps": state.max_steps})
        self._write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """For the next write, the heartbeat's or another."""
        self.status.now.step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A training line, or what was measured."""
        record = renamed(logs or {})
        if not record:
            return
        LOG.info("step" if "loss" in record else "measured", extra={"step": state.global_step, **record})
        self.status.now.loss = record.get("loss", self.status.now.loss)
        self.status.now.tokens_per_second = record.get("tokens_per_second", self.status.now.tokens_per_second)
        self._write(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One of the measured sets is done."""
        self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is whole."""
        assert args.output_dir is not None
        checkpoints = Path(args.output_dir).name
        self.status.now.last_checkpoint = f"{checkpoints}/checkpoint-{state.global_step}"
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All steps are done, or a signal stopped them."""
        LOG.info("training ends", extra={"step": state.global_step, "steps": state.max_steps})
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        now = self.status.now
        now.step, now.steps, now.epoch = state.global_step, state.max_steps, state.epoch
        done = state.global_step - self._first_step
        seconds = (time.monotonic() - self._began) / done if done else None
        now.seconds_left = (state.max_steps - state.global_step) * seconds if seconds is not None else None
        self.status.write()


def log_checkpoint(folder: Path, seconds: float) -> None:
    """Tell the rank's log of a checkpoint that is whole.

    Args:
        folder: of the checkpoint; other nodes may not see it.
        seconds: that training stood still for it.
    """
    size = sum(file.stat().st_size for file in folder.iterdir()) if is_main() else None
    LOG.info("checkpoint written", extra={"checkpoint": folder.name, "bytes": size, "seconds": round(seconds, 3)})
