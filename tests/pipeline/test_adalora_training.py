"""AdaLoRA in training: the schedule, what is saved, resume, and two ranks against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adalora_support import FINAL, INITIAL, LAYERS, RANK, STEPS, WARM_UP, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline.adapter.adalora import STATE_FILE
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.arguments import sft_config
from pipeline.base import load_base, load_tokenizer
from pipeline.data import load_splits
from pipeline.distributed import adapter_weights
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe import load_recipe
from pipeline.recipe.schema import Adapter
from pipeline.trainer import LoraDropoutTrainer

NF4 = ["base.quantization=nf4", "base.dtype=bfloat16"]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("adalora"), small_base)


# One process ---------------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Losses, and how many singular values are not zero after each step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.ranks: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: PeftModel, **kwargs: Any) -> None:
        values = [p for name, p in model.named_parameters() if "lora_E" in name]
        self.ranks.append(sum(int((value != 0).sum()) for value in values))


def prepared(recipe_file: Path, folder: Path, *overrides: str) -> tuple[LoraDropoutTrainer, Recorder]:
    """The trainer, ready to train, as pipeline.train puts it together."""
    recipe = load_recipe(recipe_file, overrides)
    tokenizer = load_tokenizer(recipe.base)
    arguments = sft_config(recipe, folder)
    splits = load_splits(recipe, tokenizer)
    set_seed(recipe.seed)
    recorder = Recorder()
    trainer = LoraDropoutTrainer(recipe, load_base(recipe.base), arguments, tokenizer, splits.train, None, [recorder])
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    return trainer, recorder


def final_weights(trainer: LoraDropoutTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ranks_follow_the_schedule_and_stock_peft_loads_what_is_saved(
    recipe_file: Path, tmp_path: Path, quantization: str
) -> None:
    overrides = [f"base.quantization={quantization}"]  # computing in float32, to see small differences
    trainer, recorder = prepared(recipe_file, tmp_path, *overrides)
    trainer.train()
    config = trainer.adapted.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step, config.init_r) == (WARM_UP, FINAL, STEPS, INITIAL)
    # cubic from step 2 to step 7; allocated at 4 and 6, and at 7 for good; 5 moves what was pruned again
    cubic = [int(LAYERS * (INITIAL - RANK) * (1 - (step - 2) / 5) ** 3 + LAYERS * RANK) for step in (4, 6, 7)]
    full, budget = LAYERS * INITIAL, LAYERS * RANK
    assert cubic[-1] == budget
    assert recorder.ranks == [0, full, full, full, cubic[0], full, cubic[1], budget, budget, budget]

    save_adapter(trainer.adapted, adapter_weights(trainer.adapted), settings_of(Adapter(), 5), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ranks = [len(weight) for name, weight in saved.items() if "lora_E" in name]
    assert sum(ranks) == budget and len(set(ranks)) > 1  # the layers differ
    assert all(bool((weight != 0).all()) for name, weight in saved.items() if "lora_E" in name)
    ids = torch.randint(5, 200, (2, 12))
    stock = PeftModel.from_pretrained(load_base(load_recipe(recipe_file, overrides).base), str(tmp_path)).eval()
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=ids).logits for model in (trainer.adapted, stock))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
        members = []
        for model in (trainer.adapted, stock):
            with LoraDropout(model, rate=0.5, seed=5).members([0, 1]):
                members.append(model(input_ids=ids).logits)
        torch.testing.assert_close(members[1], members[0], rtol=0, atol=1e-4)
        assert (members[0] - ours).abs().max() > 0.1
        with stock.disable_adapter():
            assert (stock(input_ids=ids).logits - ours).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.gradient_accumulation_steps=3"],
        [
            "training.gradient_accumulation_steps=2",
            "adapter.dropout.instances=2",
            "adapter.dropout.execution=sequential",
        ],
    ],
    ids=["plain", "accumulated", "sequential"],
)
def test_the_orthogonality_term_counts_once_per_step(recipe_file: Path, tmp_path: Path, overrides: list[str]) -> None:
    """In the logged loss, to float32's places; it is logged beside it, and is the term that peft defines."""
    logs = []
    for weight in ("0.0", "0.5"):
        trainer, recorder = prepared(
            recipe_file, tmp_path, "training.max_steps=2", f"adapter.adalora.orthogonality={weight}", *overrides
        )
        trainer.train()
        logs.append(recorder.logs[0])
    assert logs[0]["orthogonality"] == 0 and logs[1]["orthogonality"] > 0.1
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(logs[1]["orthogonality"], abs=1e-5)


