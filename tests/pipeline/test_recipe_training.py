"""`training:` against trl's SFTConfig: every field is either accepted, with its type, or refused, with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import RecipeError, load_recipe
from pipeline.recipe.json_schema import all_keys
from pipeline.recipe.training import (
    BOUNDS,
    DEFAULTS,
    FORMER,
    REFUSED,
    accepted_types,
    effective_training,
    resolved_training,
)

RECIPE = """\
name: t
base: {model: b}
data: {train: [{path: d}], validation: {fraction: 0.1}}
training:
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + "  {}\n")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    (problem,) = caught.value.problems
    return str(problem)


def test_the_tables_name_only_fields_that_exist() -> None:
    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert fields >= set(REFUSED)
    assert fields >= set(BOUNDS)
    assert fields >= set(DEFAULTS)
    assert not fields & set(FORMER)
    assert set(accepted_types()) == fields - set(REFUSED)
    assert all(reason and "\n" not in reason for reason in [*REFUSED.values(), *FORMER.values()])


@pytest.mark.parametrize(
    ("field", "owner"),
    [
        ("output_dir", "output"), ("run_name", "name"), ("seed", "seed"), ("data_seed", "seed"), ("bf16", "base.dtype"),
        ("fp16", "base.dtype"), ("trust_remote_code", "base.trust_remote_code"), ("deepspeed", "distributed.zero"),
        ("max_length", "data.max_length"), ("optim_target_modules", "adapter.target_modules"),
        ("model_init_kwargs", "base.attention"),
    ],
)  # fmt: skip
def test_another_sections_field_names_the_owner(recipe_file: Path, field: str, owner: str) -> None:
    found = message(recipe_file, f"training.{field}=1")
    assert found.startswith(f"command line: training.{field}: not set here (found 1): set ")
    assert owner in found
    assert owner in all_keys()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "learning_rat=1",
            "unknown key (found 1), expected a field of trl's SFTConfig; did you mean training.learning",
        ),
        ("rank=1", "unknown key (found 1), expected a field of trl's SFTConfig; did you mean adapter.rank?"),
        ("packin=true", "expected a field of trl's SFTConfig; did you mean training.packing?"),
        ("eval_packin=true", "the nearest is eval_packing, not set here: validation rows are never packed"),
        ("packing_strategy=wrapped", "wrapped cuts an example over several rows"),
        ("packing_strategy=bfd_split", "bfd_split cuts an example over several rows"),
        ("packing_strategy=best", "found the text 'best', expected"),
        ("use_cpu=true", "the launcher's business"),
        ("resume_from_checkpoint=x", "set training.resume: auto, never, or the path of a checkpoint"),
        ("max_seq_length=512", "not set here (found 512): set data.max_length"),
        ("warmup_ratio=0.1", "set training.warmup_steps; below 1 it is a share of all steps"),
        ("learning_rate='2e-4'", "found the text '2e-4', expected a number of at least 0; write it without quotes"),
        ("learning_rate=-1", "found -1, expected a number of at least 0"),
        ("learning_rate=.nan", "found nan, expected a number of at least 0"),
        ("learning_rate=.inf", "found inf, expected a number of at least 0"),
        ("learning_rate=true", "found true, expected a number of at least 0"),
        ("per_device_train_batch_size=0", "found 0, expected a whole number of at least 1"),
        ("per_device_train_batch_size=4.0", "found 4.0, expected a whole number of at least 1; write 4"),
        ("max_steps=1e2", "found 100.0, expected a whole number of at least -1; write 100"),
        ("gradient_checkpointing=yes", "found the text 'yes', expected true or false; write true"),
        ("gradient_checkpointing=1", "found 1, expected true or false"),
        ("lr_scheduler_type=cos", "expected one of linear, cosine, cosine_with_restarts"),
        ("lr_scheduler_type=cos", "did you mean cosine?"),
        ("optim=adam", "did you mean adamw_torch?"),
        ("lr_scheduler_kwargs=cosine", "found the text 'cosine', expected a mapping, or null"),
        ("report_to=[tensorboard, 3]", "found a list of 2, expected text, or a list, each text, or null"),
        ("logging_steps=0", "found 0, expected a number above 0"),
        ("logging_steps=2.5", "found 2.5, expected a whole number of steps, or below 1 a share of them all"),
        # contradictions
        ("load_best_model_at_end=true", "needs training.metric_for_best_model: validation_loss"),
        ("save_strategy=best", "needs training.metric_for_best_model: validation_loss"),
    ],
)
def test_bad_value(recipe_file: Path, override: str, expected: str) -> None:
    assert expected in message(recipe_file, f"training.{override}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.validation=null", "training.eval_strategy=steps"], "steps needs validation rows, and data.validation"),
        (
            ["training={load_best_model_at_end: true, metric_for_best_model: validation_loss}", "distributed.zero=3"],
            "training.load_best_model_at_end: transformers cannot load a checkpoint back under distributed.zero 3",
        ),
        (
            ["training={load_best_model_at_end: true, metric_for_best_model: validation_loss, save_strategy: steps}"],
            "training.load_best_model_at_end: needs save_strategy best, or equal to eval_strategy; found save steps",
        ),
        (
            ["training={gradient_checkpointing: true, activation_checkpointing: false}"],
            "training.gradient_checkpointing: the older name of activation_checkpointing",
        ),
        (
            ["training={gradient_checkpointing_kwargs: {use_reentrant: false}}", "distributed.zero=3"],
            "training.gradient_checkpointing_kwargs: use_reentrant false does not work under distributed.zero 3",
        ),
    ],
)
def test_contradiction(recipe_file: Path, overrides: list[str], expected: str) -> None:
    assert expected in message(recipe_file, *overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=1", 1), ("learning_rate=2e-4", 2e-4), ("num_train_epochs=3", 3), ("save_strategy=no", "no"),
        ("lr_scheduler_type=cosine", "cosine"), ("optim=adamw_torch", "adamw_torch"), ("report_to=none", "none"),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]), ("warmup_steps=0.03", 0.03),
        ("gradient_checkpointing_kwargs={use_reentrant: false}", {"use_reentrant": False}),
        ("pad_to_multiple_of=8", 8), ("dataloader_num_workers=2", 2), ("logging_first_step=true", True),
    ],
)  # fmt: skip
def test_good_value_arrives_as_written(recipe_file: Path, override: str, value: Any) -> None:
    name = override.partition("=")[0]
    recipe = load_recipe(recipe_file, [f"training.{override}"])
    assert recipe.training == {name: value}


