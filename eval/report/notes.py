"""What a reader must know before and beside the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.scores import Analyses, ScoreRow


def notes(results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands above the scores."""
    ours = results["lora_dropout"]
    systems, settings = ours["systems"], ours.get("adapter_settings") or {}
    rate = settings.get("rate")
    found = list(ours.get("warnings", []))
    found += limit_notes(results)
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


def limit_notes(results: Mapping[str, Any]) -> list[str]:
    """Which tasks were cut short by ``eval.limit``; none where it was no less than their documents."""
    limit = results["lora_dropout"].get("limit")
    counts = results.get("n-samples", {}).items()
    cut = [f"{task} (of {n['original']:,})" for task, n in counts if n["effective"] < n["original"]]
    if limit is None or not cut:
        return []
    named = ", ".join(cut[:3]) + (f" and {len(cut) - 3} more tasks" if len(cut) > 3 else "")
    return [f"First {limit:,} documents only (eval.limit) of {named}: a trial, not a benchmark result."]


def task_notes(analyses: Analyses, task: str, labels: Mapping[str, str]) -> list[str]:
    """The analysis's own words on a task, each once, with its systems where not all have it."""
    analysed = {system: by_task[task] for system, by_task in analyses.items() if task in by_task}
    by_note: dict[str, list[str]] = {}
    for system, analysis in analysed.items():
        for note in analysis.notes:
            by_note.setdefault(note, []).append(labels[system])
    return [
        note if len(systems) == len(analysed) else f"{', '.join(systems)}: {note}" for note, systems in by_note.items()
    ]


def interval_note(rows: Sequence[ScoreRow]) -> str:
    """How the intervals were found, for the kinds that occur."""
    kinds = list(dict.fromkeys(found.interval for row in rows for found in row.scores.values()))
    if not any(kinds):
        return "No standard errors were recorded, so no intervals are drawn."
    known = {
        "Wilson": "Wilson for shares of right answers over independent documents",
        "normal": "normal, ±1.96 standard errors",
    }
    words = [text for kind, text in known.items() if kind in kinds]
    words += [kind for kind in kinds if kind and kind not in known]
    words += ["none where none can be given"] if "" in kinds else []
    return (
        f"Ranges and whiskers are 95 % intervals over documents ({'; '.join(words)}). All systems answer the same "
        "documents, so overlapping intervals do not mean equal systems, and none of this speaks of another training "
        "seed."
    )
