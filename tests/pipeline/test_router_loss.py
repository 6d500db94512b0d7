"""The loss that routers of experts have of their own, beside trl's: a mean over a pass, not a sum over its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_jobs import NO_VALIDATION, RECIPE, TEMPLATE
from training_support import random_rows, write_rows
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, set_seed

from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_splits
from pipeline.recipe import load_recipe
from pipeline.trainer import LoraDropoutTrainer


@pytest.fixture
def recipe_file(tmp_path: Path, pocket_base: Path) -> Path:
    """Of two accumulated micro-batches on a random mixture of experts; its routers' loss outweighs the tokens'."""
    tokenizer = AutoTokenizer.from_pretrained(pocket_base)
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=len(tokenizer),
        router_aux_loss_coef=10.0,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", random_rows(8, seed=0))
    text = RECIPE.format(base=tmp_path / "base", folder=tmp_path, template=TEMPLATE.replace("\n", "\\n"))
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def first_step(recipe_file: Path, execution: str) -> dict[str, float]:
    """What is logged of it; B is still zero, so that all masks give one loss."""
    overrides = [
        *NO_VALIDATION,
        "adapter.target_modules=[q_proj]",
        "adapter.rank=4",
        "training.max_steps=1",
        "training.gradient_accumulation_steps=2",
        f"adapter.dropout.execution={execution}",
    ]
    recipe = load_recipe(recipe_file, overrides)
    tokenizer = load_tokenizer(recipe.base)
    arguments = sft_config(recipe, recipe_file.parent / "run")
    rows = load_splits(recipe, tokenizer).train
    set_seed(recipe.seed)
    trainer = LoraDropoutTrainer(recipe, load_base(recipe.base), arguments, tokenizer, rows, None, [])
    trainer.train()
    return next(line for line in trainer.state.log_history if "loss" in line)


def test_instances_one_after_another_count_it_once(recipe_file: Path) -> None:
    batched, sequential = (first_step(recipe_file, execution) for execution in ("batched", "sequential"))
    assert 10 * batched["aux_loss"] > 15  # else the next lines say nothing of it
    assert sequential["loss"] == pytest.approx(batched["loss"], abs=1e-4)
    assert sequential["grad_norm"] == pytest.approx(batched["grad_norm"], rel=1e-3)
    assert sequential["num_tokens"] == batched["num_tokens"] > 0