@pytest.mark.parametrize("stop", [5, 8], ids=["while ranks fall", "when they are settled"])
def test_resumed_equals_uninterrupted(recipe_file: Path, tmp_path: Path, stop: int) -> None:
    saving = ("training.save_strategy=steps", f"training.save_steps={stop}")
    whole, recorder = prepared(recipe_file, tmp_path, *saving)
    whole.train()
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{stop}"
    assert (checkpoint / STATE_FILE).exists()
    resumed, again = prepared(recipe_file, tmp_path, *saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [log["loss"] for log in again.logs] == [log["loss"] for log in recorder.logs[stop:]]
    weights = final_weights(resumed)
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(whole).items())
    assert resumed.adapted.peft_config["default"].rank_pattern == whole.adapted.peft_config["default"].rank_pattern

    (checkpoint / STATE_FILE).unlink()
    stateless, _ = prepared(recipe_file, tmp_path, *saving)
    with pytest.raises(UserError, match=f"no {STATE_FILE}"):
        stateless.train(resume_from_checkpoint=str(checkpoint))


def test_too_few_steps_to_share_out(recipe_file: Path, tmp_path: Path) -> None:
    trainer, _ = prepared(recipe_file, tmp_path, "training.max_steps=1")
    with pytest.raises(UserError, match=r"of 1 training steps.*\n.*lower adapter\.adalora\.final"):
        trainer.train()


# Two ranks -----------------------------------------------------------------------------------------------------------

TWO_RANKS = {
    "fp32-zero2": ["distributed.zero=2"],
    "nf4-zero2": [*NF4, "distributed.zero=2"],
    "nf4-zero0": [*NF4, "distributed.zero=0"],
}
WORKER = Path(__file__).with_name("adalora_worker.py")


@pytest.fixture(scope="module")
def two(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], ...]]:
    """What each rank held after each configuration, and the folder with the adapters."""
    folder = tmp_path_factory.mktemp("two-ranks")
    jobs = [{"name": name, "recipe": str(recipe_file), "overrides": overrides} for name, overrides in TWO_RANKS.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launcher, str(WORKER), str(folder / "jobs.json"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, f"{process.stdout[-5000:]}\n{process.stderr[-5000:]}"
    return {
        name: tuple(
            {**json.loads((folder / f"{name}.{rank}.json").read_text()), "folder": folder / name} for rank in (0, 1)
        )
        for name in TWO_RANKS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_ranks_agree_and_pruned_values_are_zero_everywhere(
    two: dict[str, tuple[dict[str, Any], ...]], name: str
) -> None:
    first, second = two[name]
    assert (first["trained"], first["rank_numbers"]) == (["lora_A", "lora_B", "lora_E"], [INITIAL])
    for what in ("kept", "values", "masters", "importance"):
        assert first[what] == second[what], what
    assert sum(sum(kept) for kept in first["kept"].values()) == LAYERS * RANK
    for layer, kept in first["kept"].items():
        for where in ("values", "masters"):
            assert [value != 0 for value in first[where][layer]] == kept, (layer, where)
    saved = load_file(first["folder"] / "adapter_model.safetensors")
    pattern = json.loads((first["folder"] / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern == {f"{layer}.lora_E": kept for layer, kept in first["kept"].items()}
    for layer, kept in first["kept"].items():
        values = torch.tensor(first["values"][layer])[torch.tensor(kept)]
        assert torch.equal(saved[f"base_model.model.{layer}.lora_E"][:, 0].float(), values), layer


@pytest.mark.slow
def test_two_ranks_equal_accumulation(
    two: dict[str, tuple[dict[str, Any], ...]], recipe_file: Path, tmp_path: Path
) -> None:
    """Losses to 2e-5 nats, importances to 1e-4 of their sums, and the same ranks for the same layers."""
    trainer, recorder = prepared(recipe_file, tmp_path, "training.gradient_accumulation_steps=2")
    trainer.train()
    ranks = two["fp32-zero2"][0]
    differences = [abs(log["loss"] - other) for log, other in zip(recorder.logs, ranks["losses"], strict=True)]
    print(differences)
    assert max(differences) < 2e-5
    allocation = trainer.allocation
    assert allocation is not None
    assert {name: kept.tolist() for name, kept in allocation.kept.items()} == ranks["kept"]
    for name, kinds in allocation.importance.items():
        for kind, value in kinds.items():
            assert value.double().sum().item() == pytest.approx(ranks["importance"][name][kind], rel=1e-4)


@pytest.mark.slow
def test_zero_0_and_2_train_alike_in_16_bits(two: dict[str, tuple[dict[str, Any], ...]]) -> None:
    """Two ranks add two numbers in either order alike: the same bits so far. Unpruned masters move losses by 6e-3."""
    losses = [two[name][0]["losses"] for name in ("nf4-zero2", "nf4-zero0")]
    differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
    print(differences)
    assert max(differences) < 3e-3