def test_sft_config_takes_every_accepted_default(recipe_file: Path, tmp_path: Path) -> None:
    """The accepted fields' own defaults pass our check, and what passes builds an SFTConfig."""
    from trl import SFTConfig

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(SFTConfig)
        if field.name in accepted_types() and isinstance(field.default, bool | int | float | str)
    }
    del defaults["gradient_checkpointing"]  # kept under its newer name
    values = {**defaults, "activation_checkpointing": True}
    overrides = [f"training.{name}={_yaml(value)}" for name, value in values.items()]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.training == values
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **effective_training(recipe))
    assert config.learning_rate == defaults["learning_rate"]


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else repr(value)


def test_effective_training_lays_the_recipe_on_our_defaults(recipe_file: Path) -> None:
    fields = effective_training(load_recipe(recipe_file, ["training.per_device_train_batch_size=7"]))
    assert fields["per_device_train_batch_size"] == 7
    assert fields["learning_rate"] == DEFAULTS["learning_rate"]
    assert fields["eval_strategy"] == "epoch"
    without = load_recipe(recipe_file, ["data.validation=null"])
    assert "eval_strategy" not in effective_training(without)


@pytest.mark.parametrize("overrides", [[], ["data.validation=null"], ["training={max_steps: 7, optim: adamw_8bit}"]])
def test_the_trainer_runs_with_what_the_check_reckons_with(
    recipe_file: Path, tmp_path: Path, overrides: list[str]
) -> None:
    from pipeline.arguments import sft_config

    recipe = load_recipe(recipe_file, overrides)
    config, resolved = sft_config(recipe, tmp_path / "run"), resolved_training(recipe)
    for name in (
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
        "max_steps", "learning_rate", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
        "eval_strategy", "activation_checkpointing", "optim", "report_to", "logging_nan_inf_filter",
    ):  # fmt: skip
        assert getattr(config, name) == resolved[name], name
