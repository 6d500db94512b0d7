"""Several adapters on one model, each under its own masks or none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lora_kinds import KINDS
from lora_reference import adapted
from peft import PeftModel

from pipeline.lora_dropout import LoraDropout

SHOWN = ["Linear", "Linear4bit", "Embedding", "Conv2d", "experts", "SVDLinear"]


def with_two_adapters(kind: str) -> PeftModel:
    """Adapters "default" and "second", of other ranks, both random and both active."""
    torch.manual_seed(0)
    found = KINDS[kind]
    size_in, size_out, rank = found.shapes[0]
    layer = found.quantised(found.layer(size_in, size_out), torch.float32)
    model = adapted(layer, found.config(rank), torch.float32)
    second = found.config(rank + 1)
    second.inference_mode = kind.startswith("SVD")  # peft trains only one of AdaLoRA's
    model.add_adapter("second", second)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "second" in name:
            parameter.data.normal_()
    model.base_model.set_adapter(["default", "second"])
    return model


def output(model: PeftModel, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
    model.base_model.set_adapter(adapters)
    with torch.no_grad():
        return model(x)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles its 4-bit kernels for the CPU, which takes seconds for every dtype."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("kind", SHOWN)
def test_updates_add_up_each_under_its_own_masks(kind: str) -> None:
    model = with_two_adapters(kind)
    x = KINDS[kind].input(3, KINDS[kind].shapes[0][0], KINDS[kind].inner)
    first = LoraDropout(model, 0.5, seed=1)
    second = LoraDropout(model, 0.3, seed=2, adapter_name="second")
    assert first.layers.keys() == second.layers.keys()
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    stock_second = output(model, x, ["second"]) - base
    model.base_model.set_adapter(["default"])
    with first.members([0]):
        masked_first = output(model, x, ["default"]) - base
        only_first = output(model, x, ["default", "second"]) - base
    torch.testing.assert_close(only_first, masked_first + stock_second, atol=1e-4, rtol=1e-4)
    model.base_model.set_adapter(["second"])
    with second.members([0]):
        masked_second = output(model, x, ["second"]) - base
    model.base_model.set_adapter(["default", "second"])
    with first.members([0]), second.members([0]):
        both = output(model, x, ["default", "second"]) - base
    torch.testing.assert_close(both, masked_first + masked_second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(masked_second, stock_second, atol=1e-3)
    torch.testing.assert_close(output(model, x, ["second"]) - base, stock_second, atol=0, rtol=0)


@pytest.mark.parametrize("kind", SHOWN)
def test_contexts_may_end_in_any_order(kind: str) -> None:
    model = with_two_adapters(kind)
    stock = type(model.base_model.model.layer)
    first = LoraDropout(model, 0.5, seed=1)
    second = LoraDropout(model, 0.5, seed=1, adapter_name="second")
    outer, inner = first.members([0]), second.members([0])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert type(model.base_model.model.layer) is stock
    assert not model.base_model.model.layer.lora_variant and "masks" not in model.base_model.model.layer.__dict__
