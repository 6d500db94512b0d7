"""Run folders for the tests of comparisons: random models over the same documents, analysed as a real run is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from eval.analysis.analyse import analyse
from pipeline.recipe.schema import Adapter, Base, Data, Dropout, Ensemble, Eval, Recipe, Source

CHOICES = 3
DRAWS = 50
"""Of the run's own bootstrap: comparisons have their own, and read values only."""
Samples = list[dict[str, Any]]


def sample(
    number: int, arguments: list[Any], resps: list[Any], target: Any, values: Mapping[str, Any], cluster: str | None
) -> dict[str, Any]:
    """One document as lm-eval and ``add_records`` write it."""
    prompt = json.dumps(arguments)
    return {
        "doc_id": number,
        "doc": {"question": arguments[0][0]},
        "target": target,
        "arguments": arguments,
        "resps": [[resp] for resp in resps],
        "filtered_resps": resps,
        "filter": "none",
        "metrics": list(values),
        "doc_hash": hashlib.sha256(f"{arguments[0][0]} {target}".encode()).hexdigest(),
        "lora_dropout": {
            "gold": target if isinstance(target, int) else None,
            "request_hash": hashlib.sha256(prompt.encode()).hexdigest(),
            "cluster": cluster,
            "requests": [],
        },
        **values,
    }


def choice_samples(
    documents: int, model: int, skill: float = 1.0, clusters: int | None = None, salt: str = "", choices: int = CHOICES
) -> Samples:
    """Questions whose right choice is a function of the document, and one model's log-likelihoods.

    Args:
        documents: how many.
        model: seed of the model.
        skill: how far the right choice stands out.
        clusters: texts that documents share.
        salt: makes other documents.
        choices: of each.
    """
    draw = np.random.default_rng(model)
    found = []
    for number in range(documents):
        gold = int(hashlib.sha256(f"{salt}{number}".encode()).hexdigest(), 16) % choices
        logits = draw.normal(size=choices)
        logits[gold] += skill
        values = log_softmax(logits) - 3.0
        found.append(
            sample(
                number,
                [[f"{salt}Question {number}?\nAnswer:", f" choice {place}"] for place in range(choices)],
                [[float(value), False] for value in values],
                gold,
                {"acc": float(np.argmax(values) == gold)},
                None if clusters is None else f"text {number % clusters}",
            )
        )
    return found


def answered(right: list[bool], confident: float = 2.0) -> Samples:
    """Two choices, the first of which is right; a model that is right where it is told to be."""
    found = choice_samples(len(right), 0, choices=2, salt="told ")
    for one, good in zip(found, right, strict=True):
        gold = one["target"]
        values = log_softmax([confident if (place == gold) == good else 0.0 for place in range(2)])
        one["resps"] = [[[float(value), False]] for value in values]
        one["filtered_resps"] = [[float(value), False] for value in values]
        one["acc"] = float(good)
    return found


def text_samples(documents: int, model: int) -> Samples:
    """Whole texts with their log-likelihood."""
    draw = np.random.default_rng(model)
    found = []
    for number in range(documents):
        length = 40 + 7 * number
        value = float(-length * draw.uniform(0.5, 0.9))
        values = {"bits_per_byte": [value, length], "word_perplexity": [value, length // 5]}
        found.append(sample(number, [[f"Text {number} " + "x" * length]], [value], "", values, None))
    return found


def word_samples(documents: int, model: int) -> Samples:
    """Generated numbers that are compared with the right one."""
    draw = np.random.default_rng(model)
    found = []
    for number in range(documents):
        text = str(number) if draw.random() < 0.6 else "none"
        arguments = [[f"Which number comes after {number - 1}?", {"until": ["."], "max_gen_toks": 5}]]
        found.append(sample(number, arguments, [text], str(number), {"exact_match": float(text == str(number))}, None))
    return found


def recipe_of(name: str, seed: int, mask_seed: int | None) -> Recipe:
    """A recipe that differs in nothing else."""
    return Recipe(
        name=name,
        seed=seed,
        base=Base(model="base", quantization="none", dtype="float32"),
        adapter=Adapter(rank=4, alpha=8.0, dropout=Dropout(rate=0.5)),
        data=Data(train=[Source(path="rows.json")]),
        eval=Eval(tasks=["any"], ensemble=Ensemble(instances=3, seed=mask_seed)),
    )


def write_run(
    folder: Path,
    tasks: Mapping[str, Samples],
    name: str = "tiny",
    seed: int = 1,
    mask_seed: int | None = None,
    systems: Mapping[str, Mapping[str, Samples]] | None = None,
    groups: Mapping[str, list[str]] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """A folder as ``launch/evaluate.py`` leaves it.

    Args:
        folder: to be made.
        tasks: samples by task, of the system ``ensemble`` if there is a mask seed, else ``deterministic``.
        name, seed, mask_seed: of the recipe.
        systems: samples by system and task, instead.
        groups: lm-eval's ``group_subtasks``.
        change: the results, before they are written.
    """
    folder.mkdir(parents=True)
    by_system = systems or {"deterministic" if mask_seed is None else "ensemble": tasks}
    recipe = recipe_of(name, seed, mask_seed)
    some = next(iter(by_system.values()))
    results: dict[str, Any] = {
        "results": {},
        "group_subtasks": dict(groups or {}),
        "versions": {task: 1.0 for task in some},
        "n-shot": {task: 0 for task in some},
        "higher_is_better": {
            task: {metric: metric not in ("bits_per_byte", "word_perplexity") for metric in samples[0]["metrics"]}
            for task, samples in some.items()
        },
        "n-samples": {task: {"original": len(found), "effective": len(found)} for task, found in some.items()},
        "lora_dropout": {
            "systems": {},
            "ensemble": None if mask_seed is None else {"instances": 3, "average": "logits", "seed": mask_seed},
            "adapter": f"outputs/{name}",
            "limit": None,
            "prompt": "task",
            "warnings": [],
            "recipe": json.loads(recipe.model_dump_json()),
            "provenance": {
                "training": {"seed": seed, "started": "2030-01-01T00:00:00+00:00"},
                "evaluation": {"finished": "2030-01-02T03:04:05+00:00"},
            },
        },
    }
    for system, of_system in by_system.items():
        analysis = analyse(of_system, results, DRAWS)
        results["lora_dropout"]["systems"][system] = {
            "results": {},
            "mode": "exact",
            "analysis": {task: one.model_dump(mode="json") for task, one in analysis.items()},
        }
        for task, samples in of_system.items():
            lines = "".join(json.dumps(one) + "\n" for one in samples)
            (folder / f"samples_{system}_{task}.jsonl").write_text(lines, encoding="utf-8")
    if change:
        change(results)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder
