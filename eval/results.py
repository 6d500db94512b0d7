"""What an evaluation leaves behind: ``results.json``, samples, the report, and ``latest`` beside them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.metrics import acc_all, acc_all_stderr, mean, mean_stderr
from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable

from eval.analysis.schema import TaskAnalysis
from eval.lm import EnsembleLM
from eval.report import write_report
from eval.tasks import leaf_tasks
from pipeline.adapter.files import AdapterSettings, adapter_rank, read_peft_config
from pipeline.base import base_identity
from pipeline.process.rank import world_size
from pipeline.recipe import Recipe, recipe_to_yaml
from pipeline.redaction import command_line
from pipeline.run.folder import read_history, read_provenance
from pipeline.run.provenance import git_state, machine, now, versions

STDERRS: dict[Callable[..., float], Callable[..., float]] = {mean: mean_stderr, acc_all: acc_all_stderr}
"""Closed-form standard errors. lm-eval gives them only together with its bootstrap of the other metrics, which
starts a process per core and draws up to 100,000 times (lm-eval 0.4.13)."""


@dataclass(frozen=True)
class SystemScores:
    """One system over all tasks."""

    results: dict[str, Any]
    """lm-eval's own, without samples."""
    samples: dict[str, list[dict[str, Any]]]
    """lm-eval's, by task, in the order of the documents."""
    requests: int
    seconds: float
    """Spent on the requests."""
    peak_gpu_bytes: int | None
    mode: str
    """``exact`` or ``fast``."""
    kept: int
    """Requests whose answer was taken from disk."""
    analysis: dict[str, TaskAnalysis]
    """By task and group."""
    members: dict[str, object] | None = None
    """What is averaged: kind, number, and what they are drawn from; None for one model."""


def add_records(samples: dict[str, list[dict[str, Any]]], lm: EnsembleLM, tasks: list[Task | Group]) -> None:
    """Our part of every sample, under ``lora_dropout``.

    ``gold`` the right choice's index (multiple choice), ``request_hash`` over all arguments (lm-eval's own
    ``prompt_hash`` covers the first), ``cluster`` the text that a document shares with others (the task's
    ``metadata: {cluster: <field>}``), and ``requests`` the records of mode fast, in the order of the arguments.
    """
    for task in leaf_tasks(tasks):
        cluster = (task.config.metadata or {}).get("cluster")
        for sample in samples[task.task_name]:
            document = sample["doc"]
            arguments = json.dumps(sample["arguments"], default=handle_non_serializable, ensure_ascii=False)
            places = [(task.task_name, sample["doc_id"], index) for index in range(len(sample["arguments"]))]
            sample["lora_dropout"] = {
                "gold": gold_choice(task, document) if task.OUTPUT_TYPE == "multiple_choice" else None,
                "request_hash": hashlib.sha256(arguments.encode()).hexdigest(),
                "cluster": None if cluster is None else str(document[cluster]),
                "requests": [asdict(lm.records[place]) for place in places if place in lm.records],
            }


def gold_choice(task: Task, document: dict[str, Any]) -> int | None:
    """Index of the right choice, as lm-eval reads the task file; None where there is not exactly one."""
    choices = task.doc_to_choice(document)
    # With several contexts and one continuation (WinoGrande) the context's index is the answer.
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    return target if isinstance(target, int) and 0 <= target < len(choices) else None


def add_stderrs(results: dict[str, Any], samples: dict[str, list[dict[str, Any]]], tasks: list[Task | Group]) -> None:
    """Fill in standard errors of means over documents, and of groups of them, under lm-eval's keys."""
    for task in leaf_tasks(tasks):
        documents = samples[task.task_name]
        for metric, aggregation in task.aggregation().items():
            for name in {document["filter"] for document in documents} if aggregation in STDERRS else ():
                values = [d[metric] for d in documents if d["filter"] == name and metric in d]
                if len(values) > 1:
                    results["results"][task.task_name][f"{metric}_stderr,{name}"] = STDERRS[aggregation](values)
    for item in tasks:
        for group in [item, *item.get_all_groups()] if isinstance(item, Group) else []:
            if group.has_aggregation:
                results["results"][group.name] = results["groups"][group.name] = group.aggregate(results["results"])


def our_section(
    recipe: Recipe,
    adapter: Path,
    settings: AdapterSettings | None,
    masks: AdapterSettings,
    finished: dict[str, SystemScores],
    started: str,
    warnings: list[str],
) -> dict[str, Any]:
    """What ``results.json`` holds beside lm-eval's own keys, under ``lora_dropout``.

    Args:
        recipe: that was evaluated.
        adapter: its folder.
        settings: as recorded beside it; None where nothing is.
        masks: of the ensemble.
        finished: scores by system.
        started: when, ISO 8601.
        warnings: that the reader of the scores must see.
    """
    ensemble = recipe.eval.ensemble
    peft = read_peft_config(adapter)
    evaluation = {
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
        "base": base_identity(recipe.base),
        "processes": world_size(),
        "command": command_line(sys.argv),
        "started": started,
        "finished": now(),
    }
    return {
        "systems": {
            system: {
                "results": scores.results["results"],
                "requests": scores.requests,
                "seconds": scores.seconds,
                "peak_memory_bytes": scores.peak_gpu_bytes,
                "mode": scores.mode,
                "kept": scores.kept,
                "members": scores.members,
                "analysis": {task: found.model_dump() for task, found in scores.analysis.items()},
            }
            for system, scores in finished.items()
        },
        "ensemble": {
            "instances": ensemble.instances,
            "average": ensemble.average,
            "balanced": ensemble.balanced,
            "rate": masks.rate,
            "rate_pattern": dict(masks.rate_pattern),
            "seed": masks.seed,
        }
        if "ensemble" in finished
        else None,
        "adapter": str(adapter),
        "adapter_settings": {
            **({} if settings is None else asdict(settings)),
            "r": adapter_rank(peft),
            "lora_alpha": peft["lora_alpha"],
        },
        "warnings": warnings,
        "limit": recipe.eval.limit,
        "prompt": recipe.eval.prompt,
        "provenance": {
            "training": read_provenance(adapter),
            "evaluation": evaluation,
        },
        "recipe": recipe.model_dump(),
        "recipe_yaml": recipe_to_yaml(recipe),
        "history": read_history(adapter),
    }


def write_folder(results: dict[str, Any], finished: dict[str, SystemScores], parent: Path, started: str) -> Path:
    """Write results, samples and report into a new folder, and point ``latest`` at it.

    The folder appears whole or not at all; an error leaves nothing behind, and ``latest`` where it was.
    """
    time_stamp = datetime.fromisoformat(started).astimezone(UTC).strftime("%Y%m%d-%H%M%S")
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{time_stamp}-{os.getpid()}.part"
    partial.mkdir()
    try:
        write_samples(finished, partial)
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        (partial / "results.json").write_text(text + "\n", encoding="utf-8")
        write_report(partial)
        folder = parent / time_stamp
        repeats = 1
        while folder.exists():  # another evaluation began in the same second
            repeats += 1
            folder = parent / f"{time_stamp}-{repeats}"
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, if nothing failed
    link = parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(parent / "latest")
    return folder


def write_samples(finished: dict[str, SystemScores], folder: Path) -> None:
    """lm-eval's samples of every system and task, one document per line."""
    for system, scores in finished.items():
        for task, samples in scores.samples.items():
            lines = (json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples)
            file_name = f"samples_{system}_{task}.jsonl".replace(":", "-").replace("/", "-")
            (folder / file_name).write_text("\n".join(lines) + "\n", encoding="utf-8")
