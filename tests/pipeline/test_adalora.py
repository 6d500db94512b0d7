"""AdaLoRA: its recipe, its allocation against peft's, and training with it in every way it may run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from training_support import random_rows, write_rows
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pipeline.adalora import STATE_FILE, RankAllocation, kept_directions, layer_weights, orthogonality_loss
from pipeline.adapter import check_target_modules, lora_config
from pipeline.adapter_files import save_adapter, settings_of
from pipeline.arguments import sft_config
from pipeline.base import load_base, load_config, load_tokenizer
from pipeline.data import load_splits
from pipeline.distributed import adapter_weights
from pipeline.errors import UserError
from pipeline.estimate import rank_memory
from pipeline.forecast import model_shape, numerics_of
from pipeline.lora_dropout import LoraDropout
from pipeline.recipe import RecipeError, load_recipe
from pipeline.recipe.schema import AdaLora, Adapter, Dropout
from pipeline.trainer import LoraDropoutTrainer

RECIPE = """
name: allocated
seed: 5
base: {{model: {base}, quantization: none, dtype: float32}}
adapter:
  {{method: adalora, rank: 4, alpha: 16, adalora: {{interval: 2, warm_up: 0.2, final: 0.3}}, dropout: {{rate: 0.5}}}}
data:
  train: [{{path: {folder}/train.jsonl, prompt: "{{{{ instruction }}}} {{{{ input }}}}\\nAnswer:"}}]
  max_length: 48
training:
  {{max_steps: 10, per_device_train_batch_size: 2, learning_rate: 1.0e-2, optim: adamw_torch, logging_steps: 1,
   gradient_checkpointing: false, report_to: [], save_strategy: "no"}}
"""
LAYERS = 14  # two decoder layers, seven linear modules each
NF4 = ["base.quantization=nf4", "base.dtype=bfloat16"]
STEPS, WARM_UP, FINAL, INITIAL, RANK = 10, 2, 3, 6, 4


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("adalora")
    write_rows(folder / "train.jsonl", random_rows(60, seed=1))
    (folder / "recipe.yaml").write_text(RECIPE.format(base=small_base, folder=folder))
    return folder / "recipe.yaml"


def tiny_model(adapter: Adapter) -> PeftModel:
    """A LLaMA of two layers, random, with the adapter on it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), lora_config(adapter))


def adalora(**values: Any) -> Adapter:
    return Adapter(method="adalora", rank=RANK, dropout=Dropout(rate=0.0), **values)


# The recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adapter.adalora.warm_up=0.5", "adapter.adalora.final=0.5"],
            ["adapter.adalora.warm_up", "adapter.adalora.final 0.5"],
        ),
        (["adapter.adalora.initial_rank=4"], ["adalora.initial_rank", "adapter.rank", "found 4 and 4"]),
        (["adapter.method=lora"], ["adapter.adalora", "adapter.method"]),
        (["adapter.rank_stabilized=true"], ["adapter.rank_stabilized", "adapter.method"]),
        (["adapter.target_parameters=[experts.down_proj]"], ["adapter.target_parameters", "adapter.method"]),
        (
            ["adapter.dropout.rescale=false", "adapter.dropout.rate_pattern={q_proj: 0.1}"],
            ["adapter.dropout.rate_pattern", "adapter.dropout.rescale"],
        ),
        (["distributed.zero=3"], ["distributed.zero", "adapter.method"]),
        (
            ["training.gradient_checkpointing_kwargs={use_reentrant: true}"],
            ["training.gradient_checkpointing_kwargs", "distributed.zero", "adapter.method"],
        ),
    ],
)
def test_contradictions_name_both_keys(recipe_file: Path, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, overrides)
    assert len(caught.value.problems) == 1
    message = str(caught.value)
    print(message)
    assert all(part in message for part in expected)


def test_initial_rank_is_half_as_much_again_rounded_up() -> None:
    assert [Adapter(method="adalora", rank=rank).initial_rank for rank in (1, 2, 3, 16)] == [2, 3, 5, 24]
    assert Adapter(method="adalora", rank=8, adalora=AdaLora(initial_rank=9)).initial_rank == 9
    assert Adapter(rank=8).initial_rank == 8


def test_scalings_of_each_method() -> None:
    """alpha / rank, alpha / sqrt(rank), alpha / initial rank; (1-p)**2 folded in by the layer's own rate."""

    def scalings(adapter: Adapter) -> dict[str, float]:
        modules = tiny_model(adapter).get_base_model().model.layers[1].self_attn.named_children()
        return {name: module.scaling["default"] for name, module in modules if name in ("q_proj", "v_proj")}

    quarter = Dropout(rate=0.5, rescale=False)
    by_module = Dropout(rate=0.5, rescale=False, rate_pattern={"v_proj": 0.0, r".*\.1\.self_attn\.q_proj": 0.1})
    assert scalings(Adapter(rank=4, alpha=8)) == {"q_proj": 2.0, "v_proj": 2.0}
    assert scalings(Adapter(rank=4, alpha=8, rank_stabilized=True)) == {"q_proj": 4.0, "v_proj": 4.0}
    assert scalings(Adapter(rank=4, alpha=8, dropout=quarter)) == {"q_proj": 0.5, "v_proj": 0.5}
    assert scalings(Adapter(rank=4, alpha=8, dropout=by_module)) == pytest.approx({"q_proj": 1.62, "v_proj": 2.0})
    # peft divides by the initial rank in each forward pass
    assert scalings(Adapter(method="adalora", rank=4, alpha=8, dropout=quarter)) == {"q_proj": 2.0, "v_proj": 2.0}


