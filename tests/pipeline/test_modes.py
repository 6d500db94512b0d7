"""Masks under what PyTorch does around a model: compilation, checkpointing, autocast, accumulation, exceptions.

Single layers are held against the dense reference elsewhere; here whole small models are held against themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.lora_dropout import LoraDropout, copied_rows, example_coordinates

LORA = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
LORA_GPT2 = LoraConfig(r=8, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
ADALORA = AdaLoraConfig(
    init_r=8, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )


def gpt2() -> PreTrainedModel:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, tie_word_embeddings=False, **none)
    return GPT2LMHeadModel(config)


def adapted(base: Callable[[], PreTrainedModel] = llama, config: PeftConfig = LORA) -> PeftModel:
    """With a random adapter, B included."""
    torch.manual_seed(0)
    model = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dim() == 2:
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
    return model.train()


def random_batch(rows: int, tokens: int = 7) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(1))}


def backward(model: torch.nn.Module, batch: dict[str, torch.Tensor], weight: float = 1.0) -> torch.Tensor:
    """The loss, after its gradients were added."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    loss = weight * F.cross_entropy(logits.flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())
    loss.backward()
    return loss.detach()


def step(
    model: torch.nn.Module, dropout: LoraDropout, batch: dict[str, torch.Tensor], coordinates: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    """The loss and all gradients of the adapter under these masks."""
    model.zero_grad()
    with dropout.masks("train", coordinates, rows=len(batch["input_ids"])):
        loss = backward(model, batch)
    return [loss, *gradients(model)]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-6) -> None:
    """All close, and none of them 0 throughout."""
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "config"), [(llama, LORA), (gpt2, LORA_GPT2), (llama, ADALORA)], ids=["llama", "gpt2", "adalora"]
)
def test_compiled_steps_equal_eager_ones_and_new_masks_compile_nothing(
    base: Callable[[], PreTrainedModel], config: PeftConfig
) -> None:
    """One graph for every step's masks, one more for stock code, and both stay. The backend runs the traced graphs of
    forward and backward as they are: what a compiler does with them is its own matter."""
    torch._dynamo.reset()
    model = adapted(base, config)
    dropout = LoraDropout(model, 0.5, seed=3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = random_batch(4)
    with torch.no_grad():
        stock = model(**batch).logits
    seen = []
    for number in range(3):
        coordinates = [(number, group) for group in range(2)]
        found = step(compiled, dropout, batch, coordinates)
        assert_same(found, step(model, dropout, batch, coordinates))
        seen.append(found[0].item())
        assert counter.frame_count == min(number + 1, 2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, stock, atol=1e-6, rtol=1e-5)
        assert counter.frame_count == 2
    assert len(set(seen)) == 3


def two_linears(dtype: torch.dtype) -> PeftModel:
    """Widths are multiples of 8: bfloat16's rule for one kernel over several runs."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["0", "1"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)), config).to(dtype)


def compiled_and_eager(
    model: PeftModel, dropout: LoraDropout, x: torch.Tensor, options: list[dict[str, Any]]
) -> list[int]:
    """Graphs compiled after each pass under masks with these options, which equals the eager one with its gradients."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for number, option in enumerate(options):
        found = []
        for either in (compiled, model):
            model.zero_grad()
            with dropout.masks("train", [(number, 0), (number, 1)], **option):
                output = either(x)
                output.float().square().sum().backward()
            found.append([output.detach(), *gradients(model)])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        counts.append(counter.frame_count)
    return counts


def test_a_growing_rate_compiles_once_more() -> None:
    """Rates become inputs of the graph at the second one that it sees."""
    model = two_linears(torch.float32)
    dropout = LoraDropout(model, 0.5, seed=3, initial_rate=0.1)
    options = [{"progress": number / 4} for number in range(5)]
    assert compiled_and_eager(model, dropout, torch.randn(4, 16), options) == [1, 2, 2, 2, 2]


def test_packed_rows_of_one_length_compile_once() -> None:
    """In bfloat16, wherever in the row the examples end."""
    model = two_linears(torch.bfloat16)
    dropout = LoraDropout(model, 0.5, seed=3)
    options = [{"lengths": [5 + number, 11 - number]} for number in range(3)]
    assert compiled_and_eager(model, dropout, torch.randn(1, 16, 16).bfloat16(), options) == [1, 1, 1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_autocast_gives_the_same_gradients(reentrant: bool, dtype: torch.dtype | None) -> None:
    """Recomputation sees the same masks and the same dtypes: bit for bit."""
    model = adapted()
    model.enable_input_require_grads()
    dropout = LoraDropout(model, 0.5, seed=3)
    batch, coordinates = random_batch(4), [(0, 0), (0, 1)]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        kept = step(model, dropout, batch, coordinates)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        recomputed = step(model, dropout, batch, coordinates)
    assert all(torch.equal(one, other) for one, other in zip(recomputed, kept, strict=True))


# relative to the largest element of a gradient: 24, 8 and 11 bits of significand, through a decoder layer and back
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.015}


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest, over the loss and all gradients, relative to their largest element."""
    pairs = zip(found, expected, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near_float32(dtype: torch.dtype) -> None:
    model = adapted()
    dropout = LoraDropout(model, 0.5, seed=3)
    batch, coordinates = random_batch(4), [(0, 0), (0, 1)]
    expected = step(model, dropout, batch, coordinates)
    with torch.autocast("cpu", dtype):
        found = step(model, dropout, batch, coordinates)
        other = step(model, dropout, batch, [(1, 0), (1, 1)])
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert distance(found, expected) <= TOLERANCES[dtype]
    assert distance(other, expected) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_instances_at_once_equal_one_after_another(dtype: torch.dtype) -> None:
    """Equation 7: one batch of N copies has the mean loss and gradient of N passes."""
    model = adapted()
    dropout = LoraDropout(model, 0.5, seed=3)
    batch, coordinates = random_batch(3), [(5, n) for n in range(4)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together = step(model, dropout, copied_rows(batch, 4), coordinates)
        model.zero_grad()
        losses = []
        for coordinate in coordinates:
            with dropout.masks("train", [coordinate], rows=3):
                losses.append(backward(model, batch, weight=1 / 4))
    assert distance([sum(losses), *gradients(model)], together) <= TOLERANCES[dtype]


@pytest.mark.parametrize("draws", [1, 2])
def test_accumulated_micro_batches_equal_one_batch(draws: int) -> None:
    """Masks of examples: however rows are spread over micro-batches, here 6 as 4 and 2."""
    model = adapted()
    dropout = LoraDropout(model, 0.5, seed=3)
    batch, rows = random_batch(6), [8, 3, 11, 0, 7, 5]
    whole = step(model, dropout, copied_rows(batch, draws), example_coordinates(1, rows, draws))
    model.zero_grad()
    losses = []
    for part in (slice(0, 4), slice(4, 6)):
        micro = copied_rows({name: tensor[part] for name, tensor in batch.items()}, draws)
        with dropout.masks("train", example_coordinates(1, rows[part], draws)):
            losses.append(backward(model, micro, weight=len(rows[part]) / 6))
    assert_same([sum(losses), *gradients(model)], whole)


def test_an_exception_inside_leaves_stock_code() -> None:
    model = adapted()
    dropout = LoraDropout(model, 0.5, seed=3)
    batch = random_batch(4)
    stock = [backward(model, batch), *gradients(model)]
    with pytest.raises(ZeroDivisionError), dropout.members([0]):
        model(**batch)
        raise ZeroDivisionError
    assert not any(layer.layer.lora_variant for layer in dropout.layers.values())
    model.zero_grad()
    again = [backward(model, batch), *gradients(model)]
    assert all(torch.equal(one, other) for one, other in zip(again, stock, strict=True))
    with dropout.members([0]):  # and the next masks are not refused
        assert not torch.equal(backward(model, batch), stock[0])


@pytest.mark.parametrize(
    ("coordinates", "options", "message"),
    [
        ([(0,), (1,)], {"rows": 8}, r"model\.layers\.0\.\S+: masks for a batch of 8 rows, found 4 rows"),
        ([(0,), (1,), (2,)], {}, "3 mask groups need a batch whose rows divide by 3, found 4 rows"),
        ([(0,), (1,)], {"lengths": [14, 13]}, "masks for 2 examples of together 27 tokens, found 28 tokens"),
        ([(0,), (1,)], {"lengths": [28]}, "1 lengths for 2 masks"),
        ([], {}, "no coordinates"),
        ([(0,), (4,)], {"balanced": 4}, "balanced over 4 masks: their last coordinates are 0 to 3"),
    ],
)
def test_masks_for_another_batch_are_refused(
    coordinates: list[tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    model = adapted()
    dropout = LoraDropout(model, 0.5, seed=3)
    with pytest.raises(ValueError, match=message), dropout.masks("train", coordinates, **options):
        model(**random_batch(4))
    assert not any(layer.layer.lora_variant for layer in dropout.layers.values())
