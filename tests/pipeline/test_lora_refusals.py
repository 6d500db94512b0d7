"""What LoRA Dropout cannot mask is refused by name, with what to do; nothing is left without masks in silence."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from lora_kinds import Experts
from lora_reference import OneLayer, adapted
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from torch import nn

from pipeline.lora_dropout import LoraDropout, refusals
from pipeline.lora_dropout.attach import MASKED_KINDS, masked_layers


class Model(nn.Module):
    """Layers side by side, each called by itself."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.layers[name](x)


def on(layer: nn.Module, **config: object) -> PeftModel:
    return get_peft_model(OneLayer(layer), LoraConfig(r=2, target_modules=["layer"], **config))


def linear() -> PeftModel:
    return adapted(nn.Linear(4, 4), LoraConfig(r=2, target_modules=["layer"]), torch.float32)


def test_no_layer() -> None:
    with pytest.raises(ValueError, match="no layer holds a LoRA adapter named 'other'"):
        LoraDropout(linear(), 0.5, seed=0, adapter_name="other")


def test_layers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two layers are called layer"):
        masked_layers(nn.ModuleList([linear(), linear()]), "default")


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, found {rate} for 'rate'"):
        LoraDropout(linear(), rate, seed=0)


def test_a_layer_type_without_masks_is_named_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"layer: LoRA Dropout has no masks for MultiheadAttention .* target_modules"):
        LoraDropout(on(nn.MultiheadAttention(4, 2)), 0.5, seed=0)


def test_another_quantisation_is_named_with_what_to_do() -> None:
    quantised = AwqLoraLinear(nn.Linear(4, 4), "default", LoraConfig(r=2), r=2)
    with pytest.raises(ValueError, match=r"layer: .* no masks for AwqLoraLinear .* 4 or 8 bits by bitsandbytes"):
        masked_layers(OneLayer(quantised), "default")


def test_a_type_of_another_package_is_named_too() -> None:
    model = on(nn.Linear(4, 4))
    target = model.base_model.model.layer
    target.__class__ = type("FutureLinear", (type(target),), {})
    with pytest.raises(ValueError, match=r"no masks for FutureLinear .* leave this layer out of target_modules"):
        LoraDropout(model, 0.5, seed=0)


@pytest.mark.parametrize(
    ("layer", "variant"),
    [
        (nn.Linear(4, 4), "DoraLinearVariant"),
        (nn.Embedding(4, 4), "DoraEmbeddingVariant"),
        (nn.Conv2d(4, 4, 1), "DoraConv2dVariant"),
    ],
)
def test_dora_is_refused_with_the_reason(layer: nn.Module, variant: str) -> None:
    with pytest.raises(ValueError, match=rf"layer already has the LoRA variant {variant}.*norm of W0 \+ BA.*use_dora"):
        LoraDropout(on(layer, use_dora=True), 0.5, seed=0)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alora_invocation_tokens": [1]}, r"ALoraLinearVariant.*set alora_invocation_tokens to None"),
        ({"init_lora_weights": "mica"}, r"MiCALinearVariant.*set init_lora_weights to another start"),
    ],
)
def test_other_variants_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraDropout(on(nn.Linear(4, 4), **config), 0.5, seed=0)


def test_a_bias_of_the_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: its adapter has a bias \(lora_bias\).*set lora_bias to False"):
        LoraDropout(on(nn.Linear(4, 4), lora_bias=True), 0.5, seed=0)


