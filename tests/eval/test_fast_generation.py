"""Generated answers of ensembles against members that each run the whole sequence for every token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_support import assert_close, fast, masked
from peft import PeftModel
from tiny_models import (
    CONTEXT,
    averaged,
    naive_logits,
    naive_scores,
    requests_of,
    sentence,
    tiny_model,
    with_adapter,
)
from transformers import PreTrainedTokenizerBase

from eval.lm import EnsembleLM
from eval.lm.batches import generation_keys
from eval.lm.records import GeneratedRecord
from pipeline.lora_dropout import LoraDropout


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
    (repeated,) = requests_of("generate_until", [(prompts[0], given)])
    drawn = lm.generate_until([repeated, repeated], disable_tqdm=True)
    record = lm.records[repeated.task_name, repeated.doc_id, repeated.idx]
    assert drawn == texts[:2] and record.text == drawn[0], "of repeats the first answer's record"
    before = torch.get_rng_state()
    assert generated(fast(model, tokenizer, members, batch_size=1), prompts, **sampling)[0] == texts
    assert torch.equal(torch.get_rng_state(), before), "no other random stream moves"
