"""Closed forms for the arithmetic, and the real libraries as witnesses."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from pipeline.preflight.estimate import (
    PLAIN,
    ModelShape,
    Numerics,
    activation_bytes,
    base_bytes,
    batch,
    in_words,
    lora_parameters,
    quantization_constants_bytes,
    rank_memory,
)
from pipeline.preflight.numbers import model_shape
from pipeline.recipe import Recipe

NF4 = Numerics("nf4", "bfloat16")
PLAIN_16 = Numerics("none", "bfloat16")


def recipe(**adapter: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "t", "base": {"model": "m"}, "data": {"train": [{"path": "d"}]}, "adapter": {"rank": 16, **adapter}}
    )


@pytest.fixture(scope="module")
def llama7b() -> ModelShape:
    """LLaMA-2-7B is LlamaConfig's default."""
    return model_shape(LlamaConfig(), recipe())


def test_llama_2_7b(llama7b: ModelShape) -> None:
    h, f, layers, words = 4096, 11008, 32, 32000
    linear = 4 * h * h + 3 * h * f
    assert llama7b.quantizable == layers * linear
    assert llama7b.parameters == layers * linear + 2 * words * h + (2 * layers + 1) * h == 6_738_415_616
    assert llama7b.adapter_parameters == layers * 16 * (4 * (h + h) + 3 * (h + f)) == 39_976_960
    assert llama7b.largest_linear == h * f
    assert llama7b.linear_outputs == 5 * h + 2 * f
    shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    assert lora_parameters(shapes * layers, 16) == llama7b.adapter_parameters
    assert llama7b.adapter_tensors == layers * 7 * 2