def subclasses_in(folders: list[Path], bases: set[str]) -> set[str]:
    """Classes defined there that inherit from one of the bases, directly or not; private ones left out."""
    classes = [
        node
        for folder in folders
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    found = set(bases)
    for _ in range(5):  # levels of inheritance
        found |= {c.name for c in classes for b in c.bases if isinstance(b, ast.Name | ast.Attribute)
                  and (b.id if isinstance(b, ast.Name) else b.attr) in found}  # fmt: skip
    return {name for name in found - bases if not name.startswith("_")}


def test_every_layer_and_variant_of_peft_is_masked_or_has_a_reason() -> None:
    """Contract with peft: a new one of theirs needs a decision here."""
    tuners = Path(peft.__file__).parent / "tuners"
    folders = [tuners / "lora", tuners / "adalora"]
    layers = subclasses_in(folders, {"LoraLayer"}) - {
        "AdaLoraLayer",
        "LoraEmbeddingATPHolder",
    }  # a base, and a torch embedding
    assert layers == {kind.__name__ for kind in MASKED_KINDS} | set(refusals.LAYERS)
    assert subclasses_in(folders, {"LoraVariant"}) == set(refusals.VARIANTS)


def test_rows_that_do_not_divide_into_groups_are_refused_and_masks_leave() -> None:
    model = linear()
    dropout = LoraDropout(model, 0.5, seed=0)
    with (
        pytest.raises(ValueError, match="3 mask groups need a batch whose rows divide by 3, found 4 rows"),
        dropout.members(range(3)),
    ):
        model(torch.randn(4, 4))
    assert not model.base_model.model.layer.lora_variant


def test_a_row_that_all_rows_share_has_one_mask() -> None:
    """DeBERTa's relative positions, BERT's positions."""
    model = linear()
    dropout = LoraDropout(model, 0.5, seed=0)
    with dropout.masks("train", [(0,)], rows=4):
        assert model(torch.randn(1, 7, 4)).shape == (1, 7, 4)
    message = "layer: masks for a batch of 4 rows, found 1 rows; what all rows share .*sequential.*target_modules"
    with pytest.raises(ValueError, match=message), dropout.masks("train", [(0,), (1,)], rows=4):
        model(torch.randn(1, 7, 4))


def test_positions_in_an_embedding_have_one_mask() -> None:
    model = on(nn.Embedding(9, 4))
    dropout = LoraDropout(model, 0.5, seed=0)
    positions = torch.arange(5)[None]
    with dropout.masks("train", [(0,)], rows=4):
        assert model(positions).shape == (1, 5, 4)
    with pytest.raises(ValueError, match=r"layer: 2 mask groups .*found 1 rows"), dropout.members([0, 1]):
        model(positions)


def test_one_weight_for_all_rows_has_one_mask() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"])
    model = adapted(Experts(3, 4, 4, is_transposed=False), config, torch.float32)
    dropout = LoraDropout(model, 0.5, seed=0)
    with (
        pytest.raises(ValueError, match=r"layer\.weight: its weight is one tensor for all rows.*execution: sequential"),
        dropout.members([0, 1]),
    ):
        pass
    with dropout.members([0]):
        model(torch.randn(2, 4))


def test_an_expert_of_a_list_has_one_mask_for_any_number_of_tokens() -> None:
    model = get_peft_model(
        nn.ModuleDict({"experts": nn.ModuleList([Model(up=nn.Linear(4, 4))])}), LoraConfig(r=2, target_modules=["up"])
    )
    dropout = LoraDropout(model, 0.5, seed=0)
    ((name, _),) = dropout.layers.items()
    with (
        pytest.raises(ValueError, match=rf"{name}: an expert sees only the tokens sent to it"),
        dropout.members([0, 1]),
    ):
        pass
    with dropout.masks("train", [(0,)], rows=4):
        assert model.base_model.model["experts"][0]("up", torch.randn(3, 4)).shape == (3, 4)


def test_convolutions_need_a_batch_and_a_row_for_each_example() -> None:
    model = on(nn.Conv1d(4, 4, 3))
    dropout = LoraDropout(model, 0.5, seed=0)
    with pytest.raises(ValueError, match="layer: a convolution under masks needs a batch of 3"), dropout.members([0]):
        model(torch.randn(4, 9))
    with (
        pytest.raises(ValueError, match="layer: a convolution cannot have 2 masks in one row of packed examples"),
        dropout.masks("train", [(0,), (1,)], lengths=[4, 5]),
    ):
        pass
    assert not model.base_model.model.layer.lora_variant


def test_a_merged_adapter_is_refused() -> None:
    model = linear()
    dropout = LoraDropout(model, 0.5, seed=0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="layer: an adapter is merged into its weight"), dropout.members([0]):
        pass


def test_an_adapter_that_is_not_active_is_refused() -> None:
    model = linear()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]))
    dropout = LoraDropout(model, 0.5, seed=0, adapter_name="other")
    with pytest.raises(ValueError, match=r"the adapter 'other' is not active.*set_adapter"), dropout.members([0]):
        pass
    model.set_adapter("other")
    with dropout.members([0]):
        model(torch.randn(2, 4))


def test_a_disabled_adapter_is_refused() -> None:
    model = linear()
    dropout = LoraDropout(model, 0.5, seed=0)
    with model.disable_adapter(), pytest.raises(ValueError, match="layer: adapters are disabled"), dropout.members([0]):
        pass


