"""Where the noise of a LoRA Dropout gradient comes from, and what each way of sampling masks does to it.

The gradient of example x under mask m is ``g(x, m) = G + a(x) + b(m) + c(x, m)``, with variances V_x, V_m and V_xm
(sums over the adapter's coordinates). They are estimated from crossed grids of examples and masks by two-way analysis
of variance (Searle, Casella & McCulloch, *Variance Components*, 1992, section 4.3, one observation per cell): unbiased
whatever the distributions. :func:`predicted` puts them into the variance of a step's gradient, :func:`measured` takes
that variance from repeated draws of batch and masks.

An example's loss is the sum over its trained tokens, divided by the mean number of trained tokens per row. A batch's
loss is the mean of its examples': training's loss, but for its own division by the batch's number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as student_t
from torch import nn

from pipeline.lora_dropout import LoraDropout

Sampling = Literal["instance", "example", "balanced"]


@dataclass(frozen=True)
class Components:
    """Variance components of one example's gradient under one mask, sums over coordinates; may come out negative."""

    examples: float
    """V_x."""
    masks: float
    """V_m."""
    interaction: float
    """V_xm."""

    def values(self) -> tuple[float, float, float]:
        """V_x, V_m, V_xm."""
        return self.examples, self.masks, self.interaction


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty."""

    value: float
    error: float
    """Standard error."""
    low: float
    high: float
    """95 % interval."""


@dataclass(frozen=True)
class Setting:
    """A way to draw a step's masks."""

    sampling: Sampling
    instances: int
    """N, or n draws per example."""
    examples: int
    """B, of one step: one micro-batch."""

    @property
    def passes(self) -> int:
        """Rows through the model per step."""
        return self.instances * self.examples

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.sampling} {'n' if self.sampling == 'example' else 'N'} = {self.instances}"

    def drawn(self, rows: Sequence[int], repeat: int) -> Draw:
        """One step on these rows, with masks that are fresh for each repeat.

        Balanced masks are balanced over the copies and shared by the batch, like instances.
        """
        copies = range(self.instances)
        masks: list[tuple[int, ...]]
        if self.sampling == "example":
            masks = [(repeat, place, copy) for copy in copies for place in range(len(rows))]
        else:
            masks = [(repeat, copy) for copy in copies]
        balanced = self.instances if self.sampling == "balanced" else None
        return Draw(rows, masks, self.instances, f"noise, {self.name}", balanced)


@dataclass(frozen=True)
class Draw:
    """The rows and masks of one gradient, which is the mean over its examples and copies."""

    rows: Sequence[int]
    masks: Sequence[tuple[int, ...]]
    """Coordinates, copy-major; as many for each copy."""
    copies: int
    purpose: str
    balanced: int | None = None


Gradient = Callable[[Draw], torch.Tensor]
"""From a draw to its gradient, ``(D,)`` float."""
DrawRows = Callable[[int], Sequence[int]]
"""From a number to that many rows, independent draws from the data."""


def components(columns: Iterator[torch.Tensor]) -> Components:
    """Unbiased variance components from one crossed grid.

    Args:
        columns: one ``(X, D)`` float tensor per mask, at least two: the gradients of the same X >= 2 examples under it.
            Only sums are kept: X + 1 vectors of D.

    Raises:
        ValueError: fewer than two examples or masks.
    """
    squares, of_masks, masks = 0.0, 0.0, 0
    row_sums: torch.Tensor | None = None
    for column in columns:
        column = column.double()
        row_sums = column.clone() if row_sums is None else row_sums.add_(column)
        squares += _squared(column)
        of_masks += _squared(column.mean(dim=0))
        masks += 1
    if row_sums is None or masks < 2 or len(row_sums) < 2:
        raise ValueError("variance components need a grid of at least two examples and two masks")
    examples = len(row_sums)
    grand = _squared(row_sums.mean(dim=0) / masks)
    total = squares
    between_examples = masks * (_squared(row_sums / masks) - examples * grand)
    between_masks = examples * (of_masks - masks * grand)
    rest = total - examples * masks * grand - between_examples - between_masks
    mean_interaction = rest / ((examples - 1) * (masks - 1))
    return Components(
        examples=(between_examples / (examples - 1) - mean_interaction) / masks,
        masks=(between_masks / (masks - 1) - mean_interaction) / examples,
        interaction=mean_interaction,
    )


def _squared(values: torch.Tensor) -> float:
    return float(values.square().sum())


def averaged(values: Sequence[float]) -> Estimate:
    """Mean of independent estimates, with a Student t interval.

    Raises:
        ValueError: fewer than two.
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two independent estimates")
    numbers = torch.tensor(values, dtype=torch.float64)
    mean, error = float(numbers.mean()), float(numbers.std() / math.sqrt(len(values)))
    half = float(student_t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, error, mean - half, mean + half)


def predicted(variances: Components, setting: Setting, micro_batches: int = 1) -> float | None:
    """Variance of a step's gradient, its sum over coordinates; None for balanced masks, which have no such formula.

    ``instance``: V_x/B + V_m/(K N) + V_xm/(B N). ``example``: V_x/B + (V_m + V_xm)/(B n).

    Args:
        variances: V_x, V_m, V_xm.
        setting: sampling, N or n, B.
        micro_batches: K, ranks x accumulation, each with masks of its own.
    """
    batch, instances = setting.examples, setting.instances
    if setting.sampling == "instance":
        of_masks = variances.masks / (micro_batches * instances)
        return variances.examples / batch + of_masks + variances.interaction / (batch * instances)
    if setting.sampling == "example":
        return variances.examples / batch + (variances.masks + variances.interaction) / (batch * instances)
    return None


def break_even(variances: Components, instances: int) -> float:
    """Examples per micro-batch from which one draw per example is quieter than N shared masks: V_m (b-N) = V_xm (N-1).

    Infinite where shared masks add no variance of their own.
    """
    if variances.masks <= 0:
        return math.inf
    return instances + (instances - 1) * max(variances.interaction, 0.0) / variances.masks


def break_even_interval(grids: Sequence[Components], instances: int) -> tuple[float, float]:
    """95 % interval of :func:`break_even` from independent grids; an end may be infinite.

    It holds the numbers of examples b for which the Student t interval of ``V_m (b-N) - V_xm (N-1)`` includes 0
    (Fieller's method: the ratio of two means has no moments to build an interval from), up to 10**6.
    """
    candidates = [instances * (1e6 / instances) ** (step / 2000) for step in range(2001)]
    advantage = [
        averaged([grid.masks * (b - instances) - grid.interaction * (instances - 1) for grid in grids])
        for b in candidates
    ]
    low = next((b for b, found in zip(candidates, advantage, strict=True) if found.high >= 0), math.inf)
    high = next((b for b, found in zip(candidates, advantage, strict=True) if found.low > 0), math.inf)
    return low, high


def variance(gradients: torch.Tensor) -> Estimate:
    """Total variance over coordinates of repeated, independent gradients, with a jackknife standard error.

    Args:
        gradients: ``(R, D)``, R >= 3.
    """
    repeats = len(gradients)
    centred = (gradients - gradients.mean(dim=0)).double()
    squares = centred.square().sum(dim=1)  # (R,): distances to the mean
    total = float(squares.sum())
    # without repeat r the sum of squares falls by R/(R-1) times its own (Welford's update, backwards)
    without = (total - squares * repeats / (repeats - 1)) / (repeats - 2)
    error = math.sqrt((repeats - 1) / repeats * float((without - without.mean()).square().sum()))
    value = total / (repeats - 1)
    half = float(student_t.ppf(0.975, repeats - 1)) * error
    return Estimate(value, error, value - half, value + half)


def grid_components(
    gradient: Gradient, draw_rows: DrawRows, grids: int, examples: int, masks: int
) -> Iterator[Components]:
    """Components of independent grids, each with X examples and M masks of its own, one gradient per cell."""

    def column(rows: Sequence[int], coordinate: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([gradient(Draw([row], [coordinate], 1, "noise, grid")) for row in rows])

    for grid in range(grids):
        rows = draw_rows(examples)
        yield components(column(rows, (grid, mask)) for mask in range(masks))


def measured(gradient: Gradient, draw_rows: DrawRows, setting: Setting, repeats: int) -> Estimate:
    """Variance of a step's gradient, from ``repeats`` independent steps, whose gradients are held at once."""
    steps = [gradient(setting.drawn(draw_rows(setting.examples), repeat)) for repeat in range(repeats)]
    return variance(torch.stack(steps))


class AdapterGradient:
    """The gradient of a model's trained parameters: a :data:`Gradient`. Copies run one after another."""

    def __init__(
        self,
        model: nn.Module,
        dropout: LoraDropout,
        collate: Callable[[Sequence[int]], dict[str, torch.Tensor]],
        mean_trained_tokens: float,
    ) -> None:
        """Remember.

        Args:
            model: its forward takes ``labels`` and ``num_items_in_batch``, as transformers' causal models do; a
                parameter without elements (AdaLoRA left its layer no rank) is none.
            dropout: the masks of its adapter.
            collate: from row numbers to padded tensors ``(B, T)`` on the model's device, labels among them.
            mean_trained_tokens: per row of the data.
        """
        self.model = model
        self.dropout = dropout
        self.collate = collate
        self.mean_trained_tokens = mean_trained_tokens
        self.parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]

    def __call__(self, draw: Draw) -> torch.Tensor:
        """``(D,)`` float32."""
        batch = self.collate(draw.rows)
        items = self.mean_trained_tokens * len(draw.rows) * draw.copies
        groups = len(draw.masks) // draw.copies
        total = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        for copy in range(draw.copies):
            own = draw.masks[copy * groups : (copy + 1) * groups]
            with self.dropout.masks(draw.purpose, own, rows=len(draw.rows), balanced=draw.balanced):
                loss = self.model(**batch, num_items_in_batch=items).loss
                parts = torch.autograd.grad(loss, self.parameters)
            total += torch.cat([part.flatten().float() for part in parts])
        return total
