"""What `training:` may hold: trl's SFTConfig fields, but for those that another section owns or nothing here reads.

trl is imported when the section is looked at and not before: it brings torch along.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from pipeline.recipe.json_schema import Schema, all_keys
from pipeline.recipe.nodes import Node
from pipeline.recipe.problems import Problem, shown, shown_under
from pipeline.recipe.schema import Recipe
from pipeline.recipe.section import Contradiction
from pipeline.recipe.words import expected, hint

_DEEPSPEED = "DeepSpeed shards and reduces here: see distributed"
_COMPLETIONS = "the loss is on completions only; what they are is data.train's format, columns and prompt"
_EVAL_PACKING = "validation rows are never packed: each keeps its own loss"
_COLLATOR = "the collator carries each example's dataset row for its masks, and hands over what the trainer reads"
_LOSS_ONLY = "validation during training measures the loss; metrics are the eval section's"
_RESUME = "set training.resume: auto, never, or the path of a checkpoint"
_CALLBACKS = "training.resume restores what a run needs"
_HUB = "pushing is not supported yet: `hf upload` the run folder, it is a peft adapter"
_MODEL = "how the model is loaded is base's"
_FUSED_LOSS = "the loss comes from trl's fused head, whose log-probabilities the N instances share"
_TOPOLOGY = "the launcher's business: choose devices and processes on the command line"

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,  # trl's 2e-5 is for full fine-tuning; QLoRA section 4 uses 2e-4 up to 13B
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "report_to": ["tensorboard"],
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # True hides NaN losses behind the last good one
}
"""Where the recipe says nothing and trl's default is not what a small-data QLoRA run wants."""

DEFAULTS_WITH_VALIDATION: Mapping[str, Any] = {"eval_strategy": "epoch"}

OWN: Mapping[str, tuple[Any, Any, str]] = {
    "resume": (
        Annotated[str, Field(min_length=1)],
        "auto",
        "`auto`: go on from the newest good checkpoint of this very recipe in its output folder; `never`: refuse a "
        "folder that holds a run; else the path of a checkpoint, or of a run, to go on from.",
    ),
}
"""Keys of ours that stand among trl's: type, default, description."""

