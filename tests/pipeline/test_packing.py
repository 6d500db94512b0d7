"""Several examples in one row: each keeps its dataset row, its masks, and to itself."""

from __future__ import annotations

import random
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from trl.trainer.utils import add_fused_lm_head

from pipeline.data.packing import RowCollator, check_apart, copied_batch, packed_rows, single_rows
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout, example_coordinates

WORDS = 64


def random_dataset(lengths: list[int], seed: int = 0) -> datasets.Dataset:
    """Rows numbered from 100 on, the first third of each not trained."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        ids = [draw.randrange(1, WORDS) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :], "row": 100 + number})
    return datasets.Dataset.from_list(rows)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), most=st.integers(30, 64))
@settings(max_examples=10, deadline=None)
def test_packed_rows_hold_whole_examples_under_their_own_numbers(lengths: list[int], most: int) -> None:
    rows = random_dataset(lengths).map(lambda row: row)  # as after any preparation
    packed = packed_rows(rows, most)
    found = {}
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= most
        start = 0
        for number, length in zip(row["row"], row["seq_lengths"], strict=True):
            found[number] = (row["input_ids"][start : start + length], row["labels"][start : start + length])
            start += length
    assert found == {row["row"]: (row["input_ids"], row["labels"]) for row in rows}
    assert len(packed) <= len(rows)


def test_the_collator_tells_lengths_and_rows() -> None:
    rows = random_dataset([5, 3, 9])
    flat = RowCollator(0, pad_to_multiple_of=8)(list(single_rows(rows)))
    assert flat["input_ids"].shape == (1, 24)
    assert (flat["row"], flat["lengths"]) == ([100, 101, 102], [5, 3, 16])  # 7 tokens of padding go with the last
    assert flat["position_ids"][0, :8].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert "attention_mask" not in flat
    padded = RowCollator(0)(list(rows))
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (3, 9)
    assert padded["row"] == [100, 101, 102]
    assert "lengths" not in padded


def test_copies_lie_one_under_the_other() -> None:
    batch = RowCollator(0)(list(single_rows(random_dataset([5, 3]))))
    del batch["row"], batch["lengths"]
    copied = copied_batch(batch, 3)
    assert copied["input_ids"].shape == (3, 8)
    assert all(torch.equal(row, batch["input_ids"][0]) for row in copied["input_ids"])
    assert copied["cu_seq_lens_q"].tolist() == [0, 5, 8, 13, 16, 21, 24]
    assert copied["cu_seq_lens_q"].dtype == torch.int32
    assert copied["max_length_k"] == 5


def llama(attention: str) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=WORDS
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def gpt2(attention: str) -> PreTrainedModel:
    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=WORDS, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    return GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def adapted(base: PreTrainedModel) -> PeftModel:
    add_fused_lm_head(base)  # trl's loss
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().train()


def loss_and_gradients(
    model: PeftModel, examples: list[dict[str, Any]], copies: int, per_example: bool, drop: tuple[str, ...] = ()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss of the examples under their masks, as the trainer lays them out."""
    dropout = LoraDropout(model, 0.5, seed=3)
    batch = copied_batch(RowCollator(0)(examples), copies)
    rows, lengths = batch.pop("row"), batch.pop("lengths", None)
    coordinates = example_coordinates(0, rows, copies) if per_example else [(7, copy) for copy in range(copies)]
    each = lengths * copies if lengths and per_example else None
    model.zero_grad()
    with dropout.masks("train", coordinates, rows=batch["input_ids"].shape[0], lengths=each):
        loss = -model(**{k: v for k, v in batch.items() if k not in drop}, fused_lm_head=True).log_probs.sum()
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_example", [True, False], ids=["example", "instance"])
@pytest.mark.parametrize(
    ("base", "attention"), [(llama, "sdpa"), (llama, "eager"), (gpt2, "sdpa")], ids=["llama", "llama-eager", "gpt2"]
)
def test_packed_equals_padded(base: Any, attention: str, per_example: bool) -> None:
    """No example sees another, and each has its own masks.

    Tolerance: 1e-5 of the largest gradient, in float64, where softmax and norms still compute in float32.
    """
    torch.manual_seed(0)
    model = adapted(base(attention))
    rows = random_dataset([7, 4, 11, 2, 9])
    padded = loss_and_gradients(model, list(rows), 2, per_example)
    packed = list(packed_rows(rows, 16))
    assert len(packed) < len(rows)
    for examples in (packed, list(single_rows(rows))):
        loss, gradients = loss_and_gradients(model, examples, 2, per_example)
        torch.testing.assert_close(loss, padded[0], rtol=1e-5, atol=1e-5)
        assert gradients.keys() == padded[1].keys() != set()
        for name, gradient in gradients.items():
            scale = padded[1][name].abs().max()
            difference = ((gradient - padded[1][name]).abs().max() / scale).item()
            assert difference <= 1e-5, (name, difference)
    leaking, _ = loss_and_gradients(model, packed, 2, per_example, drop=("position_ids",))
    assert (leaking - padded[0]).abs() > 1e-2  # the tolerance tells a leak


def test_models_whose_examples_would_see_each_other_are_refused() -> None:
    """They have position_ids, and make no mask of them."""
    for attention in ("sdpa", "eager"):
        for base in (llama, gpt2):
            model = base(attention).train()
            check_apart(model)
            assert model.training
    small = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=40, max_position_embeddings=64, word_embed_proj_dim=24))
    for model in (opt, FalconForCausalLM(FalconConfig(**small))):
        with pytest.raises(UserError, match=rf"in a {type(model).__name__} .* see each other, .*\nSet both to false"):
            check_apart(model)
