"""What LoRA Dropout means in a layer, how its context behaves, and what it takes from peft.

The arithmetic of every kind of layer is in test_lora_conformance.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_kinds import KINDS
from lora_reference import adapted as adapted_by
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pipeline.lora_dropout import LoraDropout, folded_alpha


def adapted(layer: nn.Module, rank: int, alpha: float = 6.0) -> PeftModel:
    """The layer with a random adapter, B included."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
    return adapted_by(layer, config, torch.float32)


def test_every_token_of_a_sequence_sees_the_same_mask() -> None:
    """Equal tokens give equal outputs."""
    torch.manual_seed(0)
    model = adapted(nn.Linear(16, 48), 4)
    dropout = LoraDropout(model, 0.5, seed=1)
    x = torch.randn(2, 1, 16).expand(2, 5, 16)
    with dropout.masks("train", [(0,)]):
        output = model(x)
    torch.testing.assert_close(output, output[:, :1].expand_as(output))


def masked_updates(model: PeftModel, dropout: LoraDropout, x: torch.Tensor, masks: int) -> torch.Tensor:
    """``(masks, out)``: the adapter's contribution to ``x`` ``(in,)`` under each mask."""
    with torch.no_grad(), model.disable_adapter():
        base = model(x[None])
    with torch.no_grad(), dropout.masks("train", [(n,) for n in range(masks)]):
        return model(x.expand(masks, -1)) - base


def test_rescaled_masks_keep_the_mean() -> None:
    torch.manual_seed(0)
    model = adapted(nn.Linear(9, 6), 4)
    x = torch.randn(9)
    with torch.no_grad():
        deterministic = model(x) - F.linear(
            x, *(p.detach() for p in model.base_model.model.layer.base_layer.parameters())
        )
    updates = masked_updates(model, LoraDropout(model, 0.4, seed=0), x, 20_000)
    error = updates.std(dim=0) / len(updates) ** 0.5
    assert ((updates.mean(dim=0) - deterministic).abs() <= 6 * error).all()  # 6 values: false alarm 1e-8
    assert ((updates.mean(dim=0) - 0.36 * deterministic).abs() > 6 * error).any()  # nor the mean without rescaling


def test_the_regulariser_is_the_ridge_of_the_closed_form() -> None:
    """White inputs, squared loss, one layer: E|(dW_hat - dW) x|^2 = (2p - p^2) / (1-p)^2 |dW|_F^2."""
    torch.manual_seed(0)
    rate = 0.3
    model = adapted(nn.Linear(8, 5), 3)
    layer = model.base_model.model.layer
    delta = layer.get_delta_weight("default").detach()
    count = 20_000
    x = torch.randn(count, 8)
    with torch.no_grad(), LoraDropout(model, rate, seed=0).masks("train", [(n,) for n in range(count)]):
        masked = model(x)
    with torch.no_grad():
        deviations = (masked - model(x)).square().sum(dim=1)
    expected = (2 * rate - rate**2) / (1 - rate) ** 2 * delta.square().sum()
    assert abs(deviations.mean() - expected) <= 6 * deviations.std() / count**0.5


def test_folded_alpha_is_equation_2_verbatim() -> None:
    torch.manual_seed(0)
    rate, alpha = 0.4, 6.0
    model = adapted(nn.Linear(9, 6), 4, alpha=folded_alpha(alpha, rate, False))
    dropout = LoraDropout(model, rate, seed=0)
    layer = model.base_model.model.layer
    masks = dropout.layer_masks("train", [(n,) for n in range(5)])["layer"]
    x = torch.randn(9)
    a, b = (weights["default"].weight.detach().double() for weights in (layer.lora_A, layer.lora_B))
    updates = masked_updates(model, dropout, x, 5)
    for n in range(5):
        a_hat = a @ torch.diag(masks.kept_in[n].double())  # masks of 0 and 1, no scale
        b_hat = torch.diag(masks.kept_out[n].double()) @ b
        expected = alpha / 4 * (b_hat @ a_hat @ x.double())
        torch.testing.assert_close(updates[n].double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        deterministic = model(x) - F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    expected = (1 - rate) ** 2 * alpha / 4 * (b @ a @ x.double())
    torch.testing.assert_close(deterministic.double(), expected, atol=1e-5, rtol=1e-5)
    assert folded_alpha(alpha, rate, True) == alpha


def test_contexts_do_not_nest() -> None:
    model = adapted(nn.Linear(4, 4), 2)
    dropout = LoraDropout(model, 0.5, seed=0)
    x = torch.randn(2, 4)
    with dropout.members([0]):
        outer = model(x)
        with pytest.raises(RuntimeError, match="already active"), dropout.members([1]):
            pass
        assert torch.equal(model(x), outer)  # the refused one leaves the active one alone


class Spy(LoraVariant):
    """Writes down how peft calls it."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return torch.zeros(1) + 5


@pytest.mark.parametrize("kind", ["Linear", "Linear4bit", "Linear8bitLt"])
def test_contract_with_peft(kind: str) -> None:
    """The private hooks: `lora_variant` is a dict beside module state, and its forward replaces the LoRA lines."""
    model = adapted(KINDS[kind].quantised(KINDS[kind].layer(64, 32), torch.float32), 2)
    target = model.base_model.model.layer
    assert type(target).__name__ == kind
    assert target.lora_variant == {} and type(target.lora_variant) is dict
    assert type(LoraDropout(model, 0.5, seed=0).layers["layer"].layer) is type(target)
    spy = Spy()
    target.lora_variant["default"] = spy
    x = torch.randn(3, 64)
    output = model(x)
    ((args, kwargs),) = spy.calls
    assert len(args) <= 1 and kwargs.keys() >= {"active_adapter", "x", "result"}
    assert (args[0] if args else kwargs["module"]) is target
    assert kwargs["active_adapter"] == "default"
    assert kwargs["x"].shape == (3, 64) and kwargs["result"].shape == (3, 32)
    assert output.eq(5).all()


def gradients(model: PeftModel, dropout: LoraDropout, ids: torch.Tensor, early: bool = False) -> list[torch.Tensor]:
    """Of every adapter weight; ``early`` leaves the mask context before backward."""
    model.zero_grad()
    with dropout.masks("train", [(0,), (1,)]):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not early:
            loss.backward()
    if early:
        loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(small_base: Path, reentrant: bool) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    model.train()
    model.enable_input_require_grads()
    dropout = LoraDropout(model, 0.5, seed=0)
    ids = torch.randint(4, 4096, (4, 9))
    kept = gradients(model, dropout, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients(model, dropout, ids)
    for expected, found in zip(kept, recomputed, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    if reentrant:  # the other kind notices and raises; this one would be wrong in silence
        wrong = gradients(model, dropout, ids, early=True)
        assert max((w - k).abs().max() for w, k in zip(wrong, kept, strict=True)) > 1e-3
