"""From the recipe to SFTConfig: what transformers and DeepSpeed would otherwise decide by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.arguments import check_reporters, sft_config
from pipeline.distributed import deepspeed_config
from pipeline.errors import UserError
from pipeline.recipe import Recipe


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"name": "r", "base": {"model": "b"}, "data": {"train": [{"path": "p"}]}, **sections})


def test_plain_python_uses_one_of_several_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else transformers multiplies the batch by the GPUs it sees, and trl refuses to train."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = sft_config(recipe(training={"per_device_train_batch_size": 3}), tmp_path)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 3


def test_limits_of_zero_3_are_for_4_bit_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sharded = deepspeed_config(recipe(distributed={"zero": 3}))
    whole = deepspeed_config(recipe(distributed={"zero": 3}, base={"model": "b", "quantization": "none"}))
    assert sharded is not None and whole is not None
    assert sharded["zero_optimization"]["stage3_max_live_parameters"] == 250_000_000  # type: ignore[index]
    assert "stage3_max_live_parameters" not in whole["zero_optimization"]  # type: ignore[operator]


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    check_reporters(recipe())
    check_reporters(recipe(training={"report_to": "none"}))
    with pytest.raises(UserError, match=r"training.report_to: 'no_such_tracker' is not installed"):
        check_reporters(recipe(training={"report_to": ["tensorboard", "no_such_tracker"]}))
