"""Mode fast and exact at the edges: long texts, numbers that are not finite, memory that is short."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fast_support import PAIRS, assert_close, fast, masked, records_of, scored
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from tiny_models import (
    CONTEXT,
    counted_calls,
    questions,
    requests_of,
    sentence,
)
from transformers import PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.members import OneModel
from eval.lm.store import AnswerStore
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout


def test_rolling_is_stock_lm_evals(model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts of several windows, of one token, and none."""
    draw = random.Random(4)
    texts = [(sentence(draw, least, least),) for least in (90, 3, 40, 200, 1)] + [("",)]
    requests = requests_of("loglikelihood_rolling", texts)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood_rolling(requests, True)
    assert_close(fast(model, tokenizer).loglikelihood_rolling(requests, True), stock)
    members = masked(dropout)
    whole = fast(model, tokenizer, members)
    in_parts = fast(model, tokenizer, members, tokens_per_pass=50)
    exact = EnsembleLM(model, tokenizer, batch_size=2, members=members)
    totals = [lm.loglikelihood_rolling(requests, True) for lm in (whole, in_parts, exact)]
    assert_close(totals[1], totals[0])
    assert_close(totals[2], totals[0])
    for (text,), record in zip(texts, records_of(whole), strict=True):
        assert record.tokens == len(whole.tok_encode(text)) and record.least_gap >= -1e-5
        assert record.running[0] == record.members[0]