def test_fused_weights_are_checked_by_name() -> None:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config)
    good = Adapter(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    check_target_modules(model, good)
    adapted = get_peft_model(model, lora_config(good))
    assert any("experts.lora_A" in name for name, _ in adapted.named_parameters())
    with pytest.raises(UserError, match=r"experts\.up_proj matches no weight.*\n.*mlp\.experts\.gate_up_proj"):
        check_target_modules(MixtralForCausalLM(config), Adapter(target_parameters=["experts.up_proj"]))
    with pytest.raises(UserError, match="has none: leave target_parameters out"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        check_target_modules(llama, Adapter(target_parameters=["experts.up_proj"]))


def test_estimates_count_the_initial_rank_and_the_importances(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    shape = model_shape(load_config(recipe.base, 2), recipe)
    modules = [
        module for module in load_base(recipe.base).model.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    assert len(modules) == LAYERS
    entries = sum(INITIAL * (module.in_features + module.out_features + 1) for module in modules)
    assert shape.adapter_parameters == entries
    kept_states = rank_memory(shape, numerics_of(recipe), 2, 2, 2, 48).optimizer
    assert kept_states == entries * (4 + 8) // 2 + entries * 8  # masters and moments shared by two, importances not


# One step ------------------------------------------------------------------------------------------------------------


def test_orthogonality_is_the_term_that_peft_adds() -> None:
    """To float32's last places; and the same under masks, since it is of the unmasked P and Q."""
    model = tiny_model(adalora())
    ids = torch.arange(12).view(2, 6)
    losses = []
    for weight in (0.0, 0.7):
        model.peft_config["default"].orth_reg_weight = weight
        losses.append(model(input_ids=ids, labels=ids).loss)
    term = orthogonality_loss(model)
    assert term.item() > 0.1
    torch.testing.assert_close(losses[1] - losses[0], 0.7 * term, rtol=0, atol=2e-6)
    with LoraDropout(model, rate=0.5, seed=1).masks("train", [(0,)]):
        assert torch.equal(orthogonality_loss(model), term)


def observed(model: PeftModel, steps: int) -> RankAllocation:
    """An allocator, ours, that saw as many random gradients as peft's own beside it."""
    allocation = RankAllocation(model, Accelerator(cpu=True), AdaLora())
    allocation.config.total_step, allocation.config.tinit, allocation.config.tfinal = 100, 1, 10
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for layer in allocation.layers.values():
            for weight in layer_weights(layer).values():
                weight.data = torch.randn(weight.shape, generator=generator)
                weight.grad = torch.randn(weight.shape, generator=generator)
        allocation.observe()
        model.base_model.rankallocator.update_ipt(model.base_model.model)
    return allocation


def test_importances_and_allocation_are_those_of_peft() -> None:
    model = tiny_model(adalora())
    allocation, theirs = observed(model, steps=4), model.base_model.rankallocator
    for name, layer in allocation.layers.items():
        for kind in layer_weights(layer):
            key = f"{name}.{kind}.default"
            # (1-b) x + b y against y + (1-b) (x - y): both right to a few units in the last place
            torch.testing.assert_close(allocation.importance[name][kind], theirs.exp_avg_ipt[key], rtol=3e-6, atol=1e-7)
            torch.testing.assert_close(
                allocation.uncertainty[name][kind], theirs.exp_avg_unc[key], rtol=3e-6, atol=1e-6
            )
    budget = 61
    theirs_kept = theirs.mask_to_budget(model.base_model.model, budget)
    ours_kept = kept_directions(allocation.scores(), budget)
    assert {f"{name}.lora_E.default": kept.tolist() for name, kept in ours_kept.items()} == theirs_kept
    assert sum(int(kept.sum()) for kept in ours_kept.values()) == budget


def test_a_budget_is_met_exactly_when_scores_are_equal() -> None:
    kept = kept_directions({"first": torch.zeros(6), "second": torch.tensor([0.0, 2.0, 0.0])}, 4)
    assert {name: values.tolist() for name, values in kept.items()} == {
        "first": [True, True, True, False, False, False],
        "second": [False, True, False],
    }


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    allocation = observed(tiny_model(adalora()), steps=2)
    before = {
        name: {kind: value.clone() for kind, value in kinds.items()} for name, kinds in allocation.importance.items()
    }
    layer_weights(next(iter(allocation.layers.values())))["lora_B"].grad[0, 0] = torch.inf
    allocation.observe()
    assert all(torch.equal(allocation.importance[n][k], v) for n, kinds in before.items() for k, v in kinds.items())


# Training, one process -----------------------------------------------------------------------------------------------


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


def test_a_layer_may_be_left_without_any_rank(tmp_path: Path) -> None:
    model = tiny_model(adalora())
    allocation = observed(model, steps=1)
    layers = [layer_weights(layer) for layer in allocation.layers.values()]
    with torch.no_grad():
        layers[3]["lora_E"].zero_()
        layers[5]["lora_E"][1:4] = 0
    allocation.on_train_end(None, None, None)  # type: ignore[arg-type]  # it reads the model only
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        save_adapter(model, adapter_weights(model), settings_of(Adapter(), 5), tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(adalora()).unload(), str(tmp_path)).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, before, rtol=1e-5, atol=1e-4)
    ranks = [len(weight) for name, weight in load_file(tmp_path / "adapter_model.safetensors").items() if "_E" in name]
    assert sorted(ranks) == [0, 3, *[6] * 12]


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


# Training, two ranks -------------------------------------------------------------------------------------------------

TWO_RANKS = {
    "fp32-zero2": [],
    "nf4-zero2": NF4,
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
