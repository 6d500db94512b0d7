"""The noise of a recipe's gradient at one adapter: components, predictions and direct measurement in one record."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.adapter.check import check_adapter, check_settings
from pipeline.adapter.config import check_target_modules, freeze_rank_numbers, lora_config
from pipeline.adapter.dropout import recipe_dropout
from pipeline.adapter.files import load_adapter, read_settings
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_splits
from pipeline.errors import UserError
from pipeline.noise.components import (
    AdapterGradient,
    Components,
    DrawRows,
    Estimate,
    Setting,
    averaged,
    break_even,
    break_even_interval,
    grid_components,
    measured,
    predicted,
)
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Effort:
    """How much is computed."""

    grids: int = 8
    grid_examples: int = 32
    """X of each grid; V_m is told from V_xm/X, so that many examples help most."""
    grid_masks: int = 8
    """M of each grid."""
    examples: int = 8
    """B of a step, for the direct measurement at equal examples; equal compute is that of N = 4 with B examples."""
    repeats: int = 32
    """Steps drawn for each direct measurement."""

    @property
    def passes(self) -> int:
        """Rows through the model per step, at equal compute."""
        return 4 * self.examples


@dataclass(frozen=True)
class Comparison:
    """One way to draw masks: its variance by formula and by measurement, sums over coordinates."""

    setting: Setting
    predicted: Estimate | None
    """From the components; None for balanced masks."""
    measured: Estimate


@dataclass(frozen=True)
class BreakEven:
    """Examples per micro-batch from which one draw per example is quieter than N shared masks."""

    examples: float
    low: float
    high: float
    """95 % interval."""


@dataclass(frozen=True)
class Noise:
    """What was found."""

    recipe: str
    adapter: str
    rate: float
    rates: tuple[float, float]
    """Least and most of the layers'."""
    rows: int
    parameters: int
    examples: Estimate
    """V_x."""
    masks: Estimate
    """V_m."""
    interaction: Estimate
    """V_xm."""
    break_even: dict[int, BreakEven]
    """By N."""
    equal_examples: list[Comparison]
    equal_compute: list[Comparison]
    effort: Effort

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; what is infinite is null there."""
        record = asdict(self)
        for numbers in record["break_even"].values():
            numbers.update({name: None for name, value in numbers.items() if math.isinf(value)})
        return record


def settings(effort: Effort) -> tuple[list[Setting], list[Setting]]:
    """Those compared at B examples each, and those at as many passes each."""
    kinds: list[tuple[Any, int]] = [
        *(("instance", instances) for instances in (1, 2, 4, 8)),
        ("balanced", 4),
        ("example", 1),
        ("example", 4),
    ]
    equal_examples = [Setting(sampling, instances, effort.examples) for sampling, instances in kinds]
    equal_compute = [
        Setting(sampling, instances, effort.passes // instances)
        for sampling, instances in kinds
        if effort.passes >= instances
    ]
    return equal_examples, equal_compute


def measure_noise(recipe: Recipe, adapter: Path | None, effort: Effort, tell: Callable[[str], None]) -> Noise:
    """Load, estimate, predict and measure.

    Args:
        recipe: its base, training rows and masks.
        adapter: folder of the weights at which to measure; None, the adapter as it is initialised.
        effort: how much is computed.
        tell: takes a line about progress.

    AdaLoRA's orthogonality term is left out: it is the same for all examples and masks.

    Raises:
        UserError: the recipe masks nothing; the adapter does not load, or was trained with other settings; a layer that
            has one mask for all rows.
    """
    if adapter is not None:
        check_settings(read_settings(adapter), recipe, adapter)
        check_adapter(recipe.base, adapter)
    tell("loading")
    tokenizer = load_tokenizer(recipe.base)
    rows = load_splits(recipe, tokenizer).train
    torch.manual_seed(recipe.seed)
    model = _adapted(recipe, adapter)
    dropout = recipe_dropout(model, recipe)
    if dropout is None:
        raise UserError("adapter.dropout.rate: found 0, so there are no masks whose noise could be measured; set it")
    shared = [name for name, layer in dropout.layers.items() if layer.one_group]
    if shared:
        raise UserError(
            f"adapter: {shared[0]} has one mask for all rows of a batch, and this measurement gives each example its "
            "own; leave it out of target_modules or target_parameters"
        )
    trained = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    collate = _collator(rows["input_ids"], rows["labels"], tokenizer, model.device)
    bare = model.get_base_model()  # with the adapter's layers, without the forward that adds AdaLoRA's term
    gradient = AdapterGradient(bare, dropout, collate, float(np.mean(trained)))
    chance = random.Random(recipe.seed)

    def draw_rows(count: int) -> Sequence[int]:
        return chance.choices(range(len(trained)), k=count)

    grids = []
    for found in grid_components(gradient, draw_rows, effort.grids, effort.grid_examples, effort.grid_masks):
        grids.append(found)
        tell(f"grid {len(grids)} of {effort.grids}")
    parts = [averaged([getattr(grid, name) for grid in grids]) for name in ("examples", "masks", "interaction")]
    means = Components(*(part.value for part in parts))
    comparisons: dict[Setting, Comparison] = {}
    equal_examples, equal_compute = settings(effort)
    wanted = list(dict.fromkeys([*equal_examples, *equal_compute]))
    for number, setting in enumerate(wanted, start=1):
        comparisons[setting] = _comparison(gradient, draw_rows, setting, grids, effort.repeats)
        tell(f"steps {number} of {len(wanted)}: {setting.name}, B = {setting.examples}")
    rates = [dropout.rates.of(name) for name in dropout.layers]
    return Noise(
        recipe=recipe.name,
        adapter=str(adapter) if adapter else "as initialised",
        rate=dropout.rate,
        rates=(min(rates), max(rates)),
        rows=len(trained),
        parameters=sum(parameter.numel() for parameter in gradient.parameters),
        examples=parts[0],
        masks=parts[1],
        interaction=parts[2],
        break_even={n: BreakEven(break_even(means, n), *break_even_interval(grids, n)) for n in (2, 4, 8)},
        equal_examples=[comparisons[setting] for setting in equal_examples],
        equal_compute=[comparisons[setting] for setting in equal_compute],
        effort=effort,
    )


def _comparison(
    gradient: AdapterGradient, draw_rows: DrawRows, setting: Setting, grids: list[Components], repeats: int
) -> Comparison:
    """Formula, whose interval is that of its value over the grids, and measurement."""
    guesses = [guess for grid in grids if (guess := predicted(grid, setting)) is not None]
    return Comparison(setting, averaged(guesses) if guesses else None, measured(gradient, draw_rows, setting, repeats))


def _adapted(recipe: Recipe, adapter: Path | None) -> PeftModel:
    """The base with the adapter, of which nothing but the adapter has a gradient; no activation is dropped."""
    base = load_base(recipe.base)
    check_target_modules(base, recipe.adapter)
    if adapter is None:
        base.requires_grad_(False)
        model: PeftModel = get_peft_model(base, lora_config(recipe.adapter)).eval()
    else:
        model = load_adapter(base, adapter)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # load_adapter is for inference
                parameter.requires_grad_(True)
    freeze_rank_numbers(model)
    return model


def _collator(
    input_ids: list[list[int]],
    labels: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """From row numbers to a padded batch, as training has it."""
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)

    def collate(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = collator([{"input_ids": input_ids[n], "labels": labels[n]} for n in numbers])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    return collate