@pytest.mark.parametrize("seed", range(4))
def test_shape_agrees_with_a_real_peft_model(seed: int) -> None:
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    config = LlamaConfig(
        hidden_size=heads * 8 * draw.randint(1, 3),
        intermediate_size=draw.randint(17, 90),
        num_hidden_layers=draw.randint(1, 3),
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([1, heads]),
        vocab_size=draw.randint(50, 200),
        tie_word_embeddings=bool(seed % 2),
    )
    targets = draw.choice(["all-linear", ["q_proj", "down_proj"]])
    rank = draw.randint(1, 9)
    shape = model_shape(config, recipe(rank=rank, target_modules=targets))
    base = LlamaForCausalLM(config)
    assert shape.parameters == sum(parameter.numel() for parameter in base.parameters())
    targeted = [
        (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name != "lm_head"
        and (targets == "all-linear" or name.rpartition(".")[2] in targets)
    ]
    adapted = get_peft_model(base, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.adapter_parameters == adapted.get_nb_trainable_parameters()[0] == lora_parameters(targeted, rank)


def test_shape_of_another_architecture() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100)
    shape = model_shape(config, recipe(rank=4))
    assert shape.layers == 2
    assert shape.adapter_parameters > 0


def test_base_bytes_of_llama_2_7b(llama7b: ModelShape) -> None:
    rest = 2 * (llama7b.parameters - llama7b.quantizable)
    q = llama7b.quantizable
    assert base_bytes(llama7b, PLAIN_16) == 2 * llama7b.parameters
    assert base_bytes(llama7b, Numerics("int8", "bfloat16")) == q + rest
    assert base_bytes(llama7b, Numerics("nf4", "bfloat16", double_quantization=False)) == q // 2 + q // 16 + rest
    constants = quantization_constants_bytes(q, NF4)
    assert constants == q // 64 + 4 * (-(-q // 64 // 256))
    assert constants / q * 8 == pytest.approx(0.127, abs=1e-3)  # bits per weight, QLoRA section 3
    assert constants == pytest.approx(103e6, rel=0.02)


@pytest.mark.parametrize("double", [True, False])
def test_nf4_bytes_agree_with_bitsandbytes(pocket_base: Path, double: bool) -> None:
    """Weights to the byte; constants within 5 %, since small layers round up to whole blocks."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig

    from pipeline.base import load_base
    from pipeline.recipe import schema

    base = schema.Base(model=str(pocket_base), double_quantization=double)
    shape = model_shape(AutoConfig.from_pretrained(pocket_base), recipe())
    numerics = Numerics("nf4", "bfloat16", double_quantization=double)
    model = load_base(base, torch.device("cpu"))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    states = [module.weight.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    constants = sum(state.absmax.numel() * state.absmax.element_size() for state in states)
    if double:
        constants += sum(state.state2.absmax.numel() * 4 for state in states)
    estimated = quantization_constants_bytes(shape.quantizable, numerics)
    assert base_bytes(shape, numerics) - estimated == weights
    assert estimated == pytest.approx(constants, rel=0.05)


def test_zero_stages_share_what_they_say(llama7b: ModelShape) -> None:
    trained, ranks = llama7b.adapter_parameters, 4
    by_stage = [rank_memory(llama7b, NF4, stage, ranks, rows=4, tokens=512) for stage in range(4)]
    states, sixteen = 12 * trained, 2 * trained
    assert [m.optimizer for m in by_stage] == [states, states // 4, states // 4, states // 4]
    assert [m.gradients for m in by_stage] == [sixteen, sixteen, sixteen // 4, sixteen // 4]
    assert [m.weights for m in by_stage] == [sixteen, sixteen, sixteen, sixteen // 4]
    base = base_bytes(llama7b, NF4)
    assert [m.base for m in by_stage] == [base, base, base, -(-base // 4)]
    assert len({m.activations for m in by_stage}) == 1
    assert all(m.load_peak >= base for m in by_stage)  # a quantised base is loaded whole by every rank


def test_zero_3_gathers_the_whole_quantised_base_without_checkpointing(llama7b: ModelShape) -> None:
    kept = rank_memory(llama7b, replace(NF4, checkpointing=False), 3, 2, 1, 512)
    freed = rank_memory(llama7b, NF4, 3, 2, 1, 512)
    base = base_bytes(llama7b, NF4)
    assert kept.base + kept.gathered == base
    assert freed.gathered == -(-base // 32)


def test_zero_3_loads_an_unquantised_base_in_shards(llama7b: ModelShape) -> None:
    assert rank_memory(llama7b, PLAIN_16, 3, 4, 1, 512).load_peak == llama7b.parameters // 2
    assert rank_memory(llama7b, PLAIN_16, 2, 4, 1, 512).load_peak == 2 * llama7b.parameters


def test_offload(llama7b: ModelShape) -> None:
    assert rank_memory(llama7b, NF4, 2, 2, 1, 512, "optimizer").optimizer == 0
    assert rank_memory(llama7b, NF4, 0, 2, 1, 512, "optimizer").optimizer == 12 * llama7b.adapter_parameters
    everything = rank_memory(llama7b, NF4, 3, 2, 1, 512, "all")
    assert everything.base == 0
    assert everything.gathered > 0


def test_plain_python_keeps_a_float32_adapter(llama7b: ModelShape) -> None:
    memory = rank_memory(llama7b, NF4, PLAIN, 1, 1, 512)
    assert memory.weights + memory.gradients + memory.optimizer == 16 * llama7b.adapter_parameters


def test_totals(llama7b: ModelShape) -> None:
    memory = rank_memory(llama7b, NF4, 2, 2, 4, 512)
    assert memory.at_rest == memory.base + memory.weights + memory.optimizer
    assert memory.peak == max(memory.load_peak, memory.step_peak) > memory.at_rest


def test_activations(llama7b: ModelShape) -> None:
    """Linear in rows; with checkpointing one residual stream per layer and one layer in full."""
    one, four = (activation_bytes(llama7b, rows, 512, NF4) for rows in (1, 4))
    assert four == 4 * one
    layer = 512 * (4 * llama7b.linear_outputs + 12 * 4096)
    assert one == 32 * 512 * 4096 * 2 + layer
    assert activation_bytes(llama7b, 1, 512, replace(NF4, checkpointing=False)) == 32 * layer
    eager = activation_bytes(llama7b, 1, 512, replace(NF4, checkpointing=False, eager_attention=True))
    assert eager - 32 * layer == 32 * 512 * 512 * 32 * 6


@pytest.mark.parametrize(
    ("rows", "micro", "accumulation", "processes", "epochs", "steps_per_epoch", "steps"),
    [(100, 4, 1, 1, 1, 25, 25), (101, 4, 1, 1, 1, 26, 26), (100, 4, 2, 2, 3, 7, 21), (3, 4, 8, 2, 2.5, 1, 3)],
)
def test_steps(
    rows: int, micro: int, accumulation: int, processes: int, epochs: float, steps_per_epoch: int, steps: int
) -> None:
    run = batch(rows, micro, accumulation, processes, epochs)
    assert (run.steps_per_epoch, run.steps) == (steps_per_epoch, steps)
    assert run.examples_per_step == micro * accumulation * processes
    assert batch(rows, micro, accumulation, processes, epochs, max_steps=5).steps == 5


@given(rows=st.integers(1, 300), micro=st.integers(1, 9), accumulation=st.integers(1, 5), epochs=st.floats(0.1, 4))
def test_steps_agree_with_transformers(rows: int, micro: int, accumulation: int, epochs: float) -> None:
    """transformers.Trainer.set_initial_training_values, one process."""
    loader = -(-rows // micro)
    updates = max(loader // accumulation + int(loader % accumulation > 0), 1)
    run = batch(rows, micro, accumulation, 1, epochs)
    assert run.steps_per_epoch == updates
    assert run.steps == -int(-epochs * updates // 1)


def test_instances_multiply_rows_only_where_batched() -> None:
    assert batch(10, 4, 1, 1, 1, instances=4).rows_per_pass == 16
    assert batch(10, 4, 1, 1, 1, instances=4, batched=False).rows_per_pass == 4


@pytest.mark.parametrize(
    ("size", "words"),
    [(3 * 2**10, "3 KiB"), (86 * 2**20, "86 MiB"), (13.68 * 2**30, "13.7 GiB"), (2**41, "2,048.0 GiB")],
)
def test_in_words(size: float, words: str) -> None:
    assert in_words(size) == words