REFUSED: Mapping[str, str] = {
    # another section's
    "output_dir": "set output (the run writes to <output>/<name>)",
    "run_name": "set name",
    "seed": "set seed",
    "data_seed": "set seed",
    "bf16": "set base.dtype: bfloat16",
    "fp16": "set base.dtype: float16",
    "bf16_full_eval": "set base.dtype; validation computes as training does",
    "fp16_full_eval": "set base.dtype; validation computes as training does",
    "model_init_kwargs": f"set base.dtype, base.attention, base.revision or base.quantization; {_MODEL}",
    "trust_remote_code": "set base.trust_remote_code",
    "use_cache": "a training step never reads the key-value cache",
    "router_aux_loss_coef": "mixture-of-experts bases are not supported yet",
    "deepspeed": "set distributed.zero and distributed.offload",
    "fsdp": _DEEPSPEED,
    "fsdp_config": _DEEPSPEED,
    "parallelism_config": _DEEPSPEED,
    "accelerator_config": "each process draws its own micro-batches, and masks are numbered by that",
    "ddp_backend": _DEEPSPEED,
    "ddp_broadcast_buffers": _DEEPSPEED,
    "ddp_bucket_cap_mb": _DEEPSPEED,
    "ddp_find_unused_parameters": _DEEPSPEED,
    "ddp_static_graph": _DEEPSPEED,
    "use_cpu": f"{_TOPOLOGY}, e.g. CUDA_VISIBLE_DEVICES=",
    "local_rank": _TOPOLOGY,
    "max_length": "set data.max_length",
    "truncation_mode": "rows longer than data.max_length lose their end",
    "pad_token": "the tokenizer's: see base.tokenizer",
    "eos_token": "the tokenizer's: see base.tokenizer",
    "chat_template_path": "set data.train.0.prompt",
    "dataset_text_field": _COMPLETIONS,
    "dataset_kwargs": _COMPLETIONS,
    "dataset_num_proc": "rows are tokenised once, before training",
    "shuffle_dataset": "the sampler shuffles each epoch by seed: see train_sampling_strategy",
    "completion_only_loss": _COMPLETIONS,
    "assistant_only_loss": _COMPLETIONS,
    "length_column_name": _COLLATOR,
    "remove_unused_columns": _COLLATOR,
    "label_names": _COLLATOR,
    "optim_target_modules": "set adapter.target_modules",
    "do_train": "launch/sft.py trains",
    "do_eval": "set data.validation; eval_strategy says when",
    "do_predict": "the eval section scores the adapter",
    "eval_packing": _EVAL_PACKING,
    # what would change the experiment without a word, or hide that something is wrong
    "auto_find_batch_size": "a batch size that halves itself changes the experiment: set per_device_train_batch_size",
    "average_tokens_across_devices": "always on: the loss is the mean over all ranks' trained tokens",
    "logging_nan_inf_filter": "always off: a loss that is not finite must be seen",
    "hub_token": "a token in a recipe ends up in every report: run `hf auth login` or set HF_TOKEN",
    # not supported yet
    "label_smoothing_factor": _FUSED_LOSS,
    "loss_type": _FUSED_LOSS,
    "use_liger_kernel": _FUSED_LOSS,
    "liger_kernel_config": _FUSED_LOSS,
    "prediction_loss_only": _LOSS_ONLY,
    "batch_eval_metrics": _LOSS_ONLY,
    "include_for_metrics": _LOSS_ONLY,
    "eval_do_concat_batches": _LOSS_ONLY,
    "eval_use_gather_object": _LOSS_ONLY,
    "eval_accumulation_steps": _LOSS_ONLY,
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": "a resumed run goes on with the example after the last one it saw",
    "restore_callback_states_from_checkpoint": _CALLBACKS,
    "enable_jit_checkpoint": "a signal always saves a checkpoint first, on all ranks at the same step",
    "save_on_each_node": "the run folder is one, written by rank 0",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
"""SFTConfig fields that a recipe may not set, and what to do instead."""

FORMER: Mapping[str, str] = {
    "logging_dir": "set output (logs are written to <output>/<name>/runs)",
    "overwrite_output_dir": "a run never overwrites another: choose a name",
    "evaluation_strategy": "set training.eval_strategy",
    "warmup_ratio": "set training.warmup_steps; below 1 it is a share of all steps",
    "max_seq_length": "set data.max_length",
    "group_by_length": "set training.train_sampling_strategy: group_by_length",
    "no_cuda": f"{_TOPOLOGY}, e.g. CUDA_VISIBLE_DEVICES=",
    "save_safetensors": "adapters are always saved as safetensors",
}
"""Names that older trl and transformers took, and what to do instead."""

BOUNDS: Mapping[str, Any] = {
    "per_device_train_batch_size": Field(ge=1),
    "per_device_eval_batch_size": Field(ge=1),
    "gradient_accumulation_steps": Field(ge=1),
    "num_train_epochs": Field(gt=0),
    "max_steps": Field(ge=-1),
    "learning_rate": Field(ge=0),
    "weight_decay": Field(ge=0),
    "warmup_steps": Field(ge=0),
    "max_grad_norm": Field(ge=0),
    "adam_beta1": Field(ge=0, lt=1),
    "adam_beta2": Field(ge=0, lt=1),
    "adam_epsilon": Field(gt=0),
    "logging_steps": Field(gt=0),
    "save_steps": Field(gt=0),
    "eval_steps": Field(gt=0),
    "eval_delay": Field(ge=0),
    "save_total_limit": Field(ge=1),
    "torch_empty_cache_steps": Field(ge=1),
    "neftune_noise_alpha": Field(ge=0),
    "dataloader_num_workers": Field(ge=0),
    "dataloader_prefetch_factor": Field(ge=1),
    "ddp_timeout": Field(ge=1),
}
"""Limits that trl states in prose only, or not at all."""


@functools.cache
def _sft_fields() -> Mapping[str, dataclasses.Field[Any]]:
    from trl import SFTConfig

    return {field.name: field for field in dataclasses.fields(SFTConfig)}


def sft_field_names() -> tuple[str, ...]:
    """Every field of the installed trl's SFTConfig. Imports trl."""
    return tuple(_sft_fields())


@functools.cache
def accepted_types() -> Mapping[str, Any]:
    """The type of each field of trl's that a recipe may set. Imports trl."""
    return {
        name: Annotated[_recipe_type(field), BOUNDS[name]] if name in BOUNDS else _recipe_type(field)
        for name, field in _sft_fields().items()
        if name not in REFUSED
    }


def _recipe_type(field: dataclasses.Field[Any]) -> Any:
    if "choices" in field.metadata:
        words: Any = Literal[tuple(field.metadata["choices"])]
        return Union[words, None] if type(None) in get_args(field.type) else words  # noqa: UP007
    return _plain_type(field.type)


def _plain_type(annotation: Any) -> Any:
    """SFTConfig's annotation without the text forms that its command line needs; enums as their words."""
    if annotation is float:
        return FiniteFloat
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Literal[tuple(member.value for member in annotation)]
    if get_origin(annotation) is list:
        return list[_plain_type(get_args(annotation)[0])]  # type: ignore[misc]
    if get_origin(annotation) in (Union, types.UnionType):
        arms = get_args(annotation)
        wordy = any(
            arm is dict or get_origin(arm) is dict or (isinstance(arm, type) and issubclass(arm, enum.Enum))
            for arm in arms
        )
        return Union[tuple(_plain_type(arm) for arm in arms if not (wordy and arm is str))]  # noqa: UP007
    return annotation


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    annotation = OWN[name][0] if name in OWN else accepted_types()[name]
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def field_schemas() -> dict[str, Schema]:
    """JSON schema of every field that a recipe may set, with trl's words and defaults. Imports trl."""
    schemas: dict[str, Schema] = {
        name: {**_adapter(name).json_schema(), "description": description, "default": default}
        for name, (_, default, description) in OWN.items()
    }
    for name in accepted_types():
        field = _sft_fields()[name]
        default = DEFAULTS.get(name, field.default)
        schemas[name] = {
            **_adapter(name).json_schema(),
            "description": field.metadata.get("help", "").replace("%%", "%"),
            **({"default": default} if isinstance(default, bool | int | float | str | list) else {}),
        }
    return schemas


def training_problems(training: Node) -> list[Problem]:
    """What is wrong with the section, field by field. Imports trl where the section is not empty."""
    if not isinstance(training.value, dict):
        return []  # the recipe's own schema says so
    return [
        Problem(node.place, f"training.{name}", message)
        for name, node in training.value.items()
        for message in [_field_problem(name, node.plain())]
        if message
    ]


def _field_problem(name: str, value: Any) -> str | None:
    if name in REFUSED or name in FORMER:
        return f"not set here (found {shown_under((name,), value)}): {REFUSED.get(name) or FORMER[name]}"
    if name not in _sft_fields() and name not in OWN:
        return f"unknown key (found {shown_under((name,), value)}), expected a field of trl's SFTConfig{_nearest(name)}"
    try:
        _adapter(name).validate_python(value)
    except ValidationError:
        schema = _adapter(name).json_schema()
        return f"found {shown(value)}, expected {expected(schema)}{hint(value, schema)}"
    return None


def _nearest(name: str) -> str:
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(name, _sft_fields(), n=1)
    if near and near[0] in REFUSED:
        return f"; the nearest is {near[0]}, not set here: {REFUSED[near[0]]}"
    return f"; did you mean training.{near[0]}?" if near else ""


def effective_training(recipe: Recipe) -> dict[str, Any]:
    """trl's fields, with this project's defaults where the recipe says nothing; trl's own apply beneath them."""
    validated = DEFAULTS_WITH_VALIDATION if recipe.data.validation else {}
    theirs = {name: value for name, value in recipe.training.items() if name not in OWN}
    return {**DEFAULTS, **validated, **theirs}


def own_training(recipe: Recipe) -> dict[str, Any]:
    """The section's keys of ours, with their defaults."""
    return {name: recipe.training.get(name, default) for name, (_, default, _) in OWN.items()}


def resolved_training(recipe: Recipe) -> dict[str, Any]:
    """Every field that a recipe may set, with the value that is in force. Imports trl."""
    theirs = {
        name: field.default for name, field in _sft_fields().items() if name in accepted_types() or name in DEFAULTS
    }
    fields = {**theirs, **effective_training(recipe)}
    if fields["activation_checkpointing"] is None:  # SFTConfig prefers the newer name where it is set
        fields["activation_checkpointing"] = fields["gradient_checkpointing"]
    return fields


def sft_contradictions(recipe: Recipe) -> Contradiction | None:
    """Fields that are right one by one, but not together or not with another section; None where all agree."""
    problems = [
        *_evaluation_contradictions(recipe),
        *_checkpointing_contradictions(recipe),
        *_fractional_steps(recipe),
        *_packing_contradictions(recipe),
    ]
    return Contradiction(*problems) if problems else None


def _evaluation_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    fields = effective_training(recipe)
    evaluates, saves = fields.get("eval_strategy", "no"), fields["save_strategy"]
    if evaluates != "no" and recipe.data.validation is None:
        message = f"{evaluates} needs validation rows, and data.validation is not set: give it a fraction or a source"
        yield ("training.eval_strategy", "data.validation"), message
    chooses = [
        f"training.{key}"
        for key, needs in (
            ("load_best_model_at_end", fields.get("load_best_model_at_end", False)),
            ("save_strategy", saves == "best"),
            ("lr_scheduler_type", fields.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")),
        )
        if needs
    ]
    if chooses and evaluates == "no":
        yield (chooses[0], "training.eval_strategy"), "needs a validation loss: set data.validation and eval_strategy"
    if chooses and fields.get("metric_for_best_model") not in ("validation_loss", "eval_validation_loss"):
        message = "needs training.metric_for_best_model: validation_loss (the probe's loss is measured beside it)"
        yield (chooses[0], "training.metric_for_best_model"), message
    if not fields.get("load_best_model_at_end"):
        return
    if recipe.distributed.zero == 3:
        message = "transformers cannot load a checkpoint back under distributed.zero 3: use 2 or less"
        yield ("training.load_best_model_at_end", "distributed.zero"), message
    if saves not in ("best", evaluates):
        message = f"needs save_strategy best, or equal to eval_strategy; found save {saves}, eval {evaluates}"
        yield ("training.load_best_model_at_end", "training.save_strategy"), message


def _checkpointing_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    fields = recipe.training
    for name in ("checkpointing", "checkpointing_kwargs"):
        new, old = f"activation_{name}", f"gradient_{name}"
        if new in fields and old in fields:
            yield (f"training.{old}", f"training.{new}"), f"the older name of {new}, which is set too: keep {new}"
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        settings = fields.get(key)
        if recipe.distributed.zero == 3 and isinstance(settings, dict) and settings.get("use_reentrant") is False:
            message = "use_reentrant false does not work under distributed.zero 3: recomputation meets sharded weights"
            yield (f"training.{key}", "distributed.zero"), message


def _fractional_steps(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    for key in ("logging_steps", "eval_steps", "save_steps"):
        steps = recipe.training.get(key)
        if isinstance(steps, float) and steps > 1 and not steps.is_integer():
            yield (
                (f"training.{key}",),
                f"found {steps}, expected a whole number of steps, or below 1 a share of them all",
            )


def _packing_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    strategy = recipe.training.get("packing_strategy", "bfd")
    if strategy in ("bfd_split", "wrapped"):
        message = f"{strategy} cuts an example over several rows, and its parts would be trained as examples: use bfd"
        yield ("training.packing_strategy",), message
