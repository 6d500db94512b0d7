"""How strongly optimizer steps are clipped, and how far they move the adapter: what noisier gradients do to a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


class StepNorms(TrainerCallback):
    """Gradient and update norms since the last line of the log.

    Costs one copy of the adapter and three kernels per optimizer step; nothing waits for the device before
    :meth:`averages`. Under DeepSpeed's 16-bit engines the update is that of the 16-bit weights, with their rounding.
    Under ZeRO-3, where a rank holds shards only, there is no update norm.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._gradients: list[torch.Tensor] = []
        self._updates: list[torch.Tensor] = []
        self._weights: torch.Tensor | None = None  # before the step

    def gradient(self, norm: torch.Tensor | float | None) -> None:
        """Note the norm of a step's gradient before clipping; None where DeepSpeed made no step (an overflow)."""
        if norm is not None:
            self._gradients.append(torch.as_tensor(norm).detach())

    def averages(self, max_grad_norm: float) -> dict[str, float]:
        """``clip_fraction`` and ``update_norm`` of the steps since the last call.

        ``clip_fraction`` is the share of steps whose gradient norm exceeded ``max_grad_norm``, absent where that is 0
        (no clipping); ``update_norm`` the mean L2 norm of the change of all trained weights by one optimizer step.
        """
        found = {}
        if self._gradients and max_grad_norm > 0:
            found["clip_fraction"] = (torch.stack(self._gradients) > max_grad_norm).double().mean().item()
        if self._updates:
            found["update_norm"] = torch.stack(self._updates).double().mean().item()
        self._gradients, self._updates = [], []
        return found

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights of the first step; later ones start where the last one ended."""
        if self._weights is None and not is_deepspeed_zero3_enabled():
            self._weights = _trained_weights(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the step."""
        if self._weights is not None:
            weights = _trained_weights(kwargs["model"])
            self._updates.append(torch.linalg.vector_norm(weights - self._weights))
            self._weights = weights


def _trained_weights(model: nn.Module) -> torch.Tensor:
    """All trained weights in a row, a copy."""
    return nn.utils.parameters_to_vector(p.detach() for p in model.parameters() if p.requires_grad)
