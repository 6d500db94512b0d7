"""The ensemble's decoding loop against N full passes of N dense models, without a cache and without padding."""

from __future__ import annotations

import math
import sys
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from eval.lm.average import RunningAverage
from eval.lm.decode import EnsembleDecoder
from eval.lm.members import MaskedMembers, OneModel, passes
from pipeline.errors import UserError
from pipeline.recipe.schema import Ensemble

PROMPTS = ["The old man went", "She", "In the morning the three children walked down to the river and"]
NEW_TOKENS = 8


def averaged(logits: torch.Tensor, average: str) -> torch.Tensor:
    """The definition: ``(N, V)`` logits to ``(V,)`` scores."""
    return logits.mean(0) if average == "logits" else logits.softmax(-1).mean(0).log()


def decoder_of(
    adapted: Any, record: bool = False, streamer: BaseStreamer | None = None, **ensemble: Any
) -> EnsembleDecoder:
    return EnsembleDecoder(MaskedMembers(adapted.dropout, Ensemble(**ensemble)), streamer=streamer, record=record)


def naive_tokens(adapted: Any, prompt: str, members: int, average: str, choose: Any) -> list[int]:
    """Decode one prompt with ``members`` dense models, each running the whole sequence at every step."""
    ids = adapted.tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(NEW_TOKENS):
        logits = torch.stack([adapted.dense_member(n)(ids).logits[0, -1] for n in range(members)])
        ids = torch.cat([ids, torch.tensor([[choose(ids, averaged(logits, average))]])], dim=1)
    return ids[0, -NEW_TOKENS:].tolist()


