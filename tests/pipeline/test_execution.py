"""Batched or sequential instances: what is chosen, what is refused, and the memory it goes by."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from pipeline.adapter.dropout import check_folded_pattern, check_rate_pattern
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.lora_dropout.linear import masked_weights
from pipeline.preflight.estimate import PLAIN, ModelShape, mask_bytes
from pipeline.preflight.execution import (
    CLEARLY,
    FITS,
    DeviceMemory,
    check_shared_weight,
    chosen_execution,
    device_memory,
)
from pipeline.preflight.numbers import memory_of, model_shape, numerics_of
from pipeline.recipe import Recipe

GIB = 2**30


def recipe(training: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None, **dropout: Any) -> Recipe:
    dropout = {"rate": 0.5, "instances": 4, "sampling": "instance", **dropout}
    return Recipe.model_validate(
        {
            "name": "t",
            "base": {"model": "m"},
            "data": {"train": [{"path": "d"}]},
            "adapter": {**(adapter or {}), "dropout": dropout},
            "training": training or {},
        }
    )


@pytest.fixture(scope="module")
def llama7b() -> ModelShape:
    return model_shape(LlamaConfig(), recipe())


@settings(deadline=None)
@given(free=st.floats(0.1, 100), total=st.floats(1, 2), rows=st.integers(1, 16), instances=st.integers(2, 8))
def test_auto_is_batched_where_that_fits(
    llama7b: ModelShape, free: float, total: float, rows: int, instances: int
) -> None:
    asked = recipe({"per_device_train_batch_size": rows}, instances=instances)
    device = DeviceMemory("GPU", int(free * GIB), int(free * total * GIB))
    choice = chosen_execution(asked, llama7b, 100, device, 2, 2)
    batched, sequential = (memory_of(asked, llama7b, 2, 2, execution, 100) for execution in ("batched", "sequential"))
    assert batched.step_peak > sequential.step_peak
    assert (choice.execution == "batched") == (batched.step_peak <= FITS * device.free)
    taken = batched if choice.execution == "batched" else sequential
    assert (choice.warning is None) == (taken.peak <= device.free)
    assert choice.reason.startswith(f"{choice.execution} (auto): a step takes about ")


def test_the_line_names_the_numbers(llama7b: ModelShape) -> None:
    choice = chosen_execution(recipe(), llama7b, 100, DeviceMemory("H100", 70 * GIB, 80 * GIB), PLAIN, 1)
    assert choice.execution == "batched"
    assert choice.reason.endswith("; H100 has 70.0 GiB free of 80.0 GiB")
    asked = chosen_execution(
        recipe(execution="sequential"), llama7b, 100, DeviceMemory("H100", 70 * GIB, 80 * GIB), PLAIN, 1
    )
    assert asked.reason.startswith("sequential (as asked): a step takes about ")


def test_batched_is_refused_only_where_it_clearly_cannot_fit(llama7b: ModelShape) -> None:
    asked = recipe({"per_device_train_batch_size": 16}, execution="batched", instances=8)
    needed = memory_of(asked, llama7b, 2, 2, "batched", 100).step_peak
    with pytest.raises(UserError) as error:
        chosen_execution(asked, llama7b, 100, DeviceMemory("T4", needed, int(needed / CLEARLY) - 10), 2, 2)
    message = str(error.value)
    assert message.startswith("adapter.dropout.instances: 8 copies of 16 rows as one batch take about ")
    assert "T4 has" in message and "adapter.dropout.execution=sequential" in message
    assert "lower training.per_device_train_batch_size" in message
    doubtful = chosen_execution(asked, llama7b, 100, DeviceMemory("T4", needed // 2, needed), 2, 2)
    assert doubtful.execution == "batched"
    assert "is expected to take about" in str(doubtful.warning)


def test_one_instance_has_nothing_to_choose(llama7b: ModelShape) -> None:
    device = DeviceMemory("CPU", 0, 0)
    choice = chosen_execution(recipe(instances=1, execution="batched"), llama7b, 100, device, PLAIN, 1)
    assert (choice.execution, choice.reason) == ("batched", "one instance")


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}


@pytest.fixture(scope="module")
def mixtral() -> ModelShape:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=50,
    )
    return model_shape(config, recipe(adapter=EXPERTS))


def test_experts_share_a_mask(mixtral: ModelShape) -> None:
    assert mixtral.shared_weight == "model.layers.0.mlp.experts.gate_up_proj"
    device = DeviceMemory("GPU", 80 * GIB, 80 * GIB)
    choice = chosen_execution(recipe(adapter=EXPERTS), mixtral, 100, device, PLAIN, 1)
    assert choice.execution == "sequential"
    assert "model.layers.0.mlp.experts.gate_up_proj has one weight for all rows" in choice.reason
    with pytest.raises(UserError, match=r"batched runs 4 masks in one pass; but model\.layers\.0\.mlp\.experts\.gate"):
        check_shared_weight(recipe(adapter=EXPERTS, execution="batched"), mixtral)


@pytest.mark.parametrize(
    ("training", "refused"),
    [
        ({}, "a micro-batch has 4"),
        ({"per_device_train_batch_size": 1, "packing": True}, "packed rows hold several"),
        ({"per_device_train_batch_size": 1}, None),
        ({"per_device_train_batch_size": 1, "padding_free": True}, None),
    ],
)
def test_experts_refuse_masks_of_each_example(mixtral: ModelShape, training: dict[str, Any], refused: str) -> None:
    asked = recipe(training, EXPERTS, sampling="example")
    if refused is None:
        check_shared_weight(asked, mixtral)
        return
    with pytest.raises(UserError) as error:
        check_shared_weight(asked, mixtral)
    assert str(error.value).startswith("adapter.dropout.sampling: every example draws its own mask, and " + refused)
    assert "Set adapter.dropout.sampling=instance" in str(error.value)


def test_this_machine_has_memory() -> None:
    memory = device_memory()
    assert 0 < memory.free <= memory.total
    assert device_memory(4).total <= memory.total


@pytest.mark.parametrize("seed", range(3))
def test_mask_bytes_agree_with_masks(seed: int) -> None:
    """Bits to the byte; A and B once per mask in the dtype that computes."""
    draw = random.Random(seed)
    config = LlamaConfig(
        hidden_size=16 * draw.randint(1, 3),
        intermediate_size=draw.randint(17, 90),
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
    )
    rank, masks = draw.randint(1, 9), draw.randint(1, 6)
    asked = recipe({"gradient_checkpointing": False}, {"rank": rank})
    shape = model_shape(config, asked)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules="all-linear"))
    dropout = LoraDropout(model, 0.5, seed=0)
    made = dropout.layer_masks("train", [(n,) for n in range(masks)])
    bits = sum(layer.bits_in.numel() + layer.bits_out.numel() for layer in made.values())
    assert bits == masks * shape.masked_features // 8
    own = as_bytes = 0
    for name, layer in dropout.layers.items():
        a, b = (w["default"].weight for w in (layer.layer.lora_A, layer.layer.lora_B))
        own += sum(weight.nbytes for weight in masked_weights(a, b, made[name], 1.0, torch.bfloat16))
        as_bytes += masks * 8 * (made[name].bits_in.shape[1] + made[name].bits_out.shape[1])
    words = 4 * shape.masked_features
    assert mask_bytes(shape, masks, numerics_of(asked)) == words + bits + own + as_bytes


def test_plain_lora_has_no_mask_bytes() -> None:
    shape = model_shape(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100), recipe(rate=0, instances=1))
    assert shape.masked_features == 0
    assert memory_of(recipe(rate=0, instances=1), shape, PLAIN, 1, "batched", 10).masks == 0


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("q_prj", "'q_prj' names no module that holds the adapter.\nThere are: down_proj, q_proj, e.g. model.layers.0"),
        ("proj", "'proj' names no module"),
        ("layers.(", "'layers.(' is no regular expression: "),
    ],
)
def test_a_rate_for_no_module_is_refused(key: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        check_rate_pattern({"q_proj": 0.1, key: 0.2}, NAMES)
    assert str(error.value).startswith("adapter.dropout.rate_pattern: " + says)


def test_rates_that_name_modules() -> None:
    check_rate_pattern({"q_proj": 0.1, r".*\.mlp\..*": 0.2, "model.layers.1.mlp.down_proj": 0.3}, NAMES)


def test_folded_rates_do_not_depend_on_the_order_of_keys() -> None:
    """peft's file sorts them. Checked where layers are first known, before a base is loaded."""
    check_folded_pattern({"q_proj": 0.1, r".*\.mlp\..*": 0.2, r".*\.1\.mlp\..*": 0.2}, NAMES)
    check_folded_pattern({r".*_proj": 0.1, "q_proj": 0.2}, NAMES)  # sorted already
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    overlapping = {"q_proj": 0.1, ".*_proj": 0.2}
    model_shape(config, recipe(rate_pattern=overlapping))
    with pytest.raises(UserError, match=r"several keys match \S+q_proj; .* it would get 0\.2 for 0\.1\.\nLet one"):
        model_shape(config, recipe(rate_pattern=overlapping, rescale=False))
