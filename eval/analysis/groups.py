"""Several tasks as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.analysis.answers import Answers, ChoiceAnswers
from eval.analysis.samples import Floats


def joined_choices(name: str, parts: Sequence[ChoiceAnswers]) -> ChoiceAnswers:
    """Several tasks as one, each a stratum; curves are kept if all tasks have the same number of members."""
    width = max(part.loglikelihoods.shape[1] for part in parts)
    count = len(parts[0].running)
    same = all(len(part.running) == count for part in parts)
    first = replace(parts[0], task=name)  # what is not overwritten below is the same for all
    padded = [_padded(part, width) for part in parts]
    loglikelihoods = np.concatenate([part.loglikelihoods for part in padded])
    return replace(
        first,
        **_joined(parts),
        loglikelihoods=loglikelihoods,
        running=np.concatenate([part.running for part in padded], axis=1) if same else loglikelihoods[None],
        members=np.concatenate([part.members for part in padded], axis=1) if same else loglikelihoods[None],
        gold=np.concatenate([part.gold for part in parts]),
        correct=np.concatenate([part.correct for part in parts]),
        choices=sum((part.choices for part in parts), ()),
        tokens=np.concatenate([part.tokens for part in parts]),
        token_gap=np.concatenate([part.token_gap for part in parts]),
        least_gap=min(part.least_gap for part in parts),
    )


def _joined(parts: Sequence[Answers]) -> dict[str, Any]:
    offsets = np.cumsum([0, *(int(part.clusters.max()) + 1 for part in parts)])
    return {
        "doc_ids": np.concatenate([part.doc_ids for part in parts]),
        "doc_hashes": sum((part.doc_hashes for part in parts), ()),
        "request_hashes": sum((part.request_hashes for part in parts), ()),
        "clusters": np.concatenate([part.clusters + offset for part, offset in zip(parts, offsets, strict=False)]),
        "strata": np.repeat(np.arange(len(parts)), [len(part.doc_ids) for part in parts]),
        "subjects": tuple(part.task for part in parts),
        "cluster_keys": sum((part.cluster_keys for part in parts), ()),
        "prompts": sum((part.prompts for part in parts), ()),
        "targets": sum((part.targets for part in parts), ()),
        "truncated": np.concatenate([part.truncated for part in parts]),
        "recorded": all(part.recorded for part in parts),
        "scores": {
            name: np.concatenate([part.scores[name] for part in parts])
            for name in parts[0].scores
            if all(name in part.scores for part in parts)
        },
        "scored": tuple(name for name in parts[0].scored if all(name in part.scored for part in parts)),
    }


def _padded(part: ChoiceAnswers, width: int) -> ChoiceAnswers:
    def wider(array: Floats) -> Floats:
        missing = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
        return np.pad(array, missing, constant_values=-np.inf)

    return replace(
        part,
        loglikelihoods=wider(part.loglikelihoods),
        running=wider(part.running),
        members=wider(part.members),
    )
