"""lm-eval's samples: read from a run's folder, and the columns of their documents.

Legend: D documents, in order of doc_id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

SPOILT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What comes of a sample that is JSON, but not what an evaluation wrote."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Sample = Mapping[str, Any]
Records = Sequence[Sequence[Mapping[str, Any]]]
"""Of every document, of every request: the fields of ``eval.lm.records``."""


def samples_file(folder: Path, system: str, task: str) -> Path:
    """Where a run's folder holds the samples of a system on a task."""
    return folder / f"samples_{system}_{task}.jsonl".replace(":", "-").replace("/", "-")


def read_samples(folder: Path, system: str, task: str) -> list[dict[str, Any]]:
    """The samples of a run.

    Raises:
        UserError: there are none, or a line of them is damaged or of another program.
    """
    path = samples_file(folder, system, task)
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name}: that run did not evaluate {system} on {task}")
    samples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); evaluate again") from error
            if not isinstance(sample, dict) or "lora_dropout" not in sample:
                raise UserError(
                    f"{path}: line {number} lacks the key lora_dropout, so it was not written by this version of "
                    "launch/evaluate.py; evaluate again"
                )
            samples.append(sample)
    if not samples:
        raise UserError(f"{path}: empty; evaluate again")
    return samples


def first_filter(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the filter that comes first; lm-eval gives a sample per document and filter."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def documents(task: str, samples: Sequence[Sample]) -> list[Sample]:
    """One sample per document, in the order of the documents."""
    rows = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    ids = [row["doc_id"] for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{task}: a document occurs twice in the samples of one filter")
    return rows


def conditional(of_requests: Sequence[Any], row: Sample) -> Sequence[Any]:
    """Without lm-eval's second half of ``acc_mutual_info``: the choices without their prompt."""
    return of_requests[: len(of_requests) // 2] if "acc_mutual_info" in row["metrics"] else of_requests


def common_columns(task: str, rows: Sequence[Sample], records: Records) -> dict[str, Any]:
    """The fields of ``eval.analysis.answers.Answers``."""
    ours = [row["lora_dropout"] for row in rows]
    names = [own["cluster"] for own in ours]
    keys = tuple(
        str(row["doc_hash"]) if name is None else f"cluster {name}" for row, name in zip(rows, names, strict=True)
    )
    labels = [key if name is not None else place for place, (key, name) in enumerate(zip(keys, names, strict=True))]
    numbered = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return {
        "task": task,
        "doc_ids": np.array([int(row["doc_id"]) for row in rows], dtype=np.int64),
        "doc_hashes": tuple(str(row["doc_hash"]) for row in rows),
        "request_hashes": tuple(str(own["request_hash"]) for own in ours),
        "clusters": np.array([numbered[label] for label in labels], dtype=np.int64),
        "strata": np.zeros(len(rows), dtype=np.int64),
        "subjects": (task,),
        "cluster_keys": keys,
        "prompts": tuple(str(row["arguments"][0][0]) if len(row["arguments"][0]) > 1 else "" for row in rows),
        "targets": tuple(as_text(row["target"]) for row in rows),
        "truncated": np.array([max((r["truncated"] for r in of), default=0) for of in records], dtype=np.int64),
        "recorded": all(records),
        "scores": {name: numbers(rows, name) for name in rows[0]["metrics"] if is_numeric(rows, name)},
        "scored": tuple(rows[0]["metrics"]),
    }


def zero_one_metric(rows: Sequence[Sample]) -> str:
    """Exact match, or the first metric that is 0 or 1 for every document; empty where there is none."""
    candidates = sorted(rows[0]["metrics"], key=lambda name: name != "exact_match")  # stable: else lm-eval's order
    for name in candidates:
        if is_numeric(rows, name) and np.isin(numbers(rows, name), (0, 1)).all():
            return str(name)
    return ""


def is_numeric(rows: Sequence[Sample], name: str) -> bool:
    """Whether a metric is one number per document (F1 and perplexities are pairs)."""
    return all(isinstance(row.get(name), int | float | np.number | np.bool_) for row in rows)


def numbers(rows: Sequence[Sample], name: str) -> Floats:
    """``(D,)`` a metric."""
    return np.array([float(row[name]) for row in rows])


def filter_scores(by_filter: Mapping[str, Sequence[Sample]]) -> dict[str, Floats]:
    """``(D,)`` numbers by ``metric,filter``."""
    return {
        f"{metric},{name}": numbers(rows, metric)
        for name, rows in by_filter.items()
        for metric in rows[0]["metrics"]
        if is_numeric(rows, metric)
    }


def weights(rows: Sequence[Sample], metrics: Sequence[str]) -> Floats | None:
    """``(D,)`` the words or bytes by which lm-eval divides, from the first of the metrics that is there."""
    for metric in metrics:
        if metric in rows[0]["metrics"]:
            return np.array([float(row[metric][1]) for row in rows])
    return None


def as_text(value: Any) -> str:
    """A target or an answer; lists of right answers as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def stacked(records: Records, key: str) -> Floats:
    """``(N, D)`` a field with a number per member, of each document's first request."""
    return np.array([of_document[0][key] for of_document in records], dtype=np.float64).T


def floats(records: Records, key: str) -> Floats:
    """``(D,)`` a field of each document's first request; nan without records."""
    return np.array([of_document[0][key] if of_document else np.nan for of_document in records], dtype=np.float64)


def summed(records: Records, key: str) -> Ints:
    """``(D,)`` a field, summed over the requests."""
    return np.array([sum(record[key] for record in of_document) for of_document in records], dtype=np.int64)


def least_gap(records: Records) -> float:
    """Of any token; nan without records."""
    return float(min((record["least_gap"] for of in records for record in of), default=np.nan))
