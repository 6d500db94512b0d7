"""trl's ``SFTTrainer`` with LoRA Dropout's objective in its training step and an exact validation loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from pipeline.adapter.adalora import RankAllocation, orthogonality_loss
from pipeline.adapter.config import lora_config
from pipeline.adapter.dropout import recipe_dropout
from pipeline.checkpoint.timing import SaveAfterEvaluation
from pipeline.checkpoint.trainer import ResumableTrainer
from pipeline.data.packing import RowCollator, check_apart, copied_batch, laid_out
from pipeline.distributed import register_adapter_weights
from pipeline.lora_dropout import example_coordinates, instance_coordinates
from pipeline.observation.step_norms import StepNorms
from pipeline.observation.throughput import Throughput
from pipeline.preflight.numbers import Execution, flat
from pipeline.recipe import Recipe
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.callback import StoppedMeasuring

PURPOSE = "train"


class LoraDropoutTrainer(ResumableTrainer):
    """Supervised fine-tuning with LoRA Dropout.

    Without masks every line that runs in training is trl's, but for packing. Otherwise ``training_step`` runs
    trl's own step inside the mask context, on a batch of copies (or several times), so that forward, recomputation
    and backward see the same masks.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        arguments: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        evaluation: dict[str, Dataset] | None,
        callbacks: list[TrainerCallback],
        execution: Execution | None = None,
        throughput: Throughput | None = None,
        identity: dict[str, Any] | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        """Put the adapter on the base and get ready.

        Args:
            recipe: the experiment.
            model: frozen base, from :func:`pipeline.base.load_base`.
            arguments: from :func:`pipeline.arguments.sft_config`.
            tokenizer: with a pad token.
            train: columns ``input_ids``, ``labels``, ``row``; laid out already, or not.
            evaluation: datasets with the same columns, by name, whose loss is measured with masks off.
            callbacks: besides the trainer's own.
            execution: how instances run; None, as the recipe says, and ``auto`` is batched.
            throughput: what measures speed; None: one that knows no FLOPs.
            identity: of the experiment, for its checkpoints: :func:`pipeline.checkpoint.identity.identity_of`.
            guard: what sees bad steps; None, a new one, which nobody asks.

        Raises:
            UserError: an adapted layer that cannot be masked; a rate for a module without an adapter; examples that are
                to share a row and would see each other (not checked under ZeRO-3, whose shards cannot run yet).
        """
        if flat(recipe) and not is_deepspeed_zero3_enabled():
            check_apart(model)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=RowCollator(
                tokenizer.pad_token_id,
                arguments.pad_to_multiple_of,  # type: ignore[arg-type]  # "auto" is resolved
            ),
            train_dataset=laid_out(train, recipe),
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=lora_config(recipe.adapter),
            callbacks=callbacks,
        )
        self.recipe = recipe
        self.identity = identity or {}
        self.settings = recipe.adapter.dropout
        self.copies = self.settings.instances
        self.sequential = (execution or self.settings.execution) == "sequential"
        self.dropout = recipe_dropout(self.adapted, recipe)
        self.allocation: RankAllocation | None = None
        if recipe.adapter.method == "adalora":
            self.allocation = RankAllocation(self.adapted, self.accelerator, recipe.adapter.adalora)
            self.add_callback(self.allocation)
        self.guard = guard or StepGuard(recipe.supervision)
        self.norms = StepNorms()
        self.add_callback(self.norms)
        self.add_callback(SaveAfterEvaluation())
        self.throughput = throughput or Throughput()
        self.add_callback(self.throughput)
        self._order = torch.Generator()
        self._micro_batch = 0
        self._evaluated: list[torch.Tensor] = []
        if self.is_deepspeed_enabled:
            register_adapter_weights(self.adapted)
        else:
            _keep_float32_masters(self.adapted)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """torch's, before DeepSpeed takes it; bad steps are seen from it."""
        known = self.optimizer
        optimizer = super().create_optimizer(model)
        if optimizer is not known:
            self.guard.watch(optimizer)
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = sorted({*(self._signature_columns or []), "row"})  # type: ignore[assignment]  # theirs is untyped

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """transformers', with the time that its batches take to come."""
        batches = self.throughput.fetched(epoch_iterator, self._total_train_tokens)
        return super().get_batch_samples(batches, num_batches, device)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch: equation 7.

        Args:
            model: as wrapped for training.
            inputs: of :class:`RowCollator`.
            num_items_in_batch: trained tokens of the whole optimizer step, over all ranks.

        Returns:
            The micro-batch's share of the step's loss, detached.
        """
        loss = self._step_under_masks(model, inputs, num_items_in_batch)
        if self.allocation is not None and self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self.allocation.observe()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """trl's loss, and AdaLoRA's orthogonality term, whose weighted value is logged as ``orthogonality``.

        The term does not depend on data: it goes into the pass that ends an optimizer step, the last copy of the last
        micro-batch, and into no other. There every rank adds it, and averaging over ranks leaves it as it is.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.guard.loss(loss)
        if self.allocation is None or not self.accelerator.sync_gradients:
            return loss
        term = self.allocation.config.orth_reg_weight * orthogonality_loss(self.adapted)
        self._metrics["train"]["orthogonality"].append(term.item())
        return loss + term

    def _step_under_masks(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """:meth:`training_step` without AdaLoRA."""
        rows, lengths = inputs.pop("row"), inputs.pop("lengths", None)
        self.guard.rows(rows)
        if self.dropout is None:
            return super().training_step(model, inputs, num_items_in_batch)
        items = None if num_items_in_batch is None else num_items_in_batch * self.copies
        coordinates = self._coordinates(rows)
        counted = self._total_train_tokens
        if self.sequential:
            loss = self._one_after_another(model, inputs, coordinates, lengths, items)
        else:
            copied = copied_batch(inputs, self.copies)
            with self._masks(copied, coordinates, lengths):
                loss = super().training_step(model, copied, items)
        # trl counts every pass, and of a padded batch every copy; a token is one token of the data
        repeats = self.copies if self.sequential or lengths is None else 1
        self._total_train_tokens = counted + (self._total_train_tokens - counted) // repeats
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        self._micro_batch = 0 if self.accelerator.sync_gradients else self._micro_batch + 1
        return loss

    def _coordinates(self, rows: list[int]) -> list[tuple[int, ...]]:
        """Coordinates of this micro-batch's masks, copy-major."""
        if self.settings.sampling == "example":
            return example_coordinates(int(self.state.epoch or 0), rows, self.copies)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return instance_coordinates(self.state.global_step, self._micro_batch, rank, ranks, self.copies)

    def _masks(
        self, batch: dict[str, Any], coordinates: Sequence[tuple[int, ...]], lengths: list[int] | None
    ) -> AbstractContextManager[None]:
        """Context of one pass.

        Args:
            batch: as the model gets it.
            coordinates: of its masks, copy-major.
            lengths: tokens of each example in one copy, where several lie in a row.
        """
        assert self.dropout is not None
        each = None  # instance masks are for whole rows
        if lengths is not None and self.settings.sampling == "example":
            each = lengths * (len(coordinates) // len(lengths))
        return self.dropout.masks(
            PURPOSE,
            coordinates,
            rows=batch["input_ids"].shape[0],
            lengths=each,
            balanced=self.copies if self.settings.balanced else None,
            # the benchmark counts steps on without an end
            progress=min(self.state.global_step / max(self.state.max_steps - 1, 1), 1.0),
        )

    def _one_after_another(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        coordinates: list[tuple[int, ...]],
        lengths: list[int] | None,
        items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The copies in sequence: the loss and gradient of the batch of copies, with one copy's activations.

        Gradients are exchanged, and under DeepSpeed the optimizer steps, with the last copy only: accelerate's
        wrapper steps the engine inside ``backward`` whenever ``sync_gradients`` is set.
        """
        groups = len(coordinates) // self.copies
        state = self.accelerator.gradient_state
        synchronise = state.sync_gradients
        total = torch.zeros((), device=self.args.device)
        steps = self.current_gradient_accumulation_steps
        # trl divides by it what is a mean over a pass, not a sum over its tokens: the routers' loss of experts
        self.current_gradient_accumulation_steps = steps * self.copies
        for copy in range(self.copies):
            last = copy == self.copies - 1
            state._set_sync_gradients(synchronise and last)
            apart = nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model)
            with apart, self._masks(inputs, coordinates[copy * groups : (copy + 1) * groups], lengths):
                total += super().training_step(model, dict(inputs), items)
        self.current_gradient_accumulation_steps = steps
        return total

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """transformers'; one that draws from torch's own generator gets one that depends on seed and epoch alone."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self._order
        return sampler

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        self._order.manual_seed(self.args.seed + epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    # Measuring --------------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.norms.gradient(norm)
        self.guard.gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """trl's, with clip fraction, update norm and throughput of the steps that a training line covers."""
        if "loss" in logs:
            logs.update(self.norms.averages(self.args.max_grad_norm))
            logs.update(self.throughput.since_last(self._total_train_tokens))
            if self.guard.bad:
                logs["bad_steps"] = self.guard.bad
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one evaluation batch, masks off, kept per row so that the mean can be over tokens."""
        inputs = self._prepare_inputs(inputs)
        inputs.pop("row")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        losses = -outputs.log_probs.float().sum(dim=1)  # (B,) nats
        tokens = outputs.label_mask.sum(dim=1).to(losses.dtype)  # (B,)
        # gather_for_metrics drops the rows that pad the last batch of the last rank
        self._evaluated.append(self.accelerator.gather_for_metrics(torch.stack([losses, tokens], dim=1)).cpu())
        return losses.sum() / tokens.sum().clamp(min=1), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers', which a signal may cut off: then a checkpoint follows, and the run stops."""
        try:
            return super().evaluate(*args, **kwargs)
        except StoppedMeasuring:
            self.control.should_save = not self.guard.streak
            self.control.should_training_stop = True
            best = self.args.metric_for_best_model
            return {} if best is None else {f"eval_{best.removeprefix('eval_')}": math.nan}  # never the best

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """transformers' loop, its loss replaced by nats per trained token (its own is a mean of batch means).

        Beside it stands its standard error over rows.
        """
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        loss, stderr = loss_per_token(torch.cat(self._evaluated).double())
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_loss": loss} | ({} if stderr is None else {f"{prefix}_loss_stderr": stderr})
        return output._replace(metrics={**(output.metrics or {}), **metrics})


def loss_per_token(rows: torch.Tensor) -> tuple[float, float | None]:
    """Nats per token and its standard error, that of a ratio of sums over rows (delta method); None with one row.

    Args:
        rows: ``(rows, 2)`` float64: summed loss and number of trained tokens of each.
    """
    losses, tokens = rows.unbind(dim=1)
    loss = losses.sum() / tokens.sum()
    if len(rows) == 1:
        return float(loss), None
    residuals = losses - loss * tokens
    variance = len(rows) / (len(rows) - 1) * (residuals**2).sum()
    return float(loss), float(variance.sqrt() / tokens.sum())


def _keep_float32_masters(model: PeftModel) -> None:
    """Adapter weights in float32 where no DeepSpeed engine keeps masters of them.

    trl casts the adapter of a quantised base to bfloat16, in which an AdamW step is often smaller than the last
    bit and vanishes. Autocast still computes in the recipe's dtype.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
