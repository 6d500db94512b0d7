"""The masked layer against a dense float64 reference, and what it leaves untouched."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from pipeline.lora_dropout import LoraDropout, folded_alpha

# dtype -> atol in units of the tensor's largest element (a sum's error follows its terms, and rate 0.9 scales them by
# 100), rtol. The units in the last place are 2**-23 = 1e-7 and 2**-8 = 4e-3; masks, A, B and x make four products.
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (2e-2, 2e-2)}

# in, out, rank, groups, rows per group, tokens (0: two-dimensional input)
SHAPES = [
    (13, 7, 3, 1, 1, 0),
    (13, 7, 3, 2, 3, 0),
    (24, 33, 1, 5, 1, 4),
    (65, 17, 8, 2, 2, 3),
    (16, 48, 20, 5, 2, 7),
    (64, 64, 4, 1, 3, 5),
]


class OneLayer(nn.Module):
    """A model of a single linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.is_loaded_in_4bit = isinstance(layer, bitsandbytes.nn.Linear4bit)  # where peft looks, as transformers sets
        self.is_loaded_in_8bit = isinstance(layer, bitsandbytes.nn.Linear8bitLt)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, rank: int, dtype: torch.dtype, alpha: float = 6.0) -> PeftModel:
    """The layer with a random adapter, B included, in the dtype."""
    model = get_peft_model(OneLayer(layer), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) / parameter.shape[1] ** 0.5).to(dtype)
    return model


