"""Where an optimizer's state is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.checkpoint.optimizer import restore_optimizer_states


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
