"""AdaLoRA: its recipe, and its allocation against peft's. Training is in ``test_adalora_training.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from adalora_support import INITIAL, LAYERS, RANK, write_recipe
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerState

from pipeline.adapter.adalora import RankAllocation, kept_directions, layer_weights, orthogonality_loss
from pipeline.adapter.config import check_target_modules, lora_config
from pipeline.adapter.files import save_adapter, settings_of
from pipeline.base import load_base, load_config
from pipeline.distributed import adapter_weights
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.preflight.estimate import rank_memory
from pipeline.preflight.numbers import model_shape, numerics_of
from pipeline.recipe import RecipeError, load_recipe
from pipeline.recipe.schema import AdaLora, Adapter, Dropout


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("adalora"), small_base)


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
            ["training.gradient_checkpointing_kwargs={use_reentrant: true}", "distributed.zero=2"],
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


def test_nothing_is_allocated_before_anything_was_observed() -> None:
    allocation = observed(tiny_model(adalora()), steps=0)
    for layer in allocation.layers.values():
        torch.nn.init.ones_(layer_weights(layer)["lora_E"])
    allocation.on_step_end(None, TrainerState(global_step=10), None)  # type: ignore[arg-type]  # it reads the step
    assert not allocation.kept
    assert all(bool((layer_weights(layer)["lora_E"] == 1).all()) for layer in allocation.layers.values())


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    allocation = observed(tiny_model(adalora()), steps=2)
    before = {
        name: {kind: value.clone() for kind, value in kinds.items()} for name, kinds in allocation.importance.items()
    }
    layer_weights(next(iter(allocation.layers.values())))["lora_B"].grad[0, 0] = torch.inf
    allocation.observe()
    assert all(torch.equal(allocation.importance[n][k], v) for n, kinds in before.items() for k, v in kinds.items())


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
