"""What the report shows, as the templates name it.

Everything comes from ``results.json``; equal input gives equal bytes. The HTML loads nothing and needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from markupsafe import Markup

from eval import scores
from eval.report.overfitting import evaluations, loss_curves, loss_sentences, training_loss_sentences
from eval.report.page import style_sheet
from eval.report.plots import MOST_ROWS, logarithmic, losses_figure, scores_figure
from eval.report.read import recorded_recipe
from eval.report.svg import both_widths
from eval.scores import ScoreRow
from pipeline.recipe import Recipe, recipe_to_yaml

PROVENANCE_ORDER = ("command", "started", "finished", "recipe sha256", "seed", "base", "data", "git", "versions")


def report_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates show."""
    ours = results["lora_dropout"]
    recipe = recorded_recipe(ours)
    history = ours.get("history") or []
    rows = scores.score_rows(results)
    labels = {name: system_label(name, ours) for name in scores.SYSTEMS if name in ours["systems"]}
    curves = loss_curves(history)
    shown = [row for row in rows if not row.subtask]
    drawn = [row for row in shown if row.percent and row.scores][:MOST_ROWS]
    return {
        "name": recipe.name,
        "verdict": score_sentences(shown, labels) + loss_sentences(evaluations(history))[:1],
        "notes": notes(results, history),
        "labels": labels,
        "rows": shown,
        "subtask_rows": [row for row in rows if row.subtask],
        "interval_note": interval_note(rows),
        "scores_svg": Markup(both_widths(partial(scores_figure, drawn), "scores")) if drawn else None,
        "drawn": len(drawn),
        "drawable": sum(row.percent for row in shown),
        "log_losses": bool(curves) and logarithmic(curves),
        "losses_svg": Markup(both_widths(partial(losses_figure, curves), "losses")) if curves else None,
        "loss_words": loss_sentences(evaluations(history)) + training_loss_sentences(history, evaluations(history)),
        "costs": cost_rows(ours, labels),
        "cost_words": cost_sentences(ours),
        "settings": setting_rows(ours, recipe),
        "provenance": provenance_tables(results),
        "recipe": recipe_to_yaml(recipe),
        "css": style_sheet(),
    }


def system_label(name: str, ours: Mapping[str, Any]) -> str:
    """The words for a system, with the number of members."""
    if name == "ensemble":
        return f"ensemble of {ours['ensemble']['instances']}" if ours.get("ensemble") else "ensemble"
    return {"base": "base", "deterministic": "deterministic adapter"}[name]


def capital(text: str) -> str:
    """The first letter upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def score_sentences(rows: Sequence[ScoreRow], labels: Mapping[str, str]) -> list[str]:
    """The verdict: each task's first metric, best-equipped system first; three tasks at most."""
    first = list({row.task: row for row in reversed(rows) if row.scores}.values())[::-1]
    sentences = []
    for row in first[:3]:
        named = [(labels[name], scores.score_text(found, row.percent)) for name, found in row.scores.items()][::-1]
        of = "" if row.percent and row.metric == "accuracy" else f" {row.metric}"
        others = "".join(f"; {label} {text}" for label, text in named[1:])
        sentences.append(f"{capital(named[0][0])}: {named[0][1]}{of} on {row.task}{others}.")
    if len(first) > 3:
        sentences.append(f"{len(first) - 3} more tasks are in the table.")
    return sentences or ["No task gave a score."]


def interval_note(rows: Sequence[ScoreRow]) -> str:
    """Which interval is drawn, for the kinds that occur."""
    kinds = {found.interval for row in rows for found in row.scores.values()}
    if not kinds & {"Wilson", "normal"}:
        return "No standard errors were recorded, so no intervals are drawn."
    meaning = {
        "Wilson": "Wilson for shares of right answers over independent documents",
        "normal": "normal, ±1.96 standard errors, for other scores",
        "": "none where no standard error is known",
    }
    named = [meaning[kind] for kind in ("Wilson", "normal", "") if kind in kinds]
    return (
        f"± is one standard error over documents; ranges and whiskers are 95 % intervals ({'; '.join(named)}). "
        "All systems answer the same documents, so overlapping intervals do not mean equal systems, and none of "
        "this speaks of another training seed."
    )


def notes(results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the numbers."""
    ours = results["lora_dropout"]
    systems, settings = ours["systems"], ours.get("adapter_settings") or {}
    rate = settings.get("rate")
    found = list(ours.get("warnings", []))
    if ours.get("limit") is not None:
        found.append(
            f"First {ours['limit']} documents of each task only (eval.limit): a trial, not a benchmark result."
        )
    if not ours.get("adapter"):
        found.append("No adapter was given: these are scores of the base model.")
    elif "ensemble" not in systems and not ours.get("warnings"):
        untrained = "the adapter was trained without LoRA Dropout (rate 0)"
        found.append(f"No ensemble was evaluated: {untrained if rate == 0 else 'eval.systems does not ask for it'}.")
    broken = [
        str(line["step"])
        for line in history
        for key in ("loss", "validation_loss")
        if line.get(key) is not None and not math.isfinite(line[key])
    ]
    if broken:
        found.append(
            f"Loss was not a finite number at step {', '.join(broken[:5])}: the training broke, the curves omit it."
        )
    return found


def duration(seconds: float) -> str:
    """``8.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds) // 3600} h {round(seconds) % 3600 // 60:02d} min"


