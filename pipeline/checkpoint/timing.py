"""When a checkpoint is written: after what was measured at its step, so that a run that goes on has it."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy


class SaveAfterEvaluation(TrainerCallback):
    """Where an epoch's end is measured, a checkpoint of its last step waits for that.

    transformers saves at the step and evaluates after the epoch. A run killed in between would go on with the next
    epoch, without the evaluation, and would not know it as its best.
    """

    def __init__(self) -> None:
        self._waits = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the order back."""
        assert state.epoch is not None
        ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if control.should_save and ends and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save, self._waits = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give it again; the evaluation comes first."""
        if self._waits:
            control.should_save, self._waits = True, False
