"""Model level: a real trainer for each variant, all on one frozen base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pipeline.adapter.config import lora_config
from pipeline.arguments import sft_config
from pipeline.benchmark.measure import Interval, Mark, mark, stored_bytes
from pipeline.benchmark.variants import Variant
from pipeline.recipe import Recipe
from pipeline.trainer import LoraDropoutTrainer


class TimedTrainer(SFTTrainer):
    """trl's trainer, with marks around the loss."""

    losses: list[Interval]
    """Start and end of each ``compute_loss`` since it was last cleared."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """trl's."""
        start = mark(self.args.device)
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append((start, mark(self.args.device)))
        return loss


class TimedLoraDropoutTrainer(TimedTrainer, LoraDropoutTrainer):
    """Ours, with the same marks."""


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the same frozen tensors: trl patches a model's forward, so no two trainers share one.

    int8 layers cannot be copied so: bitsandbytes moves their weight into the layer's state at the first pass.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            shared[id(parameter.quant_state)] = parameter.quant_state
    return copy.deepcopy(model, shared)


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of the base: weights, buffers, quantisation constants."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            tensors += [value for value in parameter.quant_state.as_dict(packed=True).values()]
    return stored_bytes([tensor for tensor in tensors if isinstance(tensor, torch.Tensor)])


def synthetic_rows(rows: int, tokens: int, vocabulary: int, seed: int) -> Dataset:
    """Random tokens, every one of them trained; columns as :func:`pipeline.data.tokenise` gives them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "row": list(range(rows))})


class TrainingSubject:
    """One variant's training step, as ``Trainer.train`` takes it (transformers 5.23, ``_run_epoch``), one micro-batch.

    Accumulation repeats forward and backward only, so that any number of it follows from the phases.
    """

    def __init__(
        self,
        variant: Variant,
        recipe: Recipe,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        folder: Path,
    ) -> None:
        """Build the trainer.

        Args:
            variant: of the table.
            recipe: whose settings all variants share.
            base: frozen; not changed.
            tokenizer: with a pad token.
            rows: columns ``input_ids``, ``labels``, ``row``.
            folder: for what a trainer may write.
        """
        base = with_shared_weights(base)
        self.trainer = _trainer(variant, variant.applied(recipe), base, tokenizer, rows, folder)
        arguments = self.trainer.args
        if arguments.activation_checkpointing:
            base.activation_checkpointing_enable(
                activation_checkpointing_kwargs=arguments.activation_checkpointing_kwargs
            )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        assert self.trainer.lr_scheduler is not None
        self.schedule = self.trainer.lr_scheduler
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.callback_handler.on_train_begin(self.trainer.args, self.trainer.state, self.trainer.control)
        self._batches = self._endless_batches()
        self.tokens: list[int] = []
        """Tokens of each batch, padding not counted."""

    def run(self) -> Mapping[str, list[Interval]]:
        """One optimizer step."""
        trainer = self.trainer
        device = trainer.args.device
        [batch], items = trainer.get_batch_samples(self._batches, 1, device)
        self.tokens.append(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        )
        trainer.losses = []
        events, told = trainer.callback_handler, (trainer.args, trainer.state, trainer.control)
        start = mark(device)
        events.on_step_begin(*told)
        trainer.training_step(self.model, batch, items)
        passed = mark(device)
        trainer._get_grad_norm(self.model, trainer._clip_grad_norm(self.model))
        events.on_pre_optimizer_step(*told)
        self.optimizer.step()
        events.on_optimizer_step(*told)
        self.schedule.step()
        self.model.zero_grad()
        events.on_step_end(*told)
        end = mark(device)
        trainer.state.global_step += 1
        return {
            "forward": _forward(start, trainer.losses),
            "forward+backward": [(start, passed)],
            "step": [(start, end)],
        }

    def own_bytes(self) -> int:
        """Adapter and optimizer states between steps."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return stored_bytes(trained + states)

    def _endless_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.trainer.get_train_dataloader()


def _forward(start: Mark, losses: list[Interval]) -> list[Interval]:
    """What is not backward: up to the end of the first loss (masks are made before it), then the other losses."""
    return [(start, losses[0][1]), *losses[1:]]


def _trainer(
    variant: Variant,
    recipe: Recipe,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    folder: Path,
) -> TimedTrainer:
    arguments = _arguments(recipe, folder / variant.name)
    if not variant.stock:
        return TimedLoraDropoutTrainer(
            recipe=recipe,
            model=base,
            arguments=arguments,
            tokenizer=tokenizer,
            train=rows,
            evaluation=None,
            callbacks=[],
        )
    return TimedTrainer(
        model=base,
        args=arguments,
        train_dataset=rows.remove_columns("row"),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.adapter),
    )


def _arguments(recipe: Recipe, folder: Path) -> SFTConfig:
    """The recipe's, one micro-batch per step, without reporters and evaluation."""
    quiet = {
        "report_to": [],
        "eval_strategy": "no",
        "save_strategy": "no",
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    silent = recipe.model_copy(update={"training": {**recipe.training, **quiet}})
    return sft_config(silent, folder)
