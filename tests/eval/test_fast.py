"""Mode fast: shared tokens, members in rows and chunks, against stock lm-eval and against every member run alone.

Tolerances: float32 scores are equal within 1e-5 * (1 + |score|); scores are of the order of 30 nats.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from peft import AdaLoraConfig, PeftModel, get_peft_model
from tiny_models import (
    CONFIGS,
    CONTEXT,
    averaged,
    counted_calls,
    naive_logits,
    naive_scores,
    questions,
    requests_of,
    sentence,
    tiny_model,
    with_adapter,
)
from transformers import PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.attention import why_separate
from eval.lm.batches import generation_keys
from eval.lm.members import MaskedMembers, Members, OneModel
from eval.lm.records import GeneratedRecord, ScoredRecord
from eval.lm.store import AnswerStore
from pipeline.base import load_base
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Base, Ensemble

PAIRS = [*questions(3, 7), ("She", " saw"), ("The old", " dog walked"), ("", "old river")]
TOLERANCE = 1e-5
SEPARATE = {
    "llama, dynamic": "its rotary embedding depends on the length",
    "phi3, longrope": "its rotary embedding depends on the length",
    "mistral, window": "attend to the last 7 tokens only",
    "gemma2": "attend to the last 7 tokens only",
    "bloom": "its forward takes no position_ids",
    "mpt": "its forward takes no position_ids",
}


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


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return with_adapter(tiny_model("llama, grouped queries"))


@pytest.fixture(scope="module")
def dropout(model: PeftModel) -> LoraDropout:
    return LoraDropout(model, 0.5, 7)


def masked(dropout: LoraDropout, most: int | None = None, **ensemble: Any) -> MaskedMembers:
    return MaskedMembers(dropout, Ensemble(**{"instances": 4, **ensemble}), most)


# Architectures


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_is_shared_and_right_or_separate_and_right(
    kind: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One model against stock lm-eval, an ensemble of two against members alone. Worst seen: 5e-6 nats, 4e-7 of
    1 + |score|."""
    model = with_adapter(tiny_model(kind))
    requests = requests_of("loglikelihood", PAIRS)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    lm = fast(model, tokenizer)
    lm._max_length = CONTEXT  # not every configuration says it under a name that lm-eval knows
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert_close([score for score, _ in found], [score for score, _ in stock])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in stock]
    assert lm._scorer is not None
    reason = lm._scorer.separate
    assert (reason is None) if kind not in SEPARATE else (reason is not None and SEPARATE[kind] in reason)

    members = masked(LoraDropout(model, 0.5, 7), instances=2, average="probabilities")
    records = scored(fast(model, tokenizer, members), PAIRS[4:10])
    for (context, continuation), record in zip(PAIRS[4:10], records, strict=True):
        running, each, greedy = naive_scores(model, members, *lm._encode_pair(context, continuation))
        assert_close(record.running + record.members, running + each)
        assert record.greedy == greedy


def test_windows_matter_only_to_longer_texts() -> None:
    model = tiny_model("mistral, window")
    model.config.sliding_window = 30
    assert why_separate(model, 30) is None
    assert "attend to the last 30 tokens only, and a text has 31" in str(why_separate(model, 31))


def test_attention_that_takes_no_mask_of_ours_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(why_separate(model, 10))


