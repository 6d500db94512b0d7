"""What the study's runs say: held-out loss by mode, paired differences over seeds, a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy import stats

ENSEMBLE = 8
MARGIN = 0.02
"""Nats per token; README.md."""
COMPARED = (
    ("example-1", "instance-4"),
    ("example-1", "instance-1"),
    ("example-4", "instance-4"),
    ("example-1", "lora"),
    ("instance-1", "lora"),
    ("example-4", "lora"),
    ("instance-4", "lora"),
)
"""First minus second; the first pair is the one with a claim."""


@dataclass(frozen=True)
class Measured:
    """One run at a point of comparison."""

    mode: str
    seed: int
    budget: str
    steps: int
    learning_rate: float
    held_out: float
    """Nats per token, masks off."""
    probe: float
    """Of training rows."""
    ensemble: float | None
    """Held-out loss of the ensemble; None without masks."""
    clip_fraction: float
    update_norm: float


@dataclass(frozen=True)
class Difference:
    """First mode minus second, paired by seed."""

    first: str
    second: str
    budget: str
    measure: str
    """``held_out`` or ``ensemble``."""
    mean: float
    interval_95: tuple[float, float]
    interval_90: tuple[float, float]
    each: list[float]
    """By seed."""


def ensemble_loss(recipe_file: Path, adapter: Path) -> float:
    """Held-out loss of the mean of ``ENSEMBLE`` members' logits, in nats per trained token.

    Args:
        recipe_file: resolved recipe of the run.
        adapter: run or checkpoint folder.
    """
    from torch.nn.functional import cross_entropy
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from pipeline.adapter.dropout import recipe_dropout
    from pipeline.adapter.files import load_adapter
    from pipeline.base import load_base, load_tokenizer
    from pipeline.data import load_splits
    from pipeline.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    tokenizer = load_tokenizer(recipe.base)
    held_out = load_splits(recipe, tokenizer).validation
    model = load_adapter(load_base(recipe.base), adapter)
    dropout = recipe_dropout(model, recipe)
    assert dropout is not None and held_out is not None
    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    total, tokens = 0.0, 0
    for start in range(0, len(held_out), 16):
        rows = held_out.select(range(start, min(start + 16, len(held_out))))
        batch = collator([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        labels = batch.pop("labels")[:, 1:]
        copies = {name: tensor.repeat(ENSEMBLE, 1) for name, tensor in batch.items()}
        with torch.no_grad(), dropout.members(range(ENSEMBLE)):
            logits = model(**copies).logits.float()  # (N*B, T, V), member-major
        mean = logits.unflatten(0, (ENSEMBLE, -1)).mean(dim=0)[:, :-1]
        total += float(cross_entropy(mean.flatten(0, 1), labels.flatten(), reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / tokens


def mean_until(history: Sequence[dict[str, float]], key: str, step: int) -> float:
    """Mean of what was logged under a key up to a step."""
    return fmean(line[key] for line in history if key in line and line["step"] <= step)


def differences(found: Sequence[Measured]) -> list[Difference]:
    """All pairs at both budgets, for masks off and for the ensemble."""
    value = {(one.mode, one.seed, one.budget): one for one in found}
    seeds = sorted({one.seed for one in found})
    results = []
    for budget in dict.fromkeys(one.budget for one in found):
        for measure in ("held_out", "ensemble"):
            for first, second in COMPARED:
                pairs = [(value[first, seed, budget], value[second, seed, budget]) for seed in seeds]
                numbers = [tuple(asdict(one)[measure] for one in pair) for pair in pairs]
                if any(None in pair for pair in numbers):
                    continue
                test = stats.ttest_rel(*zip(*numbers, strict=True))
                each = [a - b for a, b in numbers]
                wide, narrow = test.confidence_interval(0.95), test.confidence_interval(0.90)
                results.append(
                    Difference(first, second, budget, measure, fmean(each), tuple(wide), tuple(narrow), each)
                )
    return results


def table(found: Sequence[Measured], compared: Sequence[Difference]) -> str:
    """Markdown: loss by mode, then differences."""
    lines = []
    for budget in dict.fromkeys(one.budget for one in found):
        lines += [
            f"**{budget.capitalize()}**",
            "",
            "| mode | steps | learning rate | held-out loss | ensemble of 8 | training rows | clipped | update norm |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for mode in dict.fromkeys(one.mode for one in found):
            own = [one for one in found if (one.mode, one.budget) == (mode, budget)]
            members = [one.ensemble for one in own if one.ensemble is not None]
            lines.append(
                f"| {mode} | {own[0].steps} | {own[0].learning_rate:g} | {fmean(one.held_out for one in own):.4f} | "
                f"{f'{fmean(members):.4f}' if members else '-'} | {fmean(one.probe for one in own):.3f} | "
                f"{fmean(one.clip_fraction for one in own):.0%} | {fmean(one.update_norm for one in own):.3f} |"
            )
        lines += [
            "",
            "| difference | held-out loss | 95 % | upper end of 90 % | ensembles | 95 % |",
            "|---|---|---|---|---|---|",
        ]
        for first, second in COMPARED:
            pair = {
                one.measure: one for one in compared if (one.first, one.second, one.budget) == (first, second, budget)
            }
            masks_off, ensembles = pair["held_out"], pair.get("ensemble")
            cells = [f"{masks_off.mean:+.4f}", _interval(masks_off), f"{masks_off.interval_90[1]:+.4f}"]
            cells += [f"{ensembles.mean:+.4f}", _interval(ensembles)] if ensembles else ["-", "-"]
            lines.append(f"| {first} - {second} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _interval(difference: Difference) -> str:
    low, high = difference.interval_95
    return f"{low:+.4f} to {high:+.4f}"


def draw(found: Sequence[Measured], compared: Sequence[Difference], file: Path) -> None:
    """Left: loss of each seed and mode. Right: paired differences with 95 % intervals, and the margin."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = {"equal steps": "#b4552d", "equal compute": "#2d6cb4"}
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    modes = list(dict.fromkeys(one.mode for one in found))
    for budget, shift in zip(colours, (-0.15, 0.15), strict=True):
        own = [one for one in found if one.budget == budget]
        places = [modes.index(one.mode) + shift for one in own]
        left.plot(places, [one.held_out for one in own], "o", ms=3, alpha=0.45, color=colours[budget])
        means = [fmean(one.held_out for one in own if one.mode == mode) for mode in modes]
        left.plot([n + shift for n in range(len(modes))], means, "_", ms=18, mew=2, color=colours[budget], label=budget)
        for place, (first, second) in enumerate(reversed(COMPARED)):
            (one,) = (
                d for d in compared if (d.first, d.second, d.budget, d.measure) == (first, second, budget, "held_out")
            )
            error = [[one.mean - one.interval_95[0]], [one.interval_95[1] - one.mean]]
            right.errorbar(one.mean, place - shift, xerr=error, fmt="o", ms=4, capsize=3, color=colours[budget])
    left.set_xticks(range(len(modes)), modes)
    left.set_ylabel("held-out loss, nats per token; dots: seeds")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(COMPARED)), [f"{first} - {second}" for first, second in reversed(COMPARED)])
    right.axvline(0, color="#999999", lw=0.8)
    right.axvline(MARGIN, color="#999999", lw=0.8, ls="--")
    right.annotate("margin", (MARGIN, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    right.set_xlabel("difference in held-out loss, 95 % t interval")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    with rc_context({"svg.fonttype": "none"}):  # text, not outlines: a third of the size
        figure.savefig(file)


def write_results(found: Sequence[Measured], protocol: dict[str, Any], folder: Path) -> str:
    """``results.json``, ``results.svg``; returns the Markdown table."""
    compared = differences(found)
    record = {
        "protocol": {**protocol, "ensemble": ENSEMBLE, "margin": MARGIN},
        "runs": [asdict(one) for one in found],
        "differences": [asdict(one) for one in compared],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(found, compared, folder / "results.svg")
    return table(found, compared)
