"""Short names for evaluating a tiny model in mode fast, and for comparing scores."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from tiny_models import questions, requests_of
from transformers import PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.members import MaskedMembers, Members
from eval.lm.records import ScoredRecord
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Ensemble

PAIRS = [*questions(3, 7), ("She", " saw"), ("The old", " dog walked"), ("", "old river")]
TOLERANCE = 1e-5


def assert_close(found: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    """Relative to 1 + |score|."""
    pair = [torch.tensor(part, dtype=torch.float64) for part in (found, expected)]
    torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)


def fast(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, members: Members | None = None, **more: Any
) -> EnsembleLM:
    return EnsembleLM(model, tokenizer, **{"batch_size": 3, "members": members, "mode": "fast", **more})


def scored(lm: EnsembleLM, pairs: list[tuple[str, str]] = PAIRS) -> list[ScoredRecord]:
    """Records, whose last running score is lm-eval's answer."""
    found = lm.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    records = [lm.records["task", number, 0] for number in range(len(pairs))]
    assert [(record.running[-1], record.greedy) for record in records if isinstance(record, ScoredRecord)] == found
    return records


def masked(dropout: LoraDropout, most: int | None = None, **ensemble: Any) -> MaskedMembers:
    return MaskedMembers(dropout, Ensemble(**{"instances": 4, **ensemble}), most)


def pair_tokens(lm: EnsembleLM, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    """As lm-eval's ``loglikelihood`` splits them."""
    if pair[0]:
        return lm._encode_pair(*pair)
    tokens = lm.tok_encode(pair[1])
    return tokens[:1], tokens[1:]  # BOS is the context


def records_of(lm: EnsembleLM) -> list[ScoredRecord]:
    return [record for record in lm.records.values() if isinstance(record, ScoredRecord)]
