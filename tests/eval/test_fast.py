"""Mode fast: shared tokens, members in rows and chunks, against stock lm-eval and against every member run alone.

Tolerances: float32 scores are equal within 1e-5 * (1 + |score|); scores are of the order of 30 nats.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from fast_support import PAIRS, assert_close, fast, masked, pair_tokens, records_of, scored
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
    tiny_model,
    with_adapter,
)
from transformers import PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.attention import why_separate
from eval.lm.records import ScoredRecord
from pipeline.base import load_base
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe.schema import Base

SEPARATE = {
    "llama, dynamic": "its rotary embedding depends on the length",
    "phi3, longrope": "its rotary embedding depends on the length",
    "mistral, window": "attend to the last 7 tokens only",
    "gemma2": "attend to the last 7 tokens only",
    "bloom": "its forward takes no position_ids",
    "mpt": "its forward takes no position_ids",
}


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
    """Against stock at batch size 1, with how far stock at batch size 8 is from itself: largest difference, in nats,
    and flipped choices of 7 questions. Trained pocket adapter, 60 questions of pocket_choice, AVX512-BF16:
    float32 7e-6 (stock with itself at batch size 32: 4e-6), bfloat16 0.085 (0.078), nf4 0.078 (0.063), no choice
    flipped; this random model has logits of a hundred."""
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