ADALORA = AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["layer"])
OTHER_ADALORA = AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["layer"], inference_mode=True)


KINDS = pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["layer"]), ADALORA], ids=["lora", "adalora"])


@KINDS
def test_an_adapter_disabled_or_changed_under_masks_is_told_on_leaving(config: PeftConfig) -> None:
    model = adapted(nn.Linear(4, 4), config, torch.float32)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"]) if config is not ADALORA else OTHER_ADALORA)
    dropout = LoraDropout(model, 0.5, seed=0)
    x = torch.randn(2, 4)
    stock = model(x)
    after = "It happened while masks were active; what ran since ran without them"
    with (
        pytest.raises(RuntimeError, match=f"layer: the adapter 'default' is not .*{after}"),
        dropout.members([0]),
    ):
        model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), stock)
    with pytest.raises(RuntimeError, match=f"layer: adapters are disabled.*{after}"), dropout.members([0]):
        model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(x), stock)
    with dropout.members([0]):  # no masks were left behind; and what is undone before the end is as it was
        with model.disable_adapter():
            model(x)
        assert not torch.equal(model(x), stock)


def test_an_exception_under_masks_is_not_replaced() -> None:
    model = linear()
    with pytest.raises(ZeroDivisionError), LoraDropout(model, 0.5, seed=0).members([0]):
        model.base_model.disable_adapter_layers()
        raise ZeroDivisionError


def test_adalora_merged_under_masks_is_told_on_leaving() -> None:
    model = adapted(nn.Linear(4, 4), ADALORA, torch.float32)
    weight = model.base_model.model.layer.base_layer.weight
    before = weight.detach().clone()
    message = "layer: an adapter is merged into its weight.*while masks were active"
    with pytest.raises(RuntimeError, match=message), LoraDropout(model, 0.5, seed=0).members([0]):
        model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before)


EXPERT = LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight"])


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (lambda: nn.Linear(4, 4), LoraConfig(r=2, target_modules=["layer"])),
        (lambda: nn.Embedding(4, 4), LoraConfig(r=2, target_modules=["layer"])),
        (lambda: nn.Conv1d(4, 4, 1), LoraConfig(r=2, target_modules=["layer"])),
        (lambda: Experts(3, 4, 4, is_transposed=False), EXPERT),
    ],
    ids=["linear", "embedding", "convolution", "experts"],
)
def test_a_merge_under_masks_is_refused_and_changes_nothing(
    layer: Callable[[], nn.Module], config: PeftConfig, safe: bool
) -> None:
    """peft would count the adapter as merged, and unmerging would take from the base what was never added."""
    model = adapted(layer(), config, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropout = LoraDropout(model, 0.5, seed=0)
    with dropout.members([0]), pytest.raises(RuntimeError, match=r"layer\S*: cannot be merged while masks are active"):
        model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.merge_adapter(safe_merge=safe)


@KINDS
def test_a_second_handle_cannot_take_the_masks_away(config: PeftConfig) -> None:
    """Its own end would leave the first one's rest without masks."""
    model = adapted(nn.Linear(4, 4), config, torch.float32)
    first, second = (LoraDropout(model, 0.5, seed=seed) for seed in (0, 1))
    x = torch.randn(2, 4)
    stock = model(x)
    with first.members([0]):
        masked = model(x)
        with pytest.raises(RuntimeError, match="layer: the adapter 'default' already has masks"), second.members([0]):
            pass
        assert torch.equal(model(x), masked)
    assert torch.equal(model(x), stock)
    with second.members([0]):
        model(x)


def test_packed_lengths_must_add_up() -> None:
    model = linear()
    dropout = LoraDropout(model, 0.5, seed=0)
    with (
        pytest.raises(ValueError, match="layer: masks for 2 examples of together 9 tokens, found 8 tokens"),
        dropout.masks("train", [(0,), (1,)], lengths=[4, 5]),
    ):
        model(torch.randn(1, 8, 4))


def test_adalora_with_nothing_left_of_a_layer() -> None:
    """AdaLoRA may take a layer's whole rank; peft then makes weights of no rows."""
    config = AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["layer"])
    model = adapted(nn.Linear(4, 4), config, torch.float32)
    target = model.base_model.model.layer
    target.update_layer("default", 0, 1, config=config)
    x = torch.randn(2, 4)
    with LoraDropout(model, 0.5, seed=0).members([0, 1]):
        assert torch.equal(model(x), target.base_layer(x))
