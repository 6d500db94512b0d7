"""Bytes that a checkpoint will take, as launch/check.py forecasts them, against bytes written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from pipeline.benchmark.random_checkpoint import RandomState, folder_bytes
from pipeline.benchmark.shapes import shape_config
from pipeline.preflight.estimate import PLAIN, ModelShape, Numerics
from pipeline.preflight.numbers import model_shape, numerics_of
from pipeline.preflight.storage import checkpoint_bytes, checkpoints_on_disk, optimizer_bytes
from pipeline.recipe import Recipe

TOLERANCE = 0.05
NF4 = Numerics("nf4", "bfloat16")


def recipe(training: dict[str, object] | None = None, **adapter: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "base": {"model": "m"},
            "data": {"train": [{"path": "d"}]},
            "adapter": {"rank": 16, **adapter},
            "training": training or {},
        }
    )


def forecast(config: LlamaConfig, of: Recipe, zero: int | None, ranks: int) -> int:
    return checkpoint_bytes(model_shape(config, of), numerics_of(of), zero, ranks)


def test_7b_shaped_adapter(tmp_path: Path) -> None:
    """LLaMA-2-7B, rank 16 on all linear layers, random values, 4 ranks: written by the writer that training uses."""
    config, of = shape_config("llama2-7b"), recipe()
    state = RandomState(config, of, ranks=4, seed=random.randrange(2**31))
    assert state.parameters == 39_976_960
    written = folder_bytes(state.write(tmp_path, 7))
    expected = forecast(config, of, 2, 4)
    print(f"written {written:,}, forecast {expected:,}")
    assert expected == pytest.approx(written, rel=TOLERANCE)
    assert written == pytest.approx(14 * state.parameters, rel=0.01)


@pytest.mark.parametrize("rank", [1, 8])
def test_small_adapters(rank: int, tmp_path: Path) -> None:
    """Where names, counters and JSON weigh as much as the numbers."""
    config, of = shape_config("tiny"), recipe(rank=rank)
    written = folder_bytes(RandomState(config, of, ranks=2, seed=rank).write(tmp_path, 7))
    # written without the trainer's own small files: state, identity, trainer's state
    assert forecast(config, of, 2, 2) == pytest.approx(written + 4_300, rel=TOLERANCE)


def closed_form(trained: int, per_parameter: int) -> tuple[ModelShape, int]:
    shape = ModelShape(
        parameters=10 * trained,
        quantizable=0,
        largest_linear=0,
        adapter_parameters=trained,
        adapter_tensors=0,
        layers=1,
        hidden=1,
        heads=1,
        linear_outputs=1,
    )
    return shape, per_parameter * trained


@given(st.integers(1, 10**9), st.integers(1, 1024))
def test_bytes_per_parameter(trained: int, ranks: int) -> None:
    """bfloat16 engine: adapter 2, master 4, two moments 8. float32, plain python: no master. One copy at any stage."""
    shape, expected = closed_form(trained, 14)
    small = checkpoint_bytes(closed_form(0, 0)[0], NF4, 2, ranks)
    for zero in range(4):
        assert checkpoint_bytes(shape, NF4, zero, ranks) - small == expected
    assert checkpoint_bytes(shape, Numerics("none", "float32"), 2, ranks) - small == 12 * trained
    plain = checkpoint_bytes(closed_form(0, 0)[0], NF4, PLAIN, 1)
    assert checkpoint_bytes(shape, NF4, PLAIN, 1) - plain == 12 * trained
    only_model = checkpoint_bytes(closed_form(0, 0)[0], NF4, 2, ranks, resumable=False)
    assert checkpoint_bytes(shape, NF4, 2, ranks, resumable=False) - only_model == 2 * trained


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [("adamw_torch", None, 8), ("adamw_torch_fused", None, 8), ("sgd", None, 0), ("sgd", "momentum=0.9", 4),
     ("rmsprop", None, 4), ("rmsprop", "momentum=0.9", 8), ("paged_adamw_8bit", None, 2), ("lion_32bit", None, 4)],
)  # fmt: skip
def test_optimizer_states(name: str, arguments: str | None, size: int) -> None:
    assert optimizer_bytes(name, arguments) == size


@pytest.mark.parametrize(("name", "arguments"), [("sgd", ""), ("sgd", "momentum=0.9"), ("rmsprop", "momentum=0.9")])
def test_optimizer_states_are_torchs(name: str, arguments: str) -> None:
    weight = torch.nn.Parameter(torch.ones(50))
    kinds = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[name]([weight], lr=0.1, momentum=0.9 if arguments else 0.0)
    weight.sum().backward()
    optimizer.step()
    held = [value for value in optimizer.state[weight].values() if torch.is_tensor(value) and value.dim()]
    assert sum(value.numel() * value.element_size() for value in held) == 50 * optimizer_bytes(name, arguments)


@pytest.mark.parametrize(
    ("strategy", "every", "limit", "best", "most"),
    [("no", 10, 2, True, 0), ("epoch", 10, 2, False, 3), ("epoch", 10, 2, True, 4), ("epoch", 10, None, True, 5),
     ("steps", 10, None, False, 10), ("steps", 0.25, None, False, 4), ("steps", 30, 2, False, 3),
     ("steps", 60, 9, True, 2)],
)  # fmt: skip
def test_checkpoints_on_disk(strategy: str, every: float, limit: int | None, best: bool, most: int) -> None:
    assert checkpoints_on_disk(strategy, every, steps=100, epochs=5, limit=limit, best=best) == most
