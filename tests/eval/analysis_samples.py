"""Samples as ``eval/run.py`` keeps them, of random members: what lm-eval writes, with our records."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import logsumexp

MOST_CHOICES = 4


def choice_samples(
    documents: int,
    members: int,
    seed: int,
    metrics: tuple[str, ...] = ("acc",),
    choices: int = MOST_CHOICES,
    fewer: bool = True,
    records: bool = True,
    clusters: int | None = None,
    sharpness: float = 1.0,
) -> list[dict[str, Any]]:
    """Multiple choice: members scatter around a truth from which the right choice is drawn.

    Args:
        documents: D.
        members: N.
        seed: of all draws.
        metrics: lm-eval's, of ``acc``, ``acc_norm``, ``f1``, ``mcc``.
        choices: C.
        fewer: let documents have 2..C choices.
        records: as in fast mode; without, as in exact mode.
        clusters: names for documents that share a text; None: independent.
        sharpness: above 1 the members are over-confident.
    """
    draw = np.random.default_rng(seed)
    samples = []
    for number in range(documents):
        count = int(draw.integers(2, choices + 1)) if fewer else choices
        truth = draw.normal(scale=1.5, size=count)
        truth -= logsumexp(truth)
        gold = int(draw.choice(count, p=np.exp(truth) / np.exp(truth).sum()))
        each = sharpness * (truth + draw.normal(scale=0.7, size=(members, count))) - draw.uniform(1, 30)
        running = logsumexp(each, axis=0)[None] - np.log(members) if members == 1 else _running(each)
        answer = running[-1]
        picked = int(np.argmax(answer))
        values = {"acc": float(picked == gold), "acc_norm": float(draw.random() < 0.5)}
        pairs = {name: (gold, picked) for name in ("f1", "mcc")}
        sample = {
            "doc_id": number,
            "doc": {"question": f"question {number}"},
            "target": gold,
            "arguments": [(f"question {number}\nAnswer:", f" choice {place}") for place in range(count)],
            "resps": [[(float(answer[place]), False)] for place in range(count)],
            "filtered_resps": [(float(answer[place]), False) for place in range(count)],
            "filter": "none",
            "metrics": list(metrics),
            "doc_hash": f"document-{seed}-{number}",
            "prompt_hash": f"prompt-{seed}-{number}",
            "target_hash": str(gold),
            "lora_dropout": {
                "gold": gold,
                "request_hash": f"request-{seed}-{number}",
                "cluster": None if clusters is None else f"text {number % clusters}",
                "requests": [
                    {
                        "running": [float(x) for x in running[:, place]],
                        "members": [float(x) for x in each[:, place]],
                        "greedy": False,
                        "tokens": 2,
                        "truncated": 3 if number == 0 else 0,
                        "least_gap": 0.0,
                    }
                    for place in range(count)
                ]
                if records
                else [],
            },
        }
        sample.update({name: {**values, **pairs}[name] for name in metrics})
        samples.append(sample)
    return samples


def _running(each: np.ndarray) -> np.ndarray:
    """Averages of probabilities of the first 1..N members."""
    return np.array([logsumexp(each[:n], axis=0) - np.log(n) for n in range(1, len(each) + 1)])
