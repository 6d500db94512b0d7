"""The tables of README.md, and results.json beside it: numbers only, no text of any document.

python recipes/calibration/tables.py [--output outputs/calibration]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # python puts this folder first

import typer
from study import MASK_SEEDS, SEEDS, TASKS

from launch.command import run_command

NAMES = {
    "local_arc_easy": "ARC-easy",
    "local_sst2": "SST-2",
    "local_rte": "RTE",
    "calibration_mmlu": "MMLU, six subjects",
}
KEPT = ("acc", "nll", "calibrated_nll", "brier", "auroc", "overconfidence")
"""Metrics in results.json."""
SYSTEMS = (
    ("base", "masks-0", "base"),
    ("plain LoRA, at the end", "lora-0", "deterministic"),
    ("plain LoRA, stopped early", "lora-early-0", "deterministic"),
    ("plain LoRA, deep ensemble of 3", "deep-ensemble", "deep_ensemble"),
    ("input dropout, one pass", "mc-dropout", "deterministic"),
    ("input dropout, Monte Carlo of 8", "mc-dropout", "mc_dropout"),
    ("LoRA Dropout, masks off", "masks-0", "deterministic"),
    ("LoRA Dropout, ensemble of 8", "masks-0", "ensemble"),
    ("the same, mean of probabilities", "masks-0-probabilities", "ensemble"),
)
"""Row of the first table, evaluation, system."""

Analysis = Mapping[str, Any]


def evaluated(output: Path) -> dict[str, dict[str, dict[str, Analysis]]]:
    """By evaluation, system and task, what ``results.json`` of the evaluation says."""
    found = {}
    for file in sorted((output / "evaluations").glob("*/latest/results.json")):
        systems = json.loads(file.read_text())["lora_dropout"]["systems"]
        found[file.parent.parent.name] = {name: system["analysis"] for name, system in systems.items()}
    return found


def compact(analysis: Analysis) -> dict[str, Any]:
    """What is kept of one analysis."""
    metrics = {
        key: [analysis["metrics"][key][part] for part in ("value", "low", "high")]
        for key in KEPT
        if key in analysis["metrics"]
    }
    folds = (analysis["temperature"] or {}).get("folds")
    curve = {point["members"]: {key: point["scores"][key] for key in KEPT} for point in analysis["curve"]}
    return {**metrics, "ece": analysis["ece"], "temperature_folds": folds, "curve": curve}


def rounded(value: Any) -> Any:
    """The same with numbers of six decimals at most."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score(analysis: Analysis, metric: str) -> str:
    """A value and its interval; a share in per cent."""
    estimate = analysis["metrics"][metric]
    factor, digits = (100, 1) if estimate["percent"] else (1, 3)
    value, low, high = (estimate[part] * factor for part in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ece(analysis: Analysis) -> str:
    """The error, and its band were the model calibrated, in per cent."""
    value, low, high = (100 * analysis["ece"][part] for part in ("value", "band_low", "band_high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def system_rows(found: Mapping[str, Any], task: str) -> Iterator[list[str]]:
    """Seed 0: every system on one task."""
    for name, evaluation, system in SYSTEMS:
        analysis = found.get(evaluation, {}).get(system, {}).get(task)
        if analysis:
            metrics = [score(analysis, metric) for metric in ("acc", "nll", "calibrated_nll")]
            yield [name, *metrics, ece(analysis)]


def adapter_rows(comparison: Mapping[str, Any]) -> Iterator[list[str]]:
    """Differences of seed 0's adapters, in the tested metric."""
    for task in comparison["tasks"]:
        for one in task["differences"]:
            if one["primary"] and task["task"] in NAMES:
                interval = f"{one['difference']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
                pair = f"{task['second']} - {task['first']}"
                yield [NAMES[task["task"]], pair, interval, f"{one['adjusted_p']:.2g}"]


def curve_rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    """Seed 0's ensemble on ARC-easy after 1, 2, ... members."""
    for point in found["masks-0"]["ensemble"]["local_arc_easy"]["curve"]:
        scores = point["scores"]
        yield [
            str(point["members"]),
            f"{100 * scores['acc']:.1f}",
            *(f"{scores[key]:.3f}" for key in ("nll", "calibrated_nll")),
            f"{100 * scores['ece']:.1f}",
        ]


def noise_rows(comparison: Mapping[str, Any]) -> Iterator[list[str]]:
    """The ensemble over mask seeds."""
    for one in comparison["mask_noise"]:
        if one["task"] in NAMES and one["metric"] in ("acc", "nll", "calibrated_nll"):
            factor, digits = (100, 1) if one["percent"] else (1, 3)
            scores = ", ".join(f"{value * factor:.{digits}f}" for value in one["scores"])
            low, high = one["deviation_low"] * factor, one["deviation_high"] * factor
            deviation = f"{one['deviation'] * factor:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
            yield [NAMES[one["task"]], one["name"], scores, deviation]


def held_out_rows(output: Path) -> Iterator[list[str]]:
    """Held-out and probe loss of the pairs after each epoch."""
    for run in [f"{kind}-{seed}" for seed in SEEDS[:2] for kind in ("lora", "masks")]:
        lines = [json.loads(line) for line in (output / "runs" / run / "history.jsonl").read_text().splitlines()]
        for key in ("validation_loss", "probe_loss"):
            yield [run, key.removesuffix("_loss"), *(f"{line[key]:.3f}" for line in lines if key in line)]


def tables(output: Annotated[Path, typer.Option()] = Path("outputs/calibration")) -> None:
    """Print the tables of what there is, and write results.json beside this file."""
    found = evaluated(output)
    kept = {
        evaluation: {
            system: {task: compact(analyses[task]) for task in TASKS if task in analyses}
            for system, analyses in systems.items()
        }
        for evaluation, systems in found.items()
    }
    lines = (f"{json.dumps(name)}: {json.dumps(rounded(systems))}" for name, systems in kept.items())
    (HERE / "results.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"mask seeds: the adapter's and {MASK_SEEDS}")
    print("\n**Loss**\n\n" + table(["run", "rows", *(f"epoch {n}" for n in range(1, 7))], held_out_rows(output)))
    header = ["system", "accuracy, %", "NLL", "NLL, own temperature", "ECE, % (if calibrated)"]
    for task in TASKS:
        print(f"\n**{NAMES[task]}**\n\n" + table(header, system_rows(found, task)))
    print("\n**Curve**\n\n" + table(["members", "accuracy, %", "NLL", "own temperature", "ECE, %"], curve_rows(found)))
    pairs = ["task", "pair", "difference", "adjusted p"]
    for name, rows_of, columns in (
        ("adapters", adapter_rows, pairs),
        ("adapters-calibrated", adapter_rows, pairs),
        ("adapters-seed-1", adapter_rows, pairs),
        ("mask-seeds", noise_rows, ["task", "metric", "by mask seed", "standard deviation"]),
    ):
        file = output / "comparisons" / name / "comparison.json"
        if file.exists():
            print(f"\n**{name}**\n\n" + table(columns, rows_of(json.loads(file.read_text()))))


if __name__ == "__main__":
    run_command(tables)
