"""Synthetic results.json in the shape that eval/run.py writes, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from report_analyses import analyses_of

RECIPE = {
    "name": "pocket-example",
    "seed": 7,
    "base": {"model": "recipes/pocket/base", "quantization": "nf4", "dtype": "bfloat16"},
    "adapter": {
        "method": "lora",
        "rank": 16,
        "alpha": 32.0,
        "dropout": {"rate": 0.5, "instances": 2, "sampling": "example", "rescale": True},
    },
    "data": {
        "train": [{"path": "recipes/pocket/data/train.jsonl", "format": "alpaca"}],
        "validation": {"fraction": 0.05},
    },
    "training": {"learning_rate": 1e-3, "num_train_epochs": 3},
    "eval": {
        "tasks": ["pocket_sentiment", "pocket_capitals", "pocket_reverse"],
        "prompt": "training",
        "systems": ["base", "deterministic", "ensemble"],
        "ensemble": {"instances": 8, "average": "logits"},
    },
}


def proportion(right: int, documents: int, metric: str = "acc,none") -> dict[str, float]:
    """A 0/1 metric as lm-eval gives it: the mean, and the standard error with n - 1."""
    value = right / documents
    name, _, filtered = metric.partition(",")
    return {metric: value, f"{name}_stderr,{filtered}": math.sqrt(value * (1 - value) / (documents - 1))}


def history(steps: int = 300, turn: int = 180) -> list[dict[str, float]]:
    """A training log whose validation loss is lowest near step ``turn``, while the probe goes on falling."""
    noise = random.Random(0)
    lines: list[dict[str, float]] = []
    for step in range(10, steps + 1, 10):
        fit = 0.25 + 3.2 * math.exp(-step / 45)
        lines.append(
            {
                "step": step,
                "epoch": step / 100,
                "loss": fit + 0.15 + noise.uniform(-0.08, 0.08),
                "learning_rate": 1e-3,
                "gradient_norm": 1.1,
                "tokens_per_second": 4100.0 + step,
                "peak_memory_bytes": 1.4e9,
                "time": 12.0 * step,
            }
        )
        if step % 30 == 0:
            lines.append(
                {
                    "step": step,
                    "epoch": step / 100,
                    "probe_loss": fit,
                    "time": 12.0 * step,
                    "validation_loss": fit + 0.06 + 0.000012 * max(0, step - turn) ** 2,
                }
            )
    return lines


def synthetic_results() -> dict[str, Any]:
    """Three tasks, three systems, a full history."""
    systems = {
        "base": {
            "results": {
                "pocket_sentiment": {"alias": "pocket_sentiment", **proportion(331, 1000)},
                "pocket_capitals": {"alias": "pocket_capitals", **proportion(51, 200)},
                "pocket_reverse": {"alias": "pocket_reverse", **proportion(0, 150, "exact_match,strict")},
            },
            "seconds": 21.31,
        },
        "deterministic": {
            "results": {
                "pocket_sentiment": proportion(699, 1000),
                "pocket_capitals": proportion(117, 200),
                "pocket_reverse": proportion(64, 150, "exact_match,strict"),
            },
            "seconds": 22.87,
        },
        "ensemble": {
            "results": {
                "pocket_sentiment": proportion(712, 1000),
                "pocket_capitals": proportion(121, 200),
                "pocket_reverse": proportion(71, 150, "exact_match,strict"),
            },
            "seconds": 88.02,
        },
    }
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "lm_eval": "0.4.13"}
    return {
        "results": systems["ensemble"]["results"],
        "group_subtasks": {},
        "versions": {"pocket_sentiment": 1.0, "pocket_capitals": 1.0, "pocket_reverse": 1.0},
        "n-shot": {"pocket_sentiment": 0, "pocket_capitals": 0, "pocket_reverse": 0},
        "higher_is_better": {
            "pocket_sentiment": {"acc": True},
            "pocket_capitals": {"acc": True},
            "pocket_reverse": {"exact_match": True},
        },
        "n-samples": {
            "pocket_sentiment": {"original": 1000, "effective": 1000},
            "pocket_capitals": {"original": 200, "effective": 200},
            "pocket_reverse": {"original": 150, "effective": 150},
        },
        "lora_dropout": {
            "systems": systems,
            "ensemble": {"instances": 8, "average": "logits", "seed": 7},
            "adapter_settings": {
                "rate": 0.5,
                "instances": 2,
                "sampling": "example",
                "rescale": True,
                "alpha": 24.0,
                "r": 12,
                "lora_alpha": 24.0,
            },
            "adapter": "outputs/pocket-example",
            "limit": None,
            "prompt": "training",
            "provenance": {
                "training": {
                    "recipe_sha256": "4fd1c6" + 58 * "0",
                    "versions": versions,
                    "git": {"commit": "0123abc", "modified": False},
                    "data": [{"path": "recipes/pocket/data/train.jsonl", "rows": 2000, "sha256": 64 * "a"}],
                    "seed": 7,
                    "machine": {"host": "node1", "gpus": [], "threads": 4},
                    "command": "launch/sft.py recipes/pocket/example.yaml",
                    "started": "2026-11-22T09:00:00+00:00",
                    "finished": "2026-11-22T09:04:02+00:00",
                },
                "evaluation": {
                    "versions": versions,
                    "git": {"commit": "0123abc", "modified": True},
                    "machine": {"host": "node1", "gpus": [], "threads": 4},
                    "command": "launch/evaluate.py recipes/pocket/example.yaml",
                    "started": "2026-11-22T09:04:10+00:00",
                    "finished": "2026-11-22T09:06:40+00:00",
                },
            },
            "recipe": RECIPE,
            "history": history(),
        },
    }


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """The folder, with the results in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


