"""The plan of forward passes: nothing is lost, asked twice, or shared that is not equal; limits hold."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval.lm.layout import (
    BRANCH_TOKENS,
    LEAST_PREFIX,
    Group,
    Request,
    Row,
    batches_of,
    groups_of,
    rows_of,
    separate_rows,
    truncated,
)

BLOCKS = [(1,) * 5, (1, 2, 1, 2, 1), (2,) * 5, (7,), ()]
contexts = st.lists(st.sampled_from(BLOCKS), min_size=0, max_size=6).map(lambda parts: (*chain(*parts), 9))
continuations = st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple)
requests_drawn = st.lists(st.builds(Request, contexts, continuations), max_size=25)
LONG = Request((9,), (1,) * (BRANCH_TOKENS + 30))


def asked_of(rows: list[Row]) -> dict[int, Request]:
    """What every request asks for, by where it stands in the rows; each stands once."""
    found: dict[int, Request] = {}
    for row in rows:
        assert len(row.continuations) == len(row.requests) == len(set(row.continuations))
        for continuation, indices in zip(row.continuations, row.requests, strict=True):
            for index in indices:
                assert index not in found, "asked twice"
                found[index] = Request(row.context, continuation)
    return found


@given(requests=requests_drawn)
@example(requests=[])
@example(requests=[Request((9,), (1,))] * 5)  # duplicates
@example(requests=[Request((1,) * n, (2,)) for n in range(1, 30)])  # contexts that are prefixes of each other
@example(requests=[LONG, Request((9,), (1,)), Request((9,), (2,) * 300), LONG, Request((9,), (3,))])
def test_rows_ask_for_every_request_once(requests: list[Request]) -> None:
    for rows in (rows_of(requests), separate_rows(requests)):
        assert asked_of(rows) == dict(enumerate(requests))
    for row in rows_of(requests):
        limit = max(BRANCH_TOKENS, 2 * len(row.context))
        assert len(row.continuations) == 1 or row.branch_tokens <= limit
    for row in separate_rows(requests):
        assert len(row.continuations) == 1 or {len(continuation) for continuation in row.continuations} == {1}


def test_whole_texts_after_the_first_token_are_rows_of_their_own() -> None:
    """The windows of a rolling task share their one token of context; one row of all texts would be quadratic."""
    texts = [Request((1,), (2, *range(number, number + 400))) for number in range(50)]
    assert [len(row.continuations) for row in rows_of(texts)] == [1] * 50
    choices = [Request(tuple(range(300)), (number,) * 60) for number in range(4)]
    (row,) = rows_of(choices)  # 236 tokens of branches after a context of 300: worth it
    assert len(row.continuations) == 4


@given(requests=requests_drawn, least_saving=st.sampled_from([0, 20, 60]))
@example(requests=[Request((1,) * 12, (2,))], least_saving=0)
@example(requests=[Request((1,) * n, (2,)) for n in range(1, 30)], least_saving=0)
def test_groups_share_what_they_say(requests: list[Request], least_saving: int) -> None:
    rows = rows_of(requests)
    groups = groups_of(rows, least_saving)
    assert asked_of(list(chain(*(group.rows for group in groups)))) == dict(enumerate(requests))
    for group in groups:
        assert group.rows
        (beginning,) = {row.context[: group.prefix] for row in group.rows}
        assert len(beginning) == group.prefix, "kept whole in every row"
        assert all(row.new_tokens(group.prefix) >= 1 for row in group.rows)
        assert all(len(row.context) > group.prefix for row in group.rows), "the last token of the context is run"
        if group.prefix:
            assert group.prefix >= LEAST_PREFIX
            assert (len(group.rows) - 1) * group.prefix >= least_saving
    assert sum(group.prefix == 0 for group in groups) <= 1


def common(drawn: list[tuple[int, ...]]) -> int:
    """Length of the common beginning."""
    length = 0
    while all(length < len(context) and context[length] == drawn[0][length] for context in drawn):
        length += 1
    return length


def best_saving(contexts: list[tuple[int, ...]]) -> int:
    """Over all partitions, of the tokens that common beginnings save."""
    if not contexts:
        return 0
    first, rest = contexts[0], contexts[1:]
    best = best_saving(rest)
    for chosen in range(1, 2 ** len(rest)):
        partners = [context for at, context in enumerate(rest) if chosen >> at & 1]
        prefix = min(common([first, *partners]), *(len(context) - 1 for context in [first, *partners]))
        if prefix >= LEAST_PREFIX:
            others = [context for at, context in enumerate(rest) if not chosen >> at & 1]
            best = max(best, len(partners) * prefix + best_saving(others))
    return best


@given(drawn=st.lists(contexts, max_size=6, unique=True))
def test_the_best_beginnings_are_chosen(drawn: list[tuple[int, ...]]) -> None:
    """But for a context that is itself the beginning of others, which costs each of them one token."""
    groups = groups_of([Row(context, [(1,)], [[at]]) for at, context in enumerate(drawn)], 0)
    saved = sum((len(group.rows) - 1) * group.prefix for group in groups)
    assert best_saving(drawn) - len(drawn) <= saved <= best_saving(drawn)


@given(
    requests=requests_drawn,
    tokens=st.integers(1, 80),
    most_rows=st.integers(1, 9),
    scored=st.integers(1, 30),
    whole=st.booleans(),
)
def test_batches_keep_their_limits(
    requests: list[Request], tokens: int, most_rows: int, scored: int, whole: bool
) -> None:
    for group in groups_of(rows_of(requests), 20):
        batches = batches_of(group, tokens, most_rows, scored, whole)
        assert asked_of(list(chain(*batches))) == asked_of(group.rows)
        widths = [max(row.new_tokens(group.prefix) for row in batch) for batch in batches]
        assert widths == sorted(widths, reverse=True), "what may not fit in memory comes first"
        for batch, width in zip(batches, widths, strict=True):
            columns = width if whole else max(1 + row.branch_tokens for row in batch)
            assert 1 <= len(batch) <= most_rows
            assert len(batch) == 1 or len(batch) * width <= tokens
            assert len(batch) == 1 or len(batch) * columns <= scored


@given(
    context=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    continuation=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    max_length=st.integers(12, 40),
)
def test_cut_as_lm_eval_cuts(context: list[int], continuation: list[int], max_length: int) -> None:
    request, lost = truncated(context, continuation, max_length)
    kept = (context + continuation)[-(max_length + 1) :]  # lm_eval/models/huggingface.py, _loglikelihood_tokens
    assert list(request.context + request.continuation) == kept
    assert list(request.continuation) == continuation and request.context
    assert lost == len(context) + len(continuation) - len(kept)
    assert request.length == len(kept[:-1]) <= max_length


PLANNED = """
import importlib.util, random, sys
spec = importlib.util.spec_from_file_location("layout", sys.argv[1])
layout = importlib.util.module_from_spec(spec)
sys.modules["layout"] = layout
spec.loader.exec_module(layout)
draw = random.Random(5)
beginning = tuple(draw.choices(range(5), k=40))
requests = []
for _ in range(300):
    context = beginning[: draw.randrange(1, 40)] + tuple(draw.choices(range(3), k=draw.randrange(1, 6)))
    requests.append(layout.Request(context, (draw.randrange(3),) * draw.randrange(1, 4)))
groups = layout.groups_of(layout.rows_of(requests), 100)
print([(group.prefix, layout.batches_of(group, 200, 16, 50)) for group in groups])
"""


def test_every_process_plans_alike(repository: Path) -> None:
    plans = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", PLANNED, str(repository / "eval" / "lm" / "layout.py")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout)
    assert plans[0] == plans[1] and plans[0].count("Row(") > 100


def test_many_requests_are_planned_quickly() -> None:
    """57 subjects of 5-shot questions with four choices: seconds, not minutes."""
    draw = random.Random(1)
    requests = []
    for _ in range(57):
        examples = tuple(draw.choices(range(30_000), k=600))
        for _ in range(40):
            context = examples + tuple(draw.choices(range(30_000), k=draw.randrange(20, 90)))
            requests += [Request(context, (letter,)) for letter in range(4)]
    groups = groups_of(rows_of(requests), 256)
    assert sorted(group.prefix for group in groups) == pytest.approx([600] * 57, abs=1)
    assert {len(group.rows) for group in groups} == {40}
    assert isinstance(groups[0], Group)