def generate(adapted: Any, decoder: EnsembleDecoder, prompts: list[str], **arguments: Any) -> torch.Tensor:
    """``(B, NEW_TOKENS)`` generated tokens; no stop at EOS unless asked for."""
    batch = adapted.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    arguments = {"max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "do_sample": False, **arguments}
    output = adapted.model.generate(**batch, custom_generate=decoder, **arguments)
    return output[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_greedy_equals_full_passes_of_dense_members(adapted: Any, average: str) -> None:
    decoder = decoder_of(adapted, instances=3, average=average)
    generated = generate(adapted, decoder, PROMPTS).tolist()
    expected = [naive_tokens(adapted, prompt, 3, average, lambda _, s: int(s.argmax())) for prompt in PROMPTS]
    assert generated == expected
    assert len({tuple(row) for row in generated}) > 1, "prompts that all continue alike would prove nothing"


def test_one_member_is_that_masked_model(adapted: Any) -> None:
    generated = generate(adapted, decoder_of(adapted, instances=1), PROMPTS[:1])
    ids = adapted.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    stock = adapted.dense_member(0).generate(ids, max_new_tokens=NEW_TOKENS, eos_token_id=-1, do_sample=False)
    assert generated[0].tolist() == stock[0, -NEW_TOKENS:].tolist()


def test_without_masks_the_loop_is_stock_greedy_search(adapted: Any) -> None:
    generated = generate(adapted, EnsembleDecoder(OneModel()), PROMPTS)
    batch = adapted.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    stock = adapted.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,
        do_sample=False,
    )
    assert generated.tolist() == stock[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("rows_per_pass", [1, 3, 4, 7])
def test_chunks_of_members_choose_the_same_tokens(adapted: Any, rows_per_pass: int) -> None:
    whole = generate(adapted, decoder_of(adapted, instances=4), PROMPTS)
    chunked = decoder_of(adapted, instances=4, rows_per_pass=rows_per_pass)
    assert generate(adapted, chunked, PROMPTS).tolist() == whole.tolist()


def test_sampling_draws_one_token_for_all_members(adapted: Any) -> None:
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0}  # generate's own default takes the 50 best only
    torch.manual_seed(11)
    generated = generate(adapted, decoder_of(adapted, instances=3), PROMPTS[:1], **sampling)

    def draw(_: torch.Tensor, scores: torch.Tensor) -> int:
        return int(torch.multinomial((scores / 0.7).softmax(-1)[None], num_samples=1))

    torch.manual_seed(11)
    assert generated[0].tolist() == naive_tokens(adapted, PROMPTS[0], 3, "logits", draw)
    torch.manual_seed(12)
    other = generate(adapted, decoder_of(adapted, instances=3), PROMPTS[:1], **sampling)
    assert other.tolist() != generated.tolist()


def test_processors_act_once_on_the_average(adapted: Any) -> None:
    decoder = decoder_of(adapted, instances=2)
    generated = generate(adapted, decoder, PROMPTS[2:], repetition_penalty=3.0)
    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    expected = naive_tokens(adapted, PROMPTS[2], 2, "logits", lambda ids, s: int(penalty(ids, s[None]).argmax()))
    assert generated[0].tolist() == expected
    plain = generate(adapted, decoder_of(adapted, instances=2), PROMPTS[2:])
    assert generated.tolist() != plain.tolist()


def test_finished_rows_are_padded(adapted: Any) -> None:
    free = generate(adapted, decoder_of(adapted, instances=2), PROMPTS).tolist()
    stop = free[0][2]
    stopped = generate(
        adapted,
        decoder_of(adapted, instances=2),
        PROMPTS,
        eos_token_id=stop,
        pad_token_id=3,
    ).tolist()
    for row, unstopped in zip(stopped, free, strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else len(row)
        assert row[:end] == unstopped[: len(row[:end])]
        assert set(row[end:]) <= {3}


def test_steps_record_the_averaged_and_each_members_probability(adapted: Any) -> None:
    decoder = EnsembleDecoder(
        MaskedMembers(adapted.dropout, Ensemble(instances=3, average="probabilities")), record=True
    )
    generated = generate(adapted, decoder, PROMPTS[:1], do_sample=True, temperature=5.0)
    assert [int(step.tokens) for step in decoder.steps] == generated[0].tolist()
    ids = adapted.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    first = torch.stack([adapted.dense_member(n)(ids).logits[0, -1].softmax(-1) for n in range(3)])
    token = int(generated[0, 0])
    torch.testing.assert_close(decoder.steps[0].members[:, 0].exp(), first[:, token], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(decoder.steps[0].running[-1, 0].exp(), first[:, token].mean(), atol=1e-6, rtol=1e-4)


def test_streamer_gets_the_prompt_and_then_each_token(adapted: Any) -> None:
    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Collected()
    decoder = decoder_of(adapted, instances=2, streamer=streamer)
    generated = generate(adapted, decoder, PROMPTS[:1])
    assert streamer.parts[0] == adapted.tokenizer(PROMPTS[0])["input_ids"]
    assert streamer.parts[1:] == [[token] for token in generated[0].tolist()]
    assert streamer.ended


def test_beam_search_is_refused_by_name(adapted: Any) -> None:
    with pytest.raises(UserError, match=r"beam search \(num_beams: 2\)"):
        generate(adapted, decoder_of(adapted, instances=2), PROMPTS[:1], num_beams=2)


def test_masks_are_off_after_decoding_and_after_an_error(adapted: Any) -> None:
    generate(adapted, decoder_of(adapted, instances=2), PROMPTS[:1])
    with pytest.raises(UserError):
        generate(adapted, decoder_of(adapted, instances=2), PROMPTS[:1], num_beams=2)
    assert all(not layer.layer.lora_variant for layer in adapted.dropout.layers.values())


@given(
    members=st.integers(1, 5),
    average=st.sampled_from(["logits", "probabilities"]),
    spread=st.sampled_from([1.0, 300.0]),
)
def test_running_average_is_the_average(members: int, average: str, spread: float) -> None:
    logits = torch.randn(members, 3, 7, dtype=torch.float64) * spread
    running = RunningAverage(average)
    for member in logits:  # added one by one and in one piece: the same
        running.add(member[None].float())
    at_once = RunningAverage(average)
    at_once.add(logits.float())
    torch.testing.assert_close(running.value(), at_once.value(), atol=0, rtol=0)
    expected = logits.mean(0) if average == "logits" else (logits.log_softmax(-1).exp().mean(0)).log()
    # the definition's probabilities lose their digits in float64 near the smallest, and then underflow; ours do not
    told = expected > math.log(sys.float_info.min) if average == "probabilities" else torch.ones_like(expected).bool()
    torch.testing.assert_close(running.value()[told].double(), expected[told], atol=1e-3 * spread / 300, rtol=1e-5)
    assert running.value().isfinite().all()
    if average == "probabilities":
        torch.testing.assert_close(running.value().log_softmax(-1), running.value(), atol=1e-4, rtol=1e-5)


def test_an_empty_average_is_refused() -> None:
    with pytest.raises(ValueError, match="no member"):
        RunningAverage("logits").value()


@given(members=st.integers(1, 20), rows=st.integers(1, 10), limit=st.none() | st.integers(1, 60))
def test_passes_cover_every_member_once_within_the_limit(members: int, rows: int, limit: int | None) -> None:
    parts = passes(MaskedMembers(cast(Any, None), Ensemble(instances=members, rows_per_pass=limit)), rows)
    assert [number for part in parts for number in part] == list(range(members))
    assert limit is None or all(len(part) == 1 or len(part) * rows <= limit for part in parts)