def test_a_model_that_ignores_positions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = model.model.rotary_emb.forward

    def by_place(hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return forward(hidden, torch.arange(position_ids.shape[1])[None].expand_as(position_ids))

    monkeypatch.setattr(model.model.rotary_emb, "forward", by_place)
    assert why_separate(model, 10) == "its scores change when tokens are shared, in a test on random tokens"


# Against the definition


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_scores_curve_and_members_are_those_of_members_run_alone(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase, average: str, balanced: bool
) -> None:
    """And the Jensen gap of every token is not negative."""
    members = masked(dropout, average=average, balanced=balanced)
    lm = fast(model, tokenizer, members)
    for (context, continuation), record in zip(PAIRS, scored(lm), strict=True):
        tokens = pair_tokens(lm, (context, continuation))
        running, each, greedy = naive_scores(model, members, *tokens)
        assert_close(record.running + record.members, running + each)
        assert (record.greedy, record.tokens) == (greedy, len(tokens[1]))
        assert record.running[0] == record.members[0], "the curve begins with member 1"
        logits = naive_logits(model, members, tokens[0] + tokens[1][:-1])[:, len(tokens[0]) - 1 :]
        wanted = torch.tensor(tokens[1])[:, None]
        gaps = averaged(logits, average).gather(1, wanted) - logits.log_softmax(-1).gather(
            2, wanted.expand(4, -1, 1)
        ).mean(0)
        assert record.least_gap == pytest.approx(float(gaps.min()), abs=1e-5)
        assert record.least_gap >= -1e-5 and gaps.min() >= -1e-9
        assert record.running[-1] - sum(record.members) / 4 >= -1e-5 * record.tokens


def test_exported_members_score_alike(tokenizer: PreTrainedTokenizerBase) -> None:
    """Members as plain models: W + s B_hat A_hat, without peft and without our masks at work."""
    plain = tiny_model("llama")
    model = with_adapter(copy.deepcopy(plain))
    dropout = LoraDropout(model, 0.5, 7)
    records = scored(fast(model, tokenizer, masked(dropout, instances=3)), PAIRS[:8])
    for number in range(3):
        dense = copy.deepcopy(plain)
        for name, masks in dropout.layer_masks("ensemble", [(number,)]).items():
            layer = dropout.layers[name].layer
            a, b = layer.lora_A["default"].weight * masks.kept_in[0], layer.lora_B["default"].weight
            dense.get_submodule(name).weight.data += 8.0 / 4 * (b * masks.kept_out[0][:, None] @ a) / 0.5**2
        alone = HFLM(pretrained=dense, tokenizer=tokenizer, batch_size=1)
        expected = alone.loglikelihood(requests_of("loglikelihood", PAIRS[:8]), disable_tqdm=True)
        assert_close([record.members[number] for record in records], [score for score, _ in expected])


SETTINGS: list[dict[str, Any]] = [
    {"tokens_per_pass": 1},
    {"tokens_per_pass": 60},
    {"tokens_per_pass": 100_000},
    {"rows_per_pass": 1},
    {"rows_per_pass": 3},
    {"most": 1},
    {"most": 3, "tokens_per_pass": 500},
]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_scores_do_not_depend_on_how_they_are_computed(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase, average: str, balanced: bool
) -> None:
    """Tokens and rows of a pass, members of a pass, order, neighbours and padding. Worst seen: 5e-7 of 1 + |score|."""
    shape = {"average": average, "balanced": balanced}
    expected = scored(fast(model, tokenizer, masked(dropout, **shape)))

    def assert_equal(found: list[ScoredRecord], expected: list[ScoredRecord]) -> None:
        assert_close(
            [score for record in found for score in record.running + record.members],
            [score for record in expected for score in record.running + record.members],
        )
        assert [record.greedy for record in found] == [record.greedy for record in expected]

    for settings in SETTINGS:
        rows, most = settings.get("rows_per_pass"), settings.get("most")
        members = masked(dropout, most, rows_per_pass=rows, **shape)
        assert_equal(scored(fast(model, tokenizer, members, tokens_per_pass=settings.get("tokens_per_pass"))), expected)
    lm = fast(model, tokenizer, masked(dropout, **shape))
    order = random.Random(2).sample(range(len(PAIRS)), len(PAIRS))
    assert_equal(scored(lm, [PAIRS[at] for at in order]), [expected[at] for at in order])
    assert_equal([scored(lm, [pair])[0] for pair in PAIRS], expected)
    in_exact_mode = EnsembleLM(model, tokenizer, batch_size=2, members=masked(dropout, **shape))
    answers = in_exact_mode.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    assert_close([score for score, _ in answers], [record.running[-1] for record in expected])


def test_shared_tokens_are_computed_once_per_member(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = [pair for number, pair in enumerate(questions(3, 24, 30)) if number // 4 % 4]  # 18 after the same 30 words
    lm = fast(model, tokenizer, masked(dropout), tokens_per_pass=400)
    scored(lm, PAIRS[:1])  # the test on random tokens is done
    tokens = [lm._encode_pair(*pair) for pair in pairs]
    whole = 4 * sum(len(context + continuation) - 1 for context, continuation in tokens)
    calls: list[tuple[int, int]] = []
    stop = counted_calls(model, calls)
    scored(lm, pairs)
    stop()
    assert max(rows * tokens for rows, tokens in calls) <= 400
    assert sum(rows * tokens for rows, tokens in calls) < whole / 4


def test_single_token_choices_are_read_once_per_question(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = fast(model, tokenizer)
    context = lm.tok_encode("The old man went to the river")
    requests = [(None, context, [token]) for token in (20, 21, 22, 23)]
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    calls: list[tuple[int, int]] = []
    stop = counted_calls(model, calls)
    lm._loglikelihood_tokens(requests, disable_tqdm=True)
    stop()
    assert calls[-1] == (1, len(context)) and len(calls) == 1 + 5, "five of them test the model"


# Adapters on other layers, and other kinds of adapter


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["v_proj", "embed_tokens"]])
def test_an_adapter_on_the_head_or_the_embedding(tokenizer: PreTrainedTokenizerBase, targets: list[str]) -> None:
    model = with_adapter(tiny_model("llama"), target_modules=targets)
    members = masked(LoraDropout(model, 0.5, 7), instances=3)
    lm = fast(model, tokenizer, members)
    for pair, record in zip(PAIRS, scored(lm), strict=True):
        running, each, _ = naive_scores(model, members, *pair_tokens(lm, pair))
        assert_close(record.running + record.members, running + each)
    assert len({round(score, 4) for score in records_of(lm)[0].members}) == 3, "the masks act"


def pair_tokens(lm: EnsembleLM, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    """As lm-eval's ``loglikelihood`` splits them."""
    if pair[0]:
        return lm._encode_pair(*pair)
    tokens = lm.tok_encode(pair[1])
    return tokens[:1], tokens[1:]  # BOS is the context


def records_of(lm: EnsembleLM) -> list[ScoredRecord]:
    return [record for record in lm.records.values() if isinstance(record, ScoredRecord)]


def test_adalora(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=100, tinit=10, tfinal=10, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny_model("llama"), config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    members = masked(LoraDropout(model, 0.5, 7), instances=3)
    lm = fast(model, tokenizer, members)
    for pair, record in zip(PAIRS, scored(lm), strict=True):
        running, each, _ = naive_scores(model, members, *pair_tokens(lm, pair))
        assert_close(record.running + record.members, running + each)
    assert len({round(score, 4) for score in records_of(lm)[0].members}) == 3


# Other types of number: differences are of rounding, and are only bounded loosely


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bfloat16_and_4_bit_differ_by_rounding(
    tiny_base: Any, tokenizer: PreTrainedTokenizerBase, quantization: str
) -> None:
    """Against stock at batch size 1. Largest difference and flipped choices, of 7 questions of four: see the message;
    stock at batch size 8 differs from itself as much."""
    model = with_adapter(load_base(Base(model=str(tiny_base), quantization=quantization, dtype="bfloat16")))
    requests = requests_of("loglikelihood", PAIRS)
    alone, together = (
        [s for s, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=n).loglikelihood(requests, True)]
        for n in (1, 8)
    )
    found = [score for score, _ in fast(model, tokenizer).loglikelihood(requests, disable_tqdm=True)]

    def difference(left: list[float], right: list[float]) -> tuple[float, int]:
        pair = [torch.tensor(part) for part in (left, right)]
        choices = [part[:28].view(7, 4).argmax(dim=1) for part in pair]
        return float((pair[0] - pair[1]).abs().max()), int((choices[0] != choices[1]).sum())

    ours, stocks = difference(found, alone), difference(together, alone)
    print(f"{quantization}: fast against stock {ours}, stock at batch size 8 {stocks}")
    assert ours[0] < 2.0 and ours[1] <= 2


# Windows, truncation, bad input


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


def test_the_automatic_batch_size_counts_members(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase
) -> None:
    """lm-eval's search, in mode exact; mode fast does not search on a CPU, where memory does not run out."""
    calls: list[tuple[int, int]] = []
    lm = EnsembleLM(model, tokenizer, batch_size="auto", members=masked(dropout))
    lm.max_batch_size = 4  # the search begins with 64 requests and takes a tenth away each time
    with memory(model, lambda rows, _: rows <= 10, calls):
        found = lm.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    assert max(rows for rows, _ in calls) == 8, "2 requests of 4 members"
    assert all(rows % 4 == 0 for rows, _ in calls)
    expected = scored(fast(model, tokenizer, masked(dropout)))
    assert_close([score for score, _ in found], [record.running[-1] for record in expected])
    prompts = [(context, {"until": ["."], "max_gen_toks": 2}) for context, _ in PAIRS]
    calls.clear()
    with memory(model, lambda rows, _: rows <= 10, calls):
        texts = lm.generate_until(requests_of("generate_until", prompts), disable_tqdm=True)
    assert max(rows for rows, _ in calls) == 8
    assert texts == fast(model, tokenizer, masked(dropout)).generate_until(requests_of("generate_until", prompts), True)
    with memory(model, lambda rows, _: rows <= 3, []), pytest.raises(torch.OutOfMemoryError):
        lm.generate_until(requests_of("generate_until", prompts), disable_tqdm=True)


# Generation


def naive_answer(
    lm: EnsembleLM, prompt: list[int], until: list[str], most: int, choose: Callable[[torch.Tensor], int]
) -> tuple[list[int], str]:
    """Tokens and text of members that each run the whole sequence for every token."""
    written: list[int] = []
    text = ""
    while len(written) < most and not any(stop in text for stop in until):
        logits = naive_logits(lm.model, lm.members, prompt + written)[:, -1]
        written.append(choose(averaged(logits, lm.members.average)))
        if written[-1] == lm.tokenizer.eos_token_id:
            break
        text = lm.tokenizer.decode(written, skip_special_tokens=True)
    for stop in until:
        text = text.split(stop)[0]
    return written, text


def generated(lm: EnsembleLM, prompts: list[str], **arguments: Any) -> tuple[list[str], list[GeneratedRecord]]:
    given = {"until": ["\n\n"], "max_gen_toks": 8, **arguments}
    texts = lm.generate_until(requests_of("generate_until", [(prompt, dict(given)) for prompt in prompts]), True)
    return texts, [record for record in lm.records.values() if isinstance(record, GeneratedRecord)]


def greedy(scores: torch.Tensor) -> int:
    return int(scores.argmax())


PROMPTS = ["The old man went", "She", sentence(random.Random(1), 20, 20), sentence(random.Random(2), 60, 60)]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_generated_texts_are_those_of_members_run_alone(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase, average: str
) -> None:
    """Greedy, in batches with padding, one prompt longer than the context; and what the records say."""
    members = masked(dropout, instances=3, average=average)
    lm = fast(model, tokenizer, members)
    texts, records = generated(lm, PROMPTS)
    for prompt, text, record in zip(PROMPTS, texts, records, strict=True):
        tokens = lm.tok_encode(prompt)
        assert record.truncated == max(0, len(tokens) - (CONTEXT - 8))
        kept = tokens[-(CONTEXT - 8) :]
        written, expected = naive_answer(lm, kept, ["\n\n"], 8, greedy)
        assert text == record.text == expected
        running, each, _ = naive_scores(model, members, kept, written)
        assert len(record.token_logprobs) == len(record.token_starts) == 8
        assert_close(record.running + record.members, running + each)
        assert sum(record.token_logprobs) == pytest.approx(record.running[-1], abs=1e-6)
        assert record.running[0] == record.members[0]
        assert record.running[-1] - sum(record.members) / 3 >= -1e-5 * 8
        assert 0 <= record.expected_entropy <= record.total_entropy + 1e-5
        for at, start in enumerate(record.token_starts):
            assert text.startswith(tokenizer.decode(written[:at])) and start == len(tokenizer.decode(written[:at]))
    assert records[3].truncated > 0 and len(set(texts)) == 4
    for other in (
        EnsembleLM(model, tokenizer, batch_size=2, members=members),
        fast(model, tokenizer, masked(dropout, instances=3, average=average, rows_per_pass=2)),
        fast(model, tokenizer, members, batch_size=4),
    ):
        assert generated(other, PROMPTS)[0] == texts


def test_stop_strings(model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase) -> None:
    """Across the border of two tokens, within the first token, and where another prompt of the batch goes on."""
    members = masked(dropout, instances=3)
    lm = fast(model, tokenizer, members)
    written, free = naive_answer(lm, lm.tok_encode(PROMPTS[0]), [], 8, greedy)
    starts = generated(lm, PROMPTS[:1])[1][0].token_starts
    across = free[starts[3] - 1 : starts[3] + 1]
    first = tokenizer.decode(written[:1])
    for stop in (across, first.strip(), first.strip()[:1]):
        lm = fast(model, tokenizer, members)
        texts, records = generated(lm, PROMPTS, until=[stop, "\n\n"])
        for prompt, text, record in zip(PROMPTS, texts, records, strict=True):
            kept = lm.tok_encode(prompt)[-(CONTEXT - 8) :]
            assert text == naive_answer(lm, kept, [stop, "\n\n"], 8, greedy)[1]
            assert stop not in text and len(record.token_logprobs) >= 1
            assert all(start < len(text) for start in record.token_starts[1:]), "tokens after the text are left out"
        assert len(texts[0]) < len(free)


def test_an_end_at_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """The head is turned so that EOS is what members write first after one prompt."""
    model = with_adapter(tiny_model("llama"))
    members = masked(LoraDropout(model, 0.5, 7), instances=3)
    lm = fast(model, tokenizer, members, batch_size=2)
    states: list[torch.Tensor] = []
    head = model.get_base_model().lm_head
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0, -1]))
    naive_logits(model, members, lm.tok_encode("She"))
    hook.remove()
    direction = torch.stack(states).mean(0)
    head.weight.data[tokenizer.eos_token_id] = 50 * direction / direction.norm()
    texts, records = generated(lm, ["She", "The old man went"])
    assert texts[0] == records[0].text == "" and records[0].token_starts == [0]
    running, each, _ = naive_scores(model, members, lm.tok_encode("She"), [tokenizer.eos_token_id])
    assert_close(records[0].running + records[0].members, running + each)
    assert texts[1] == naive_answer(lm, lm.tok_encode("The old man went"), ["\n\n"], 8, greedy)[1]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_sampled_texts_are_those_of_members_run_alone(
    model: PeftModel, dropout: LoraDropout, tokenizer: PreTrainedTokenizerBase, average: str
) -> None:
    """With the seed of its own that a batch has, whatever was drawn before; repeats are drawn apart."""
    members = masked(dropout, instances=3, average=average)
    lm = fast(model, tokenizer, members, batch_size=1)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0}
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    texts, _ = generated(lm, prompts, **sampling)
    given = {"until": ["\n\n"], "max_gen_toks": 8, **sampling}
    keys = generation_keys(requests_of("generate_until", [(prompt, given) for prompt in prompts]))

    def draw(scores: torch.Tensor) -> int:
        return int(torch.multinomial((scores.float() / 0.7).softmax(-1), num_samples=1))

    for prompt, key, text in zip(prompts, keys, texts, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(int(key[:8], 16))
            assert text == naive_answer(lm, lm.tok_encode(prompt), ["\n\n"], 8, draw)[1]
    assert texts[0] != texts[1]
    before = torch.get_rng_state()
    assert generated(fast(model, tokenizer, members, batch_size=1), prompts, **sampling)[0] == texts
    assert torch.equal(torch.get_rng_state(), before), "no other random stream moves"
