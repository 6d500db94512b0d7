"""Architectures of other shapes than LLaMA, from tiny random configurations: attach, compare, train, detach."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from pipeline.lora_dropout import LoraDropout

VOCABULARY = 53
GROUPED_QUERIES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MIXTURE = {**GROUPED_QUERIES, "num_experts_per_tok": 2}


def tokens(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, VOCABULARY, (rows, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 24, 24)}


@dataclass(frozen=True)
class Architecture:
    """A tiny model and where its adapter goes."""

    build: Callable[[], nn.Module]
    targets: list[str] | str
    parameters: list[str] | None = None
    groups: int = 3
    """Masks at once: one, where a layer's weight or input is shared by all rows."""
    batch: Callable[[int], dict[str, torch.Tensor]] = tokens
    config: dict[str, Any] = field(default_factory=dict)
    """More of peft's."""


ARCHITECTURES = {
    "GPT-2 (Conv1D)": Architecture(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=32)),
        ["c_attn", "c_proj", "c_fc", "wte"],
        config={"fan_in_fan_out": True},
    ),
    "Mistral": Architecture(lambda: MistralForCausalLM(MistralConfig(**GROUPED_QUERIES)), "all-linear"),
    "Qwen2": Architecture(
        lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED_QUERIES, tie_word_embeddings=True)),
        ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"],
    ),
    "LLaMA, ranks and alphas by pattern, one layer only": Architecture(
        lambda: LlamaForCausalLM(LlamaConfig(**GROUPED_QUERIES)),
        ["q_proj", "v_proj", "up_proj"],
        config={
            "use_rslora": True,
            "rank_pattern": {"v_proj": 5},
            "alpha_pattern": {"up_proj": 11},
            "layers_to_transform": [1],
        },
    ),
    "Gemma-3 (scaled embedding)": Architecture(
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED_QUERIES)), ["q_proj", "o_proj", "embed_tokens"]
    ),
    "BERT": Architecture(
        lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
        ["query", "key", "value", "dense", "word_embeddings"],
    ),
    "BERT, positions too": Architecture(
        lambda: BertForSequenceClassification(BertConfig(**ENCODER)), ["query", "position_embeddings"], groups=1
    ),
    "DeBERTa-v2 (relative positions)": Architecture(
        lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True)
        ),
        ["query_proj", "key_proj", "value_proj", "dense"],
        groups=1,
    ),
    "Mixtral (fused experts)": Architecture(
        lambda: MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4)),
        ["q_proj", "v_proj"],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        groups=1,
    ),
    "Qwen3-MoE (fused experts, and the router)": Architecture(
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, num_experts=4, moe_intermediate_size=16)),
        ["k_proj", "o_proj"],
        ["mlp.experts.down_proj", "mlp.gate.weight"],
        groups=1,
    ),
    "ResNet": Architecture(
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3)
        ),
        ["convolution", "classifier.1"],
        batch=images,
    ),
}


def adapted(architecture: Architecture) -> PeftModel:
    """The model with a random adapter, B included, without noise of its own."""
    config = LoraConfig(
        r=3, target_modules=architecture.targets, target_parameters=architecture.parameters, **architecture.config
    )
    model = get_peft_model(architecture.build(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model


def member(model: PeftModel, dropout: LoraDropout, group: int) -> PeftModel:
    """A stock model with one mask written into its adapter's weights."""
    twin = deepcopy(model)
    masks = dropout.layer_masks("train", [(group,)])
    twins = LoraDropout(twin, dropout.rate, dropout.seed).layers
    for name, masked in dropout.layers.items():
        for kind, weight in masked.member_weights(masks[name]).items():
            held = getattr(twins[name].layer, kind)["default"]
            (held if isinstance(held, nn.Parameter) else held.weight).data = weight
    return twin


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_see_their_masks_and_stock_comes_back(name: str) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = adapted(architecture)
    dropout = LoraDropout(model, 0.4, seed=1)
    tuner = model.base_model
    assert len(dropout.layers) == len(tuner.targeted_module_names) + len(tuner.targeted_parameter_names) > 1

    rows = 2
    batch = architecture.batch(architecture.groups * rows)
    before = model(**batch).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    coordinates = [(group,) for group in range(architecture.groups)]
    with dropout.masks("train", coordinates, rows=architecture.groups * rows):
        masked = model(**batch).logits
        masked.square().mean().backward()
    for group in range(architecture.groups):
        part = slice(group * rows, (group + 1) * rows)
        with torch.no_grad():
            expected = member(model, dropout, group)(**{key: value[part] for key, value in batch.items()}).logits
        torch.testing.assert_close(masked[part], expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(masked, before, atol=1e-3)

    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
    assert torch.equal(model(**batch).logits, before)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.groups == 1])
def test_several_masks_are_refused_where_rows_share_a_weight_or_an_input(name: str) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model = adapted(architecture)
    dropout = LoraDropout(model, 0.4, seed=1)
    with pytest.raises(ValueError, match="execution: sequential"), dropout.members([0, 1]):
        model(**architecture.batch(4))


def test_names_of_nested_parameters_do_not_depend_on_the_nesting() -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES["Mixtral (fused experts)"]
    both = LoraDropout(adapted(architecture), 0.4, seed=1)
    other_order = Architecture(architecture.build, ["q_proj"], list(reversed(architecture.parameters or [])))
    swapped = LoraDropout(adapted(other_order), 0.4, seed=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert {name, name.replace("gate_up", "down"), "model.layers.0.self_attn.q_proj"} <= both.layers.keys()
    assert set(swapped.layers) == {layer for layer in both.layers if "v_proj" not in layer}
    assert torch.equal(
        both.layer_masks("train", [(0,)])[name].kept_in, swapped.layer_masks("train", [(0,)])[name].kept_in
    )
    assert both.layers[name].features() == (4 * 24, 4 * 80)
