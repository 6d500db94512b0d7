"""lm-eval's own batches of requests, and the keys under which their answers are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import Collator, normalize_gen_kwargs

from eval.lm.layout import truncated
from eval.lm.records import ScoredRecord
from eval.lm.store import request_key

TokenRequest = tuple[Any, list[int], list[int]]
"""lm-eval's: (texts, context tokens, continuation tokens)."""


def stock_record(request: TokenRequest, answer: tuple[float, bool], max_length: int) -> ScoredRecord:
    """lm-eval's answer of one model as a record."""
    cut, excess = truncated(request[1], request[2], max_length)
    score, greedy = answer
    return ScoredRecord([score], [score], greedy, len(cut.continuation), excess, least_gap=0.0)


def stock_batches(requests: list[TokenRequest], size: int, one_token_lookup: bool) -> list[list[int]]:
    """Indices of the requests in each batch of log-likelihoods.

    Args:
        requests: of a task or several.
        size: in contexts.
        one_token_lookup: whether requests that differ in their last token alone are one context (lm-eval's
            ``logits_cache``).
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        key = tuple(context + continuation[:-1]) if one_token_lookup else (index,)
        by_context.setdefault(key, []).append(index)
    numbered = [(index, context, continuation) for index, (_, context, continuation) in enumerate(requests)]
    collator = Collator(
        numbered,
        sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
        group_by="contexts" if one_token_lookup else None,
        group_fn=lambda request: request[1] + request[2][:-1],
    )
    batches = []
    for batch in collator.get_batched(n=size):
        contexts = [tuple(context + continuation[:-1]) for _, context, continuation in batch]
        keys = contexts if one_token_lookup else [(index,) for index, _, _ in batch]
        batches.append([index for key in keys for index in by_context[key]])
    return batches


def generation_batches(requests: list[Instance], tokens: Callable[[str], list[int]], size: int) -> list[list[int]]:
    """Indices of the requests in each batch of ``size`` prompts, in lm-eval's order; ``tokens``: of a prompt."""
    collator = Collator(
        [(*request.args, index) for index, request in enumerate(requests)],
        sort_fn=lambda request: (-len(tokens(request[0])), request[0]),
        group_by="gen_kwargs",
        group_fn=lambda request: request[1],
    )
    return [[index for *_, index in batch] for batch in collator.get_batched(n=size)]


def sampled(request: Instance) -> bool:
    """Whether its answer is drawn at random."""
    return bool(normalize_gen_kwargs(request.args[1], 1)["do_sample"])


def generation_keys(requests: list[Instance]) -> list[str]:
    """Of each request; repeats of a sampled one are told apart by their number."""
    seen: dict[str, int] = {}
    keys = []
    for request in requests:
        key = request_key("generate_until", *request.args)
        seen[key] = seen.get(key, -1) + 1
        keys.append(request_key("generate_until", *request.args, seen[key]))
    return keys


def batch_keys(keys: list[str], batches: list[list[int]]) -> list[str]:
    """Of each request together with its whole batch, which in mode exact changes its bits.

    Else an answer of another evaluation (of more tasks, fewer documents, other ranks) could stand in.
    """
    found = list(keys)
    for batch in batches:
        whole = [keys[index] for index in batch]
        for index in batch:
            found[index] = request_key("in a batch", keys[index], whole)
    return found
