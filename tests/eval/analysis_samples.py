"""Samples as ``eval/run.py`` keeps them, of members that are given or random: what lm-eval writes, with our records.

Legend: D documents, N members, C choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import logsumexp


def choice_samples(
    documents: int,
    members: int,
    seed: int,
    metrics: tuple[str, ...] = ("acc",),
    choices: int = 4,
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
        metrics: see :func:`choice_sample`.
        choices: C.
        fewer: let documents have 2..C choices.
        records: see :func:`choice_sample`.
        clusters: texts that the documents share; None: independent.
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
        cluster = None if clusters is None else f"text {number % clusters}"
        norm_right = bool(draw.random() < 0.5)
        samples.append(
            choice_sample(
                number,
                each,
                gold,
                metrics,
                records,
                cluster,
                seed=str(seed),
                norm_right=norm_right,
                shortened=number == 0,
            )
        )
    return samples


def choice_sample(
    number: int,
    members: np.ndarray,
    gold: int,
    metrics: tuple[str, ...] = ("acc",),
    records: bool = True,
    cluster: str | None = None,
    seed: str = "",
    norm_right: bool = False,
    shortened: bool = False,
) -> dict[str, Any]:
    """One document, answered by the mean of the members' probabilities.

    Args:
        number: the document's.
        members: ``(N, C)`` log-likelihoods.
        gold: the right choice.
        metrics: lm-eval's, of ``acc``, ``acc_norm``, ``f1``, ``mcc``.
        records: as in mode fast; without, as in mode exact.
        cluster: the text that it shares.
        seed: goes into the hashes.
        norm_right: the value of ``acc_norm``.
        shortened: its prompt lost three tokens.
    """
    running = np.array([logsumexp(members[:n], axis=0) - np.log(n) for n in range(1, len(members) + 1)])
    answer = [float(value) for value in running[-1]]
    picked = int(np.argmax(answer))
    values = {
        "acc": float(picked == gold),
        "acc_norm": float(norm_right),
        "f1": (gold, picked),
        "mcc": (gold, picked),
    }
    return {
        "doc_id": number,
        "doc": {"question": f"question {number}"},
        "target": gold,
        "arguments": [(f"question {number}\nAnswer:", f" choice {place}") for place in range(len(answer))],
        "resps": [[(value, False)] for value in answer],
        "filtered_resps": [(value, False) for value in answer],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": f"document {seed} {number}",
        "prompt_hash": f"prompt {seed} {number}",
        "target_hash": str(gold),
        **{name: values[name] for name in metrics},
        "lora_dropout": {
            "gold": gold,
            "request_hash": f"request {seed} {number}",
            "cluster": cluster,
            "requests": [
                {
                    "running": running[:, place].tolist(),
                    "members": members[:, place].tolist(),
                    "greedy": False,
                    "tokens": 1,
                    "truncated": 3 if shortened else 0,
                    "least_gap": 0.0,
                }
                for place in range(len(answer))
            ]
            if records
            else [],
        },
    }


def generation_sample(
    number: int, text: str, answer: str, right: bool, logprobs: list[float], starts: list[int]
) -> dict[str, Any]:
    """One generated text, by one model.

    Args:
        number: the document's.
        text: as generated.
        answer: what its filter took out of it.
        right: exact match.
        logprobs: ``(T,)`` of its tokens.
        starts: ``(T,)`` characters at which they begin.
    """
    return {
        "doc_id": number,
        "doc": {},
        "target": "the target",
        "arguments": [(f"prompt {number}", {"until": ["."]})],
        "resps": [[text]],
        "filtered_resps": [answer],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": f"document {number}",
        "exact_match": float(right),
        "lora_dropout": {
            "gold": None,
            "request_hash": f"request {number}",
            "cluster": None,
            "requests": [
                {
                    "text": text,
                    "running": [sum(logprobs)],
                    "members": [sum(logprobs)],
                    "token_logprobs": list(logprobs),
                    "token_starts": list(starts),
                    "total_entropy": 0.7 if logprobs else 0.0,
                    "expected_entropy": 0.5 if logprobs else 0.0,
                    "truncated": 0,
                }
            ],
        },
    }
