"""Supervision's part in the training loop: progress, the agreed stop, and bad steps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.checkpoint.files import listed_checkpoints
from pipeline.observation.rank_log import LOG
from pipeline.process.rank import is_main
from pipeline.supervision.bad_steps import StepGuard, agreed_stop
from pipeline.supervision.supervisor import Supervisor

MEASURING_PATIENCE = 10.0
"""Seconds from a signal to the end of a validation that is still going on: a longer one would cost the checkpoint."""


class StoppedMeasuring(Exception):
    """A signal ends a validation, on all ranks after the same batch; its step's checkpoint is still to be saved."""


class SupervisionCallback(TrainerCallback):
    """The last callback of the trainer: it may take back what others have ordered.

    Ranks receive signals at different moments, so they agree at each step's end: a rank that stopped alone would leave
    the others waiting in a collective. transformers' own checkpointing at a signal has no such agreement.

    Attributes:
        stopped: whether a signal ended training.
    """

    def __init__(self, supervisor: Supervisor, guard: StepGuard) -> None:
        """Args: supervisor: of the run. guard: that the trainer feeds."""
        self.supervisor, self.guard = supervisor, guard
        self.stopped = False
        self._cut_off = False
        self._began = self._evaluation_began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training begins, or goes on."""
        self.supervisor.watch.newest = self._newest(args)
        self.supervisor.pulse.progress("training", state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first micro-batch."""
        self._began = time.monotonic()
        self.supervisor.pulse.progress("training")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A micro-batch."""
        self.supervisor.pulse.progress()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree; stop, warn, or end the run.

        Raises:
            UserError: too many bad steps in a row.
        """
        watch = self.supervisor.watch
        agreement = self.guard.close(state.global_step, args.device, watch.stop.status if watch.stop else None)
        watch.slowest_step = max(watch.slowest_step, time.monotonic() - self._began)
        self.supervisor.pulse.progress(step=state.global_step)
        if agreement.fault:
            self._warn(state.global_step, agreement.fault)
            if self.guard.too_many():
                raise self.guard.error(self.supervisor.ranks.folder, self._newest(args))
        if agreement.stop is not None:
            watch.agreed(agreement.stop)
            self.stopped = control.should_training_stop = control.should_save = True
        self._keep_last_good(control)
        if control.should_evaluate or control.should_save:
            self._evaluation_began = time.monotonic()
            self.supervisor.pulse.progress("measuring" if control.should_evaluate else "saving")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is ordered by the epoch's end; transformers calls it where a signal ended the epoch, too."""
        assert state.epoch is not None
        if self.stopped and state.epoch != int(state.epoch) and state.global_step < state.max_steps:
            # the uninterrupted run measures nothing here, and saves nothing more
            control.should_evaluate = control.should_save = control.should_log = False
        elif self.stopped and control.should_evaluate:
            control.should_save = True  # once more: the run that goes on measures this epoch's end no more
        self._keep_last_good(control)
        self._evaluation_began = time.monotonic()
        self.supervisor.pulse.progress()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of a measured set.

        Raises:
            StoppedMeasuring: some rank was signalled a while ago.
        """
        self.supervisor.pulse.progress("measuring")
        watch = self.supervisor.watch
        late = watch.stop is not None and time.monotonic() - watch.stop.at > MEASURING_PATIENCE
        agreed = agreed_stop(watch.stop.status if watch.stop is not None and late else None, args.device)
        if agreed is not None:
            watch.agreed(agreed)
            self.stopped = True
            if is_main() and not self._cut_off:  # validation and probe are cut off one after the other
                self._cut_off = True
                print(f"\nwarning: the validation at step {state.global_step} is cut off and not measured", flush=True)
            raise StoppedMeasuring

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A measured set is done."""
        watch = self.supervisor.watch
        watch.slowest_step = max(watch.slowest_step, time.monotonic() - self._evaluation_began)
        self._keep_last_good(control)
        self.supervisor.pulse.progress("saving" if control.should_save else "training")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint is whole."""
        self.supervisor.watch.newest = self._newest(args)
        self.supervisor.pulse.progress("training")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All steps are done, or as many as a signal let.

        Raises:
            UserError: the last steps have spoilt the weights.
        """
        self.supervisor.pulse.progress("saving")
        if self.guard.spoilt() and not self.stopped:
            raise self.guard.error(self.supervisor.ranks.folder, self._newest(args))
        if self.stopped:
            self.supervisor.watch.kept = f"at step {state.global_step}; {self._newest(args)}"

    def _keep_last_good(self, control: TrainerControl) -> None:
        """Write no checkpoint among bad steps: the newest one stays good."""
        if self.guard.streak:
            control.should_save = False

    def _warn(self, step: int, fault: str) -> None:
        LOG.warning("bad step", extra={"step": step, "fault": fault, "bad_steps": self.guard.bad})
        if is_main():
            left_out = "; its update is left out" if self.guard.settings.on_bad_step == "skip" else ""
            print(f"warning: step {step}: {fault}{left_out} ({self.guard.bad} bad steps so far)", flush=True)

    def _newest(self, args: TrainingArguments) -> str:
        """Where the run goes on, in words."""
        assert args.output_dir is not None
        checkpoints = listed_checkpoints(Path(args.output_dir))
        if not checkpoints:
            return "there is no checkpoint yet; the same command starts again"
        return f"the checkpoint in {checkpoints[0].folder} is kept; the same command goes on from it"