MEMBERS = {
    "mc_dropout": {"kind": "noise", "instances": 8, "average": "logits", "rate": 0.1, "seed": 3},
    "deep_ensemble": {
        "kind": "adapters",
        "instances": 3,
        "average": "logits",
        "folders": ["outputs/seed-1", "outputs/seed-2"],
    },
}


def analysed_results(
    systems: tuple[str, ...] = ("base", "deterministic", "ensemble"), tasks: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """A full run as ``eval/run.py`` writes it: choices, a group, generation and whole articles, with their analyses.

    Args:
        systems: some of ``report_analyses.SIMULATED``.
        tasks: some of those; all by default.
    """
    results = synthetic_results()
    ours = results["lora_dropout"]
    seconds = {"base": 20.3, "deterministic": 21.9, "mc_dropout": 130.2, "deep_ensemble": 66.1, "ensemble": 61.4}
    names = {"exact_match,strict": "exact_match,strict"}
    ours["systems"] = {}
    for system in systems:
        analyses = {task: one for task, one in analyses_of(system).items() if tasks is None or task in tasks}
        of_tasks = {
            task: {
                names.get(key, f"{key},none"): one["metrics"][key]["value"]
                for key in ("acc", "exact_match,strict", "word_perplexity")
                if key in one["metrics"]
            }
            for task, one in analyses.items()
        }
        ours["systems"][system] = {
            "results": of_tasks,
            "analysis": analyses,
            "seconds": seconds[system],
            "requests": 9000,
            "kept": 0,
            "mode": "fast",
            "members": MEMBERS.get(system),
        }
    last = ours["systems"][systems[-1]]
    parts = ["mmlu_law", "mmlu_anatomy", "mmlu_physics"]
    samples = {task: one["documents"] for task, one in last["analysis"].items() if task != "mmlu"}
    ours["recipe"] = json.loads(json.dumps(RECIPE))
    ours["recipe"]["eval"] |= (
        {"deep_ensemble": ["outputs/seed-1", "outputs/seed-2"]} if "deep_ensemble" in systems else {}
    )
    ours["recipe"]["eval"] |= {"tasks": ["sst2", "rte", "arc_easy", "mmlu", "gsm8k", "wikitext"], "systems": systems}
    return results | {
        "results": last["results"],
        "group_subtasks": {"mmlu": parts} if "mmlu" in last["analysis"] else {},
        "versions": dict.fromkeys(samples, 1.0),
        "n-shot": dict.fromkeys(samples, 0),
        "higher_is_better": {},
        "n-samples": {task: {"original": n, "effective": n} for task, n in samples.items()},
    }