def linear(kind: str, size_in: int, size_out: int, dtype: torch.dtype) -> nn.Module:
    dense = nn.Linear(size_in, size_out, bias=kind == "Linear").to(dtype)
    if kind == "Linear":
        return dense
    layer = bitsandbytes.nn.Linear4bit(size_in, size_out, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layer.support_avx512bf16_for_cpu = False  # as pipeline.base does
    return layer.to("cpu")  # quantises


def frozen_weight(layer: LoraLayer) -> torch.Tensor:
    """``(out, in)`` float64, dequantised."""
    weight = layer.get_base_layer().weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().double()


def reference(
    model: PeftModel, dropout: LoraDropout, coordinates: list[tuple[int, ...]], x: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Equation 2, row by row, with explicit dense matrices, in float64; gradients by autograd on it."""
    (name, masked), *_ = dropout.layers.items()
    layer = masked.layer
    masks = dropout.layer_masks("train", coordinates)[name]
    a = layer.lora_A["default"].weight.detach().double().requires_grad_()
    b = layer.lora_B["default"].weight.detach().double().requires_grad_()
    frozen, bias = frozen_weight(layer), layer.get_base_layer().bias
    x64 = x.detach().double().requires_grad_()
    rows = x.shape[0] // len(coordinates)
    outputs = []
    for row in range(x.shape[0]):
        group = row // rows
        a_hat = a @ torch.diag(masks.kept_in[group].double()) / (1 - dropout.rate)
        b_hat = torch.diag(masks.kept_out[group].double()) @ b / (1 - dropout.rate)
        weight = frozen + layer.scaling["default"] * (b_hat @ a_hat)
        outputs.append(x64[row] @ weight.T + (0 if bias is None else bias.detach().double()))
    output = torch.stack(outputs)
    output.backward(upstream.double())
    return {"output": output.detach(), "x": x64.grad, "A": a.grad, "B": b.grad}


def computed(model: PeftModel, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by the model, in its dtype, under whatever variant is attached."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.backward(upstream)
    layer = model.base_model.model.layer
    gradients = {side: getattr(layer, f"lora_{side}")["default"].weight.grad for side in "AB"}
    return {"output": output.detach(), "x": x.grad, **gradients}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    atol, rtol = TOLERANCES[dtype]
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        largest = tensor.abs().max().item()
        torch.testing.assert_close(
            found[name].double(), tensor, atol=atol * largest, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )


def random_input(
    size_in: int, size_out: int, groups: int, rows: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and upstream gradient."""
    lead = (groups * rows, tokens) if tokens else (groups * rows,)
    return torch.randn(*lead, size_in).to(dtype), torch.randn(*lead, size_out).to(dtype)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Linear4bit"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_match_the_dense_reference(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, rate: float
) -> None:
    size_in, size_out, rank, groups, rows, tokens = shape
    torch.manual_seed(0)
    model = adapted(linear(kind, size_in, size_out, dtype), rank, dtype)
    dropout = LoraDropout(model, rate, seed=1)
    x, upstream = random_input(size_in, size_out, groups, rows, tokens, dtype)
    coordinates = [(2, group) for group in range(groups)]
    expected = reference(model, dropout, coordinates, x, upstream)
    with dropout.masks("train", coordinates):
        found = computed(model, x, upstream)
    assert_close(found, expected, dtype)
    with pytest.raises(AssertionError):  # the check sees the masks
        assert_close(computed(model, x, upstream), expected, dtype)


class FreshPerToken(LoraVariant):
    """The usual mis-port: dropout on the activations before A and after B, fresh for every token."""

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        low = module.lora_A[active_adapter](F.dropout(x, 0.5))
        return result + F.dropout(module.lora_B[active_adapter](low), 0.5) * module.scaling[active_adapter]


def test_fresh_noise_per_token_fails_the_same_check() -> None:
    torch.manual_seed(0)
    model = adapted(linear("Linear", 16, 48, torch.float32), 20, torch.float32)
    dropout = LoraDropout(model, 0.5, seed=1)
    x, upstream = random_input(16, 48, 2, 2, 7, torch.float32)
    coordinates = [(0, 0), (0, 1)]
    expected = reference(model, dropout, coordinates, x, upstream)
    model.base_model.model.layer.lora_variant["default"] = FreshPerToken()
    with pytest.raises(AssertionError, match="output"):
        assert_close(computed(model, x, upstream), expected, torch.float32)


def test_every_token_of_a_sequence_sees_the_same_mask() -> None:
    """Without a reference: equal tokens give equal outputs, which the mis-port's do not."""
    torch.manual_seed(0)
    model = adapted(linear("Linear", 16, 48, torch.float32), 4, torch.float32)
    dropout = LoraDropout(model, 0.5, seed=1)
    x = torch.randn(2, 1, 16).expand(2, 5, 16)
    with dropout.masks("train", [(0,)]):
        output = model(x)
    torch.testing.assert_close(output, output[:, :1].expand_as(output))
    model.base_model.model.layer.lora_variant["default"] = FreshPerToken()
    output = model(x)
    assert not torch.allclose(output, output[:, :1].expand_as(output), atol=1e-2)


def masked_updates(model: PeftModel, dropout: LoraDropout, x: torch.Tensor, masks: int) -> torch.Tensor:
    """``(masks, out)``: the adapter's contribution to ``x`` ``(in,)`` under each mask."""
    with torch.no_grad(), model.disable_adapter():
        base = model(x[None])
    with torch.no_grad(), dropout.masks("train", [(n,) for n in range(masks)]):
        return model(x.expand(masks, -1)) - base


def test_rescaled_masks_keep_the_mean() -> None:
    torch.manual_seed(0)
    model = adapted(linear("Linear", 9, 6, torch.float32), 4, torch.float32)
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
    model = adapted(linear("Linear", 8, 5, torch.float32), 3, torch.float32)
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
    model = adapted(linear("Linear", 9, 6, torch.float32), 4, torch.float32, alpha=folded_alpha(alpha, rate, False))
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


@pytest.mark.parametrize("kind", ["Linear", "Linear4bit"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_outside_the_context_stock_peft_runs(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = adapted(linear(kind, 64, 32, dtype), 4, dtype)
    assert type(model.base_model.model.layer).__name__ == kind
    x, upstream = random_input(64, 32, 2, 2, 3, dtype)
    before = computed(model, x, upstream)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    dropout = LoraDropout(model, 0.5, seed=1)
    with dropout.masks("train", [(0,), (1,)]):
        computed(model, x, upstream)
        assert model.state_dict().keys() == state.keys()
        assert [name for name, _ in model.named_modules()] == modules
    after = computed(model, x, upstream)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model.base_model.model.layer.lora_variant


def test_no_layer() -> None:
    model = adapted(nn.Linear(4, 4), 2, torch.float32)
    with pytest.raises(ValueError, match="no layer holds a LoRA adapter named 'other'"):
        LoraDropout(model, 0.5, seed=0, adapter_name="other")


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)], ids=lambda layer: type(layer).__name__)
def test_a_layer_without_a_mask_rule_is_named(layer: nn.Module) -> None:
    model = get_peft_model(OneLayer(layer), LoraConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=rf"no masks for {type(layer).__name__} \(layer\)"):
        LoraDropout(model, 0.5, seed=0)


def test_another_variant_is_refused() -> None:
    config = LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    model = get_peft_model(OneLayer(nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match="layer already has the LoRA variant DoraLinearVariant"):
        LoraDropout(model, 0.5, seed=0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    model = adapted(nn.Linear(4, 4), 2, torch.float32)
    with pytest.raises(ValueError, match=f"probability below 1, found {rate}"):
        LoraDropout(model, rate, seed=0)


def test_rows_that_do_not_divide_into_groups_are_refused_and_masks_leave() -> None:
    model = adapted(nn.Linear(4, 4), 2, torch.float32)
    dropout = LoraDropout(model, 0.5, seed=0)
    with (
        pytest.raises(ValueError, match="3 mask groups need a batch whose rows divide by 3, found 4 rows"),
        dropout.members(range(3)),
    ):
        model(torch.randn(4, 4))
    assert not model.base_model.model.layer.lora_variant


def test_contexts_do_not_nest() -> None:
    model = adapted(nn.Linear(4, 4), 2, torch.float32)
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
    if kind == "Linear8bitLt":
        layer: nn.Module = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
        layer.load_state_dict(nn.Linear(64, 32, bias=False).state_dict())
        layer = layer.to("cpu")
    else:
        layer = linear(kind, 64, 32, torch.float32)
    model = adapted(layer, 2, torch.float32)
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