def cost_rows(ours: Mapping[str, Any], labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(system, time, ratio to the deterministic adapter) for every system that was timed."""
    seconds = {name: ours["systems"][name]["seconds"] for name in labels if ours["systems"][name].get("seconds")}
    reference = seconds.get("deterministic")
    return [
        (labels[name], duration(spent), f"{spent / reference:.2f} \N{MULTIPLICATION SIGN}" if reference else "")
        for name, spent in seconds.items()
    ]


def cost_sentences(ours: Mapping[str, Any]) -> list[str]:
    """The ensemble's price, and what training took."""
    training = (ours.get("provenance") or {}).get("training") or {}
    seconds = {name: system["seconds"] for name, system in ours["systems"].items() if system.get("seconds")}
    found = []
    if {"ensemble", "deterministic"} <= seconds.keys() and ours.get("ensemble"):
        ratio = seconds["ensemble"] / seconds["deterministic"]
        found.append(f"{ours['ensemble']['instances']} members took {ratio:.2f} times as long as the single adapter.")
    if {"started", "finished"} <= training.keys():
        spent = datetime.fromisoformat(training["finished"]) - datetime.fromisoformat(training["started"])
        found.append(f"Training took {duration(spent.total_seconds())}.")
    history = ours.get("history") or []
    speeds = [line["tokens_per_second"] for line in history if line.get("tokens_per_second")]
    memory = [line["peak_memory_bytes"] for line in history if line.get("peak_memory_bytes")]
    if speeds:
        found.append(
            f"It ran at {sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s (median of the log)"
            + (f" with a peak of {max(memory) / 2**30:.2f} GiB of memory." if memory else ".")
        )
    return found


def setting_rows(ours: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    """(setting, value). The adapter's are its own: the recipe may have changed since training."""
    base, trained, ensemble = recipe.base, ours.get("adapter_settings"), ours.get("ensemble")
    storage = {"nf4": "4-bit nf4", "int8": "8-bit int8", "none": "not quantised"}[base.quantization]
    found = [("Base model", f"{base.model}, {storage}, {base.dtype}"), ("Adapter", ours.get("adapter") or "none")]
    if trained:
        alpha, in_file = trained.get("alpha", trained["lora_alpha"]), trained["lora_alpha"]
        folded = "" if alpha == in_file else f" ({in_file:g} in adapter_config.json)"
        found += [("Rank, alpha", f"{trained['r']}, {alpha:g}{folded}")]
        found += dropout_rows(trained)
    if ensemble:
        balanced = "balanced " if ensemble.get("balanced") else ""
        members = f"{ensemble['instances']} {balanced}members, average of {ensemble['average']} at every token"
        found += [("Test ensemble", f"{members}, mask seed {ensemble['seed']}")]
    prompts = {"task": "the task's own", "training": "the training prompt around the task's text"}
    fewshot, limit = recipe.eval.num_fewshot, ours.get("limit")
    return [
        *found,
        ("Prompt", prompts[ours["prompt"]]),
        ("Few-shot examples", "each task's own number" if fewshot is None else str(fewshot)),
        ("Documents", "all" if limit is None else f"first {limit} of each task"),
    ]


def dropout_rows(trained: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the adapter was trained."""
    if "rate" not in trained:
        return [("Dropout rate p", "not recorded: an adapter of another origin")]
    if trained["rate"] == 0 and not trained.get("rate_pattern"):
        return [("Dropout rate p", "0 (plain LoRA)")]
    masks = {"example": "each example draws its own masks", "instance": "masks shared by the micro-batch"}
    others = "".join(f", {rate:g} in {name}" for name, rate in trained.get("rate_pattern", {}).items())
    return [
        ("Dropout rate p", f"{trained['rate']:g}{others}"),
        ("Training instances N", f"{trained['instances']}, {masks[trained['sampling']]}"),
        ("Rescale by 1/(1-p)", "yes" if trained["rescale"] else "no: equation 2 verbatim, folded into alpha"),
    ]


def provenance_tables(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(title, rows): training, evaluation and task versions, each value as lines of text."""
    recorded = results["lora_dropout"].get("provenance") or {}
    parts = [
        (capital(str(name)), {key.replace("_", " "): value for key, value in part.items()})
        for name, part in recorded.items()
        if isinstance(part, Mapping) and part
    ]
    tasks = {name: f"version {version}" for name, version in results.get("versions", {}).items()}
    if tasks:
        parts.append(("Tasks", tasks))

    def place(name: str) -> int:
        return PROVENANCE_ORDER.index(name) if name in PROVENANCE_ORDER else len(PROVENANCE_ORDER)

    return [
        (title, [(name, value_lines(part[name])) for name in sorted(part, key=place) if part[name] is not None])
        for title, part in parts
    ]


def value_lines(value: Any) -> list[str]:
    """A recorded value as lines: a mapping as ``key value`` pairs, a list with one line per item."""
    if isinstance(value, Mapping):
        return [", ".join(f"{key} {' '.join(value_lines(item))}" for key, item in value.items() if item is not None)]
    if isinstance(value, list):
        return [line for item in value for line in value_lines(item)] or ["none"]
    return [{True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)]
