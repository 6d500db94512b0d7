"""AdaLoRA in training: importances from the gradients, ranks shared out, the orthogonality term.

Source: Zhang et al., *Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, arXiv 2303.10512; its equation
numbers below. ``dW = P Lambda Q``; peft names P ``lora_B`` ``(out, r)``, Lambda ``lora_E`` ``(r, 1)`` and Q ``lora_A``
``(r, in)``, and has the layers, the schedule and the file format. Nobody calls its allocator in transformers or trl,
and under DeepSpeed gradients are gone when callbacks fire; so this module does what
``AdaLoraModel.update_and_allocate`` is for, with four differences:

- Importance is taken at the weights that the gradient belongs to, as in the paper's algorithm 1, in float32, from
  gradients that are averaged over ranks and not clipped: one rule for plain python and every ZeRO stage.
- A budget is met exactly: of equal scores the first layers' are kept, where peft prunes all of them.
- Pruning reaches the float32 masters too, or the next step would bring the values back.
- ``rank_pattern`` is set when training ends. With it, peft cuts the weights of every checkpoint to the ranks of the
  moment, but a pruned direction may come back until the last allocation.

Under LoRA Dropout, the gradient is of the unmasked P, Lambda and Q, averaged over the step's masks, and the
orthogonality term is on the unmasked P and Q: it is there to make singular values comparable, those of the adapter that
is saved; masked columns are shorter by chance, and pulling them to unit length would stretch the unmasked ones.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.adapter.config import ADAPTER_NAME, freeze_rank_numbers
from pipeline.errors import UserError
from pipeline.process.rank import is_main
from pipeline.recipe import schema
from pipeline.run.tensor_file import write_tensors

STATE_FILE = "adalora.safetensors"
_KINDS = ("lora_A", "lora_E", "lora_B")


def adalora_layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    """The layers that hold P, Lambda and Q, by their name in the base model."""
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)}


def layer_weights(layer: AdaLoraLayer) -> dict[str, nn.Parameter]:
    """``lora_A`` ``(r, in)``, ``lora_E`` ``(r, 1)`` and ``lora_B`` ``(out, r)``."""
    return {kind: getattr(layer, kind).get_parameter(ADAPTER_NAME) for kind in _KINDS}


def orthogonality_loss(model: PeftModel) -> torch.Tensor:
    """Mean over all P and Q of ``||P^T P - I||_F`` and ``||Q Q^T - I||_F``: scalar, float32.

    Equation 4, but for the norm, which is not squared here, as in the authors' code and peft's.
    """
    norms = []
    for layer in adalora_layers(model).values():
        weights = layer_weights(layer)
        for rows in (weights["lora_A"], weights["lora_B"].T):
            with torch.autocast(rows.device.type, enabled=False):
                rows = rows.float()
                norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device)))
    return torch.stack(norms).mean()


def triplet_scores(importance: dict[str, torch.Tensor], uncertainty: dict[str, torch.Tensor]) -> torch.Tensor:
    """Score of each direction of one layer, equations 7 and 11: ``(r,)`` float32.

    Args:
        importance: of the entries of each kind of weight, smoothed, shaped like it.
        uncertainty: likewise.
    """
    score = {kind: importance[kind] * uncertainty[kind] for kind in _KINDS}
    return score["lora_E"][:, 0] + score["lora_A"].mean(dim=1) + score["lora_B"].mean(dim=0)


def kept_directions(scores: dict[str, torch.Tensor], budget: int) -> dict[str, torch.Tensor]:
    """The ``budget`` directions with the highest scores over all layers: ``(r,)`` bool for each layer."""
    flat = torch.cat(list(scores.values()))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:budget]] = True
    return dict(zip(scores, kept.split([len(score) for score in scores.values()]), strict=True))


class RankAllocation(TrainerCallback):
    """Shares AdaLoRA's ranks out while trl's trainer runs.

    The trainer calls :meth:`observe` between backward and the optimizer's step where no DeepSpeed engine steps itself,
    :meth:`restore` when it resumes, and adds the orthogonality term to its loss.
    """

    def __init__(self, model: PeftModel, accelerator: Accelerator, settings: schema.AdaLora) -> None:
        """Get ready; the schedule is known when training begins.

        Args:
            model: with the adapter on it.
            accelerator: the trainer's.
            settings: of the recipe.
        """
        assert isinstance(model.base_model, AdaLoraModel)
        freeze_rank_numbers(model)
        self.layers = adalora_layers(model)
        self.importance: dict[str, dict[str, torch.Tensor]] = {}
        """Equation 9, float32, shaped like each weight; by layer and kind. The same on every rank."""
        self.uncertainty: dict[str, dict[str, torch.Tensor]] = {}
        """Equation 10."""
        self.kept: dict[str, torch.Tensor] = {}
        """``(r,)`` bool for each layer: the last allocation."""
        self._tuner: AdaLoraModel = model.base_model
        self._accelerator = accelerator
        self._settings = settings
        self._step = 0  # of the optimizer, from 1: the one in progress
        self._masters: dict[str, torch.Tensor] = {}

    @property
    def config(self) -> AdaLoraConfig:
        """peft's."""
        config = self._tuner.peft_config[ADAPTER_NAME]
        assert isinstance(config, AdaLoraConfig)
        return config

    @property
    def last_allocation(self) -> int:
        """The step with which ranks are settled."""
        total = self.config.total_step
        assert total is not None
        return total - self.config.tfinal

    # When the trainer calls -------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The phases in steps, and DeepSpeed's gradients within reach.

        Raises:
            UserError: too few steps; an optimizer whose float32 weights cannot be reached.
        """
        self._set_phases(state.max_steps)
        config = self.config
        if is_main():
            print(
                f"AdaLoRA: rank {config.init_r} until step {config.tinit}, falling to {config.target_r} on average at "
                f"step {self.last_allocation} of {config.total_step}"
            )
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            wrapper = self._accelerator.deepspeed_engine_wrapped
            self._accelerator.deepspeed_engine_wrapped = _ObservedEngine(wrapper.engine, self)
            self._find_masters(kwargs["optimizer"].optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the step."""
        self._step = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimizer: allocate when it is time, and prune (equation 6)."""
        budget, due = self._tuner.rankallocator.budget_schedule(state.global_step)
        settled = state.global_step >= self.last_allocation
        if self.importance and ((due and not settled) or state.global_step == self.last_allocation):
            scores = self.scores()  # fp16 may have skipped every step so far, and left none
            # all are zero while Lambda is, as after a first step at learning rate 0: nothing to go by
            if settled or any(bool(score.any()) for score in scores.values()):
                self.kept = kept_directions(scores, budget)
        if self.kept and (due or settled):
            self._prune()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The ranks, by which peft cuts what it saves: directions whose singular value is exactly zero are left out."""
        self.config.rank_pattern = {
            f"{name}.lora_E.{ADAPTER_NAME}": (layer_weights(layer)["lora_E"].detach()[:, 0] != 0).tolist()
            for name, layer in self.layers.items()
        }

    # State ------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state to a checkpoint's folder."""
        tensors = {f"kept.{name}": kept for name, kept in self.kept.items()}
        for title, smoothed in (("importance", self.importance), ("uncertainty", self.uncertainty)):
            for name, kinds in smoothed.items():
                tensors |= {f"{title}.{name}.{kind}": value.contiguous() for kind, value in kinds.items()}
        write_tensors(folder / STATE_FILE, tensors)

    def restore(self, folder: Path) -> None:
        """Read it back.

        Raises:
            UserError: the checkpoint has none.
        """
        if not (folder / STATE_FILE).exists():
            raise UserError(
                f"{folder}: no {STATE_FILE}, without which the allocation of ranks cannot go on as it began.\n"
                "Resume from a checkpoint that was written with adapter.method adalora, or start anew."
            )
        tensors = load_file(str(folder / STATE_FILE), device=str(self._accelerator.device))
        self.kept = {name: tensors[f"kept.{name}"] for name in self.layers if f"kept.{name}" in tensors}
        for title, smoothed in (("importance", self.importance), ("uncertainty", self.uncertainty)):
            smoothed.clear()
            for name in self.layers:
                if f"{title}.{name}.lora_E" in tensors:
                    smoothed[name] = {kind: tensors[f"{title}.{name}.{kind}"] for kind in _KINDS}

    # Importance -------------------------------------------------------------------------------------------------------

    def observe(self) -> None:
        """Importance of every entry, equations 8 to 10: once per optimizer step, with its whole gradient, before it.

        A step with a gradient that is not finite leaves no trace: fp16's loss scaling skips it.
        """
        if self._step > self.last_allocation:
            return
        sensitivity = self._sensitivity()
        total = torch.stack([values.sum() for kinds in sensitivity.values() for values in kinds.values()]).sum()
        if not torch.isfinite(total):
            return
        beta1, beta2 = self._settings.beta1, self._settings.beta2
        for name, kinds in sensitivity.items():
            importance = self.importance.setdefault(name, {})
            uncertainty = self.uncertainty.setdefault(name, {})
            for kind, values in kinds.items():
                mean = importance.setdefault(kind, torch.zeros_like(values))
                mean.lerp_(values, 1 - beta1)
                spread = uncertainty.setdefault(kind, torch.zeros_like(values))
                spread.lerp_((values - mean).abs_(), 1 - beta2)

    def _sensitivity(self) -> dict[str, dict[str, torch.Tensor]]:
        """``|w * dL/dw|`` by layer and kind, float32."""
        scale = self._loss_scale()
        return {
            name: {
                kind: (weight.detach().float() * self._gradient(weight).float()).abs_() / scale
                for kind, weight in layer_weights(layer).items()
            }
            for name, layer in self.layers.items()
        }

    def _gradient(self, weight: nn.Parameter) -> torch.Tensor:
        """Of the whole step, averaged over ranks; under DeepSpeed by one all-reduce for each weight."""
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(weight)
        else:
            gradient = weight.grad
        assert gradient is not None
        return gradient

    def _loss_scale(self) -> float:
        """By which fp16 multiplied the gradients."""
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            engine = self._accelerator.deepspeed_engine_wrapped.engine
            return engine.optimizer.loss_scale if engine.fp16_enabled() else 1.0
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()

    # Allocation -------------------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, torch.Tensor]:
        """Of every direction of every layer: ``(r,)`` by layer."""
        return {name: triplet_scores(self.importance[name], self.uncertainty[name]) for name in self.layers}

    def _set_phases(self, steps: int) -> None:
        """``tinit``, ``tfinal`` and ``total_step``, in optimizer steps."""
        warm_up = max(1, math.floor(self._settings.warm_up * steps))
        final = math.floor(self._settings.final * steps)
        if warm_up >= steps - final:
            raise UserError(
                f"adapter.adalora: of {steps} training steps, warm_up {self._settings.warm_up} is {warm_up} and final "
                f"{self._settings.final} is {final}, which leaves no step in which ranks could fall.\n"
                "Train longer, or lower adapter.adalora.final."
            )
        self.config.tinit, self.config.tfinal, self.config.total_step = warm_up, final, steps

    def _find_masters(self, optimizer: Any) -> None:
        """The float32 Lambda of DeepSpeed's 16-bit optimizer without ZeRO; ZeRO's is found by ``safe_*``.

        Args:
            optimizer: DeepSpeed's, or torch's own in float32.
        """
        from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
        from deepspeed.utils import safe_get_full_fp32_param

        values = {name: layer_weights(layer)["lora_E"] for name, layer in self.layers.items()}
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            names = {id(value): name for name, value in values.items()}
            for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
                for master, parameter in zip(masters, parameters, strict=True):
                    if id(parameter) in names:
                        self._masters[names[id(parameter)]] = master
        for name, value in values.items():
            own_master = value.dtype == torch.float32 or name in self._masters
            if not own_master and safe_get_full_fp32_param(value) is None:
                raise UserError(
                    f"training.optim: DeepSpeed's {type(optimizer).__name__} keeps its float32 weights where AdaLoRA "
                    "cannot prune them.\nUse adamw_torch, or distributed.zero 1 or 2."
                )

    @torch.no_grad()
    def _prune(self) -> None:
        """Singular values that are not kept become zero: in the model, and where the optimizer keeps its own."""
        for name, layer in self.layers.items():
            values = layer_weights(layer)["lora_E"]
            dropped = ~self.kept[name][:, None]
            values.masked_fill_(dropped, 0.0)
            if name in self._masters:
                self._masters[name].data.masked_fill_(dropped, 0.0)
            elif self._accelerator.distributed_type == DistributedType.DEEPSPEED:
                from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

                master = safe_get_full_fp32_param(values)
                if master is not None:
                    safe_set_full_fp32_param(values, master.masked_fill(dropped, 0.0))


class _ObservedEngine(DeepSpeedEngineWrapper):
    """accelerate's wrapper, whose ``backward`` also steps the engine, with a look at the gradients in between.

    DeepSpeed gives whole gradients only there. Delete when accelerate or transformers has a callback between the two.
    """

    def __init__(self, engine: Any, allocation: RankAllocation) -> None:
        super().__init__(engine)
        self._allocation = allocation

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """As accelerate's."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._allocation.observe()
            self.engine.step()
