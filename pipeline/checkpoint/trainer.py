"""trl's ``SFTTrainer`` with checkpoints of ours: transformers' own way writes and reads pickles."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from torch import nn
from trl import SFTTrainer

from pipeline.adapter.adalora import RankAllocation
from pipeline.checkpoint.files import checkpoint_folder, problem_of
from pipeline.checkpoint.training_state import (
    Progress,
    restore_random,
    restore_training_state,
    restore_weights,
    save_training_state,
)
from pipeline.distributed import take_back_first_step, unlink_shared_buffers, zero_stage
from pipeline.errors import UserError
from pipeline.observation.observer import log_checkpoint
from pipeline.recipe import Recipe
from pipeline.supervision.bad_steps import StepGuard


class ResumableTrainer(SFTTrainer):
    """The places where transformers' loop saves and restores; the class that trains sets the attributes.

    Attributes:
        recipe: the experiment.
        identity: of the experiment, from :func:`pipeline.checkpoint.identity.identity_of`.
        guard: no checkpoint becomes the best among bad steps.
        sequential: mask instances run one after the other.
        allocation: of AdaLoRA's ranks.
    """

    recipe: Recipe
    identity: dict[str, Any]
    guard: StepGuard
    sequential: bool
    allocation: RankAllocation | None

    @property
    def adapted(self) -> PeftModel:
        """The model with its adapter, without what accelerate or DeepSpeed wraps around it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(model, PeftModel)
        return model

    def progress(self) -> Progress:
        """Where the run stands."""
        return Progress(
            step=self.state.global_step,
            tokens=int(self._total_train_tokens),
            ranks=self.accelerator.num_processes,
            micro_batch=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            execution="sequential" if self.sequential else "batched",
            zero=zero_stage(self.recipe),
        )

    @property
    def inner_optimizer(self) -> Any:
        """DeepSpeed's optimizer, or torch's, without accelerate's wrapper."""
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer

    def restore_tokens(self, tokens: int) -> None:
        """Go on counting from there."""
        self._total_train_tokens = tokens

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        began = time.perf_counter()
        written = save_training_state(self, Path(self._folder), self.identity)
        log_checkpoint(written, time.perf_counter() - began)
        best = checkpoint_folder(Path(self._folder), self.state.best_global_step or 0)
        self.state.best_model_checkpoint = str(best) if best.exists() else None

    @property
    def _folder(self) -> str:
        assert self.args.output_dir is not None
        return self.args.output_dir

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: :meth:`_prepare_for_training` restores, when the optimizer is there."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            self.accelerator.wait_for_everyone()
            unlink_shared_buffers()
            take_back_first_step(self.inner_optimizer)
        if resume_from_checkpoint is not None:
            self.args.eval_on_start = False  # it was measured when the run began
            restore_training_state(self, Path(resume_from_checkpoint))
            best = checkpoint_folder(Path(self._folder), self.state.best_global_step or 0)
            self.state.best_model_checkpoint = str(best) if best.exists() else None
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(Path(checkpoint))

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        """transformers', but for a run that was resumed after its last step, which it would train one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(model, epoch, *args, **kwargs)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        problem = problem_of(best)
        if problem is not None:
            raise UserError(
                f"training.load_best_model_at_end: {best} is damaged: {problem}.\n"
                "The same command with training.load_best_model_at_end=false writes the weights of the last step."
            )
        restore_weights(self.adapted, best)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """transformers', whose answer orders a checkpoint where ``save_strategy`` is best; a signal's order stands."""
        ordered = self.control.should_save
        best = super()._determine_best_metric(*args, **kwargs)
        return (best or ordered) and not self.guard.streak

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', but for its deletion of all checkpoints except the best one where ``save_total_limit`` is 1.

        A run that a signal stopped goes on from the newest, which is not the best; and ours are deleted otherwise.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