def test_long_prompts_are_cut_and_counted(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Choices of different length lose different tokens on the left."""
    draw = random.Random(6)
    context = sentence(draw, 70, 70)
    pairs = [(context, " " + sentence(draw, count, count)) for count in (1, 2, 9, 30)] + [("She", " saw")]
    requests = requests_of("loglikelihood", pairs)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    lm = fast(model, tokenizer)
    records = scored(lm, pairs)
    assert_close([record.running[-1] for record in records], [score for score, _ in stock])
    lengths = [sum(map(len, lm._encode_pair(*pair))) for pair in pairs]
    assert [record.truncated for record in records] == [max(0, length - CONTEXT - 1) for length in lengths]
    assert len({record.truncated for record in records}) == 5


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_continuation_longer_than_the_context_is_refused(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, mode: str
) -> None:
    long = " " + " ".join(["river"] * (CONTEXT + 1))
    lm = EnsembleLM(model, tokenizer, batch_size=1, mode=mode)
    with pytest.raises(UserError) as error:
        lm.loglikelihood(requests_of("loglikelihood", [("She", " saw"), ("The", long)], "long_words"), True)
    tokens = len(lm._encode_pair("The", long)[1])
    assert f"task long_words, document 1: a text to be scored has {tokens} tokens, but the base's context is 64" in str(
        error.value
    )


def test_nothing_asked_is_nothing_answered(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = fast(model, tokenizer)
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


@contextmanager
def broken(model: PeftModel, value: float) -> Iterator[None]:
    """One weight of the base is not finite."""
    weight = model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight
    before = weight.data[3, 5].item()
    weight.data[3, 5] = value
    try:
        yield
    finally:
        weight.data[3, 5] = before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("members", [0, 2])
@pytest.mark.parametrize("stored", [False, True])
def test_scores_that_are_not_finite_stop_the_evaluation(
    model: PeftModel,
    dropout: LoraDropout,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Any,
    value: float,
    kind: str,
    mode: str,
    members: int,
    stored: bool,
) -> None:
    """With the task and the document, and without an answer on disk."""
    arguments: dict[str, list[Any]] = {
        "loglikelihood": [("She", " saw her"), ("The old", " dog")],
        "loglikelihood_rolling": [("the old river",), ("her dog",)],
        "generate_until": [("She", {"until": ["."], "max_gen_toks": 3}), ("The old", {"until": [], "max_gen_toks": 3})],
    }
    store = AnswerStore.open(tmp_path, {}) if stored else None
    averaged = masked(dropout, instances=members) if members else OneModel()
    lm = EnsembleLM(model, tokenizer, batch_size=1, members=averaged, mode=mode, store=store)
    with broken(model, value), pytest.raises(UserError, match=r"task nan_task, document \d: .*not a finite number"):
        getattr(lm, kind)(requests_of(kind, arguments[kind], "nan_task"))
    assert store is None or (len(store) == 0 and not list(tmp_path.rglob("*.jsonl")))
    assert lm.records == {}
    getattr(lm, kind)(requests_of(kind, arguments[kind], "nan_task"))  # the same object, once the weight is right


# Memory


@contextmanager
def memory(model: PeftModel, fits: Callable[[int, int], bool], calls: list[tuple[int, int]]) -> Iterator[None]:
    """A device on which only passes of some (rows, tokens) fit; ``calls``: those that did."""

    def allocate(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        rows, tokens = arguments[0].shape
        if not fits(rows, tokens):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        calls.append((rows, tokens))

    hook = model.get_input_embeddings().register_forward_pre_hook(allocate)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("most", [200, 80, 40])
def test_members_then_rows_are_chunked_where_memory_is_short(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase, most: int
) -> None:
    expected = scored(fast(model, tokenizer, masked(dropout)))
    calls: list[tuple[int, int]] = []
    with memory(model, lambda rows, tokens: rows * tokens <= most, calls):
        found = scored(fast(model, tokenizer, masked(dropout)))
    assert_close([s for r in found for s in r.running], [s for r in expected for s in r.running])
    assert max(rows * tokens for rows, tokens in calls) > most / 2, "no smaller than needed"


def test_a_beginning_that_does_not_fit_is_not_kept(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = [pair for number, pair in enumerate(questions(3, 24, 30)) if number // 4 % 4]
    lm = fast(model, tokenizer, masked(dropout))
    calls: list[tuple[int, int]] = []
    stop = counted_calls(model, calls)
    expected = scored(lm, pairs)
    stop()
    beginning = calls[5]  # after five of the test on random tokens
    assert beginning[0] == 4
    again: list[tuple[int, int]] = []
    with memory(model, lambda rows, tokens: (rows, tokens) != beginning, again):
        found = scored(fast(model, tokenizer, masked(dropout)), pairs)
    assert_close([s for r in found for s in r.running], [s for r in expected for s in r.running])
    assert sum(r * t for r, t in again) > 2 * sum(r * t for r, t in calls), "rows were run whole"


def test_one_row_of_one_member_that_does_not_fit_is_out_of_memory(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase
) -> None:
    with memory(model, lambda rows, tokens: tokens <= 30, []), pytest.raises(torch.OutOfMemoryError):
        scored(fast(model, tokenizer, masked(dropout)))


@pytest.mark.usefixtures("frozen_heap")
def test_the_automatic_batch_size_counts_members(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase
) -> None:
    """lm-eval's search, in mode exact; mode fast does not search on a CPU, where memory does not run out."""
    calls: list[tuple[int, int]] = []
    lm = EnsembleLM(model, tokenizer, batch_size="auto", members=masked(dropout))
    lm.max_batch_size = 3  # the search begins with 64 requests and takes a tenth away each time
    with memory(model, lambda rows, _: rows <= 10, calls):
        found = lm.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    assert max(rows for rows, _ in calls) == 8, "2 requests of 4 members"
    assert all(rows % 4 == 0 for rows, _ in calls)
    expected = scored(fast(model, tokenizer, masked(dropout)))
    assert_close([score for score, _ in found], [record.running[-1] for record in expected])
    prompts = [(context, {"until": ["."], "max_gen_toks": 2}) for context, _ in PAIRS[:8]]
    calls.clear()
    with memory(model, lambda rows, _: rows <= 10, calls):
        texts = lm.generate_until(requests_of("generate_until", prompts), disable_tqdm=True)
    assert max(rows for rows, _ in calls) == 8
    assert texts == fast(model, tokenizer, masked(dropout)).generate_until(requests_of("generate_until", prompts), True)
    with memory(model, lambda rows, _: rows <= 3, []), pytest.raises(torch.OutOfMemoryError):
        lm.generate_until(requests_of("generate_until", prompts), disable_tqdm=True)
