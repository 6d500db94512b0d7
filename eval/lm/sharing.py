"""Requests split over processes, each of which holds a whole model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from lm_eval.api.instance import Instance

from pipeline.errors import UserError

Answer = TypeVar("Answer")


def shared_answers(
    answers: Callable[[list[Instance], bool], Sequence[Answer]],
    requests: list[Instance],
    disable_tqdm: bool,
    group: dist.ProcessGroup | None,
) -> list[Answer]:
    """All answers, each computed by one of the group's processes; all of them here where there is no group.

    lm-eval's own split needs accelerate, repeats requests to even the ranks out, returns samples out of order and fails
    on tasks with fewer documents than ranks.

    Raises:
        UserError: of any process, in all of them: the others would wait for its answers.
    """
    if group is None:
        return list(answers(requests, disable_tqdm))
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    indices = share(requests, rank, ranks)
    mine: list[tuple[int, Answer]] = []
    problem: UserError | None = None
    try:
        found = answers([requests[index] for index in indices], disable_tqdm or rank != 0) if indices else []
        mine = list(zip(indices, found, strict=True))
    except UserError as error:
        problem = error
    gathered: list[tuple[list[tuple[int, Answer]], UserError | None]] = [([], None) for _ in range(ranks)]
    dist.all_gather_object(gathered, (mine, problem), group=group)
    for _, other in gathered:
        if other is not None:
            raise other
    return [answer for _, answer in sorted(itertools.chain(*(part for part, _ in gathered)), key=lambda pair: pair[0])]


def total(number: int, group: dist.ProcessGroup | None) -> int:
    """The sum of every process's number; every process calls this."""
    if group is None:
        return number
    numbers = [0] * dist.get_world_size(group)
    dist.all_gather_object(numbers, number, group=group)
    return sum(numbers)


def share(requests: list[Instance], rank: int, ranks: int) -> list[int]:
    """Indices of the requests that this rank answers.

    Documents are dealt out in turn. A document's requests stay together, for they share their context, and so do equal
    documents: a request that two ranks answer beside other neighbours would have two answers, in their last bits.
    """
    owners: dict[str, int] = {}
    mine = []
    for _, grouped in itertools.groupby(
        range(len(requests)), key=lambda i: (requests[i].task_name, requests[i].doc_id)
    ):
        indices = list(grouped)
        if owners.setdefault(repr(requests[indices[0]].args), len(owners)) % ranks == rank:
            mine += indices
    return mine
