"""Synthetic analyses in the shape of ``eval/analysis/schema.py``: simulated answers, measured in the simplest way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest

QUESTION = "Question: which of these is a property of sample {n}?\n" + "It has colour and weight. " * 6 + "\nAnswer:"


def estimate(value: float, spread: float, higher: bool | None, percent: bool = False) -> dict[str, Any]:
    """A score with an interval of this half width."""
    return {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "interval": "bootstrap, 2,000 draws",
        "higher_is_better": higher,
        "percent": percent,
    }


def share(right: int, documents: int) -> dict[str, Any]:
    """A proportion with its Wilson interval."""
    interval = binomtest(right, documents).proportion_ci(0.95, method="wilson")
    ends = {"low": float(interval.low), "high": float(interval.high), "interval": "Wilson"}
    return estimate(right / documents, 0, True, percent=True) | ends


def bins_of(confidence: np.ndarray, correct: np.ndarray, count: int = 15) -> list[dict[str, Any]]:
    """Equal-width bins with documents."""
    place = np.minimum((confidence * count).astype(int), count - 1)
    found = []
    for k in range(count):
        inside = place == k
        if inside.any():
            n, right = int(inside.sum()), int(correct[inside].sum())
            of = share(right, n)
            found.append(
                {
                    "low": k / count,
                    "high": (k + 1) / count,
                    "count": n,
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": of["value"],
                    "accuracy_low": of["low"],
                    "accuracy_high": of["high"],
                }
            )
    return found


def plug_in_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """15 equal bins."""
    place = np.minimum((confidence * 15).astype(int), 14)
    return float(np.abs(np.bincount(place, weights=correct - confidence, minlength=15)).sum()) / len(correct)


def ece_of(confidence: np.ndarray, correct: np.ndarray, noise: np.random.Generator) -> dict[str, float]:
    """15 equal bins, against draws of a calibrated model."""
    value = plug_in_ece(confidence, correct)
    draws = [plug_in_ece(confidence, noise.random(len(correct)) < confidence) for _ in range(60)]
    return {
        "value": value,
        "debiased_squared": value**2 - 0.0004,
        "band_low": float(np.quantile(draws, 0.025)),
        "band_high": float(np.quantile(draws, 0.975)),
        "p_value": (1 + sum(draw >= value for draw in draws)) / 61,
    }


def risk_coverage_of(confidence: np.ndarray, correct: np.ndarray) -> list[tuple[float, float]]:
    """At most 100 points."""
    order = np.argsort(-confidence, kind="stable")
    risks = np.cumsum(~correct[order]) / np.arange(1, len(order) + 1)
    chosen = np.unique(np.linspace(0, len(order) - 1, min(100, len(order))).astype(int))
    return [((int(i) + 1) / len(order), float(risks[i])) for i in chosen]


def scores_of(logits: np.ndarray, gold: np.ndarray, noise: np.random.Generator) -> dict[str, Any]:
    """The metrics of choices ``(D, C)``, with their bins and curves."""
    logp = log_softmax(logits, axis=1)
    confidence, correct = np.exp(logp.max(axis=1)), logits.argmax(axis=1) == gold
    nll = -logp[np.arange(len(gold)), gold]
    temperatures = np.linspace(0.4, 4, 37)
    scaled = [-log_softmax(logits / t, axis=1)[np.arange(len(gold)), gold] for t in temperatures]
    best = min(range(len(temperatures)), key=lambda k: float(scaled[k].mean()))
    ranks = np.argsort(np.argsort(confidence)) + 1.0
    right, wrong = int(correct.sum()), int((~correct).sum())
    half = 1.96 / math.sqrt(len(gold))
    auroc = (ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong) if right and wrong else None
    risks = risk_coverage_of(confidence, correct)
    brier = float(((confidence - correct) ** 2).mean())
    metrics = {
        "acc": share(right, len(gold)),
        "nll": estimate(float(nll.mean()), half * float(nll.std()), False),
        "calibrated_nll": estimate(float(scaled[best].mean()), half * float(scaled[best].std()), False),
        "brier": estimate(brier, half * 0.2, False),
        "aurc": estimate(float(np.mean([risk for _, risk in risks])), 0.02, False),
        "overconfidence": estimate(float((confidence - correct).mean()), half * 0.45, None, percent=True),
    }
    if auroc is not None:
        metrics["auroc"] = estimate(float(auroc), 0.03, True)
    uncertainty = right * wrong / len(gold) ** 2
    return {
        "metrics": metrics,
        "ece": ece_of(confidence, correct, noise),
        "adaptive_ece": ece_of(confidence, correct, noise),
        "brier_parts": {
            "reliability": 0.01,
            "resolution": uncertainty + 0.01 - brier,
            "uncertainty": uncertainty,
            "within_bin": 0.0,
        },
        "temperature": {"folds": [float(temperatures[best]) + 0.01 * k for k in range(5)]},
        "bins": bins_of(confidence, correct),
        "risk_coverage": risks,
        "mistakes": [
            {
                "doc_id": int(i),
                "prompt": QUESTION.format(n=i),
                "answer": f" choice {int(logits[i].argmax())}",
                "target": f" choice {int(gold[i])}",
                "confidence": float(confidence[i]),
            }
            for i in np.argsort(-confidence)
            if not correct[i]
        ][:20],
    }


def choice_analysis(
    seed: int, documents: int, choices: int = 2, members: int = 1, signal: float = 1.0, sharpness: float = 2.0
) -> dict[str, Any]:
    """An analysis of simulated multiple-choice answers; equal seeds are the same documents.

    Args:
        seed: of the documents.
        documents: D.
        choices: C.
        members: N; each adds its own noise to the logits.
        signal: how far the right choice stands out.
        sharpness: factor on the logits: more is over-confident.
    """
    noise = np.random.default_rng(seed)
    gold = noise.integers(choices, size=documents)
    shared = noise.normal(size=(documents, choices)) + signal * np.eye(choices)[gold]
    own = noise.normal(size=(members, documents, choices)) * (0.8 if members > 1 else 0.6)
    logits = sharpness * (shared + own)
    running = np.cumsum(logits, axis=0) / np.arange(1, members + 1)[:, None, None]
    found = scores_of(running[-1], gold, noise)
    curve = []
    for n in range(members):
        logp = log_softmax(running[n], axis=1)
        correct = running[n].argmax(axis=1) == gold
        nll = -float(logp[np.arange(documents), gold].mean())
        ece = plug_in_ece(np.exp(logp.max(axis=1)), correct)
        curve.append({"members": n + 1, "scores": {"acc": float(correct.mean()), "nll": nll, "ece": ece}})
    probabilities = np.exp(log_softmax(logits, axis=2))
    mean = probabilities.mean(axis=0)
    total = float(-(mean * np.log(mean)).sum(axis=1).mean())
    expected = float(-(probabilities * np.log(probabilities)).sum(axis=2).mean())
    entropy = {"total": total, "expected": expected, "mutual_information": total - expected}
    gap = {"per_token": 0.0213, "least": -3.1e-7, "choice_level": 0.0041}
    return {
        "kind": "choice",
        "documents": documents,
        "clusters": documents,
        "strata": 1,
        "primary": "acc",
        "curve": curve,
        "entropy": entropy if members > 1 else None,
        "jensen": gap if members > 1 else None,
        **found,
    }


def generation_analysis(seed: int, documents: int, signal: float, members: int = 1) -> dict[str, Any]:
    """Of generated answers: exact match with its confidence, as if it were a choice of two."""
    found = choice_analysis(seed, documents, 2, members, signal)
    exact = found["metrics"].pop("acc")
    del found["metrics"]["calibrated_nll"]
    found["curve"] = [
        {"members": point["members"], "scores": {"nll": point["scores"]["nll"]}} for point in found["curve"]
    ]
    metrics = {"exact_match,strict": exact, **found["metrics"]}
    return found | {"kind": "generation", "primary": "exact_match,strict", "metrics": metrics, "temperature": None}


def rolling_analysis(perplexity: float, members: int = 1) -> dict[str, Any]:
    """Of whole articles."""
    curve = [
        {"members": n + 1, "scores": {"word_perplexity": perplexity * (1 + 0.2 / (n + 1))}} for n in range(members)
    ]
    bits = math.log2(perplexity) / 5.6
    return {
        "kind": "rolling",
        "documents": 62,
        "clusters": 62,
        "strata": 1,
        "primary": "word_perplexity",
        "metrics": {
            "word_perplexity": estimate(perplexity, 0.6, False),
            "bits_per_byte": estimate(bits, 0.01, False),
        },
        "curve": curve,
        "jensen": {"per_token": 0.03, "least": -1e-7, "choice_level": None} if members > 1 else None,
    }


SIMULATED = {  # signal, sharpness, members
    "base": (0.3, 1.0, 1),
    "deterministic": (1.3, 3.0, 1),
    "mc_dropout": (1.25, 2.4, 8),
    "deep_ensemble": (1.35, 2.0, 3),
    "ensemble": (1.35, 1.6, 8),
}
"""By system."""


def analyses_of(system: str) -> dict[str, Any]:
    """By task and group: what a full run with all kinds of tasks would hold."""
    signal, sharpness, members = SIMULATED[system]
    found = {
        "sst2": choice_analysis(1, 872, 2, members, signal, sharpness),
        "rte": choice_analysis(2, 277, 2, members, 0.4 * signal, 0.8 * sharpness),
        "arc_easy": choice_analysis(3, 570, 4, members, signal, 0.6 * sharpness),
        "mmlu": choice_analysis(4, 900, 4, members, 0.6 * signal, sharpness) | {"strata": 3},
        "mmlu_law": choice_analysis(5, 400, 4, members, 0.6 * signal, sharpness),
        "mmlu_anatomy": choice_analysis(6, 300, 4, members, 0.6 * signal, sharpness),
        "mmlu_physics": choice_analysis(7, 200, 4, members, 0.6 * signal, sharpness),
        "gsm8k": generation_analysis(8, 200, 0.5 * signal, members),
        "wikitext": rolling_analysis(24.0 - 2 * signal, members),
    }
    found["rte"]["notes"] = ["3 of 277 prompts lost tokens on their left: they are longer than the model's context."]
    return found
