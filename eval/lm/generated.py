"""The record of a generated answer, from the decoder's steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from eval.lm.decode import Step
from eval.lm.records import GeneratedRecord


def generated_record(
    steps: Sequence[Step], row: int, text: str, tokenizer: PreTrainedTokenizerBase, truncated: int
) -> GeneratedRecord:
    """One row of a decoded batch.

    Args:
        steps: of the batch; the row may have been finished before the last.
        row: in the batch.
        text: lm-eval's answer, without stop strings.
        tokenizer: that decodes the tokens.
        truncated: tokens that the prompt lost.
    """
    tokens = [int(step.tokens[row]) for step in steps]
    starts = token_starts(tokens, text, tokenizer)
    used = steps[: len(starts)]
    running = torch.stack([step.running[:, row] for step in used]).cpu().double()  # (T, N)
    members = torch.stack([step.members[:, row] for step in used]).cpu().double()
    return GeneratedRecord(
        text=text,
        running=running.sum(dim=0).tolist(),
        members=members.sum(dim=0).tolist(),
        token_logprobs=running[:, -1].tolist(),
        token_starts=starts,
        total_entropy=float(torch.stack([step.total_entropy[row] for step in used]).double().mean()),
        expected_entropy=float(torch.stack([step.expected_entropy[row] for step in used]).double().mean()),
        truncated=truncated,
    )


def token_starts(tokens: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where in ``text`` each token begins, up to the one in which it ends; an empty text keeps the first token."""
    starts = [0]
    while len(starts) < len(tokens):
        start = len(tokenizer.decode(tokens[: len(starts)], skip_special_tokens=True))
        if start >= len(text):
            break
        starts.append(start)
    return starts
