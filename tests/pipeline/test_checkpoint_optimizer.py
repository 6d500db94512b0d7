"""Where an optimizer's state is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Adafactor

from pipeline.checkpoint.optimizer import optimizer_states, restore_optimizer_states


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_counter_is_where_torch_expects_it(fused: bool) -> None:
    """Beside the weights where the optimizer is fused: its kernel on a GPU reads it there. "meta" stands for a GPU."""
    weight = nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    states = {"step": {"w": torch.tensor(5.0)}, "exp_avg": {"w": torch.ones(3)}}
    restore_optimizer_states(optimizer, {"w": weight}, states)
    held = optimizer.state[weight]
    assert held["step"].device.type == ("meta" if fused else "cpu")
    assert held["exp_avg"].device.type == "meta"


def test_a_python_counter_comes_back_as_one() -> None:
    """bitsandbytes passes it to C as it is; Adafactor of transformers counts like that on a CPU."""
    whole, cut = (Adafactor([nn.Parameter(torch.ones(3, 4))], lr=0.1, relative_step=False) for _ in range(2))

    def steps(optimizer: Adafactor, gradients: list[torch.Tensor]) -> nn.Parameter:
        weight = optimizer.param_groups[0]["params"][0]
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
        return weight

    torch.manual_seed(0)
    gradients = list(torch.randn(4, 3, 4))
    expected = steps(whole, gradients)
    weight = steps(cut, gradients[:2])
    resumed = Adafactor([nn.Parameter(weight.detach().clone())], lr=0.1, relative_step=False)
    (its,) = resumed.param_groups[0]["params"]
    restore_optimizer_states(resumed, {"w": its}, optimizer_states(cut, {"w": weight}, keep=True))
    assert type(resumed.state[its]["step"]) is int
    assert torch.equal(steps(resumed, gradients[2:]), expected)
