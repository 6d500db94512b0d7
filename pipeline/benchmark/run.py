"""The benchmark: build, warm up, measure memory, time in interleaved rounds."""

from __future__ import annotations

import gc
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.base import DTYPES, check_device, check_length, default_device, load_base, load_config, load_tokenizer
from pipeline.benchmark.layers import LayerSubject, frozen_linear
from pipeline.benchmark.measure import Subject, interleaved, memory_rise
from pipeline.benchmark.random_base import plain_tokenizer, random_base
from pipeline.benchmark.result import Result, Row
from pipeline.benchmark.shapes import shape_config
from pipeline.benchmark.statistics import timing
from pipeline.benchmark.trainers import TrainingSubject, frozen_bytes, synthetic_rows
from pipeline.benchmark.variants import REFERENCE, Variant, parse_variants
from pipeline.data import load_splits
from pipeline.errors import UserError
from pipeline.preflight.estimate import PLAIN, ModelShape, in_words
from pipeline.preflight.execution import device_memory
from pipeline.preflight.numbers import Execution, batch_of, flat, memory_of, model_shape
from pipeline.process.environment import keep_freed_memory
from pipeline.process.rank import launched
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training
from pipeline.redaction import command_line
from pipeline.run.provenance import git_state, now, versions


@dataclass(frozen=True)
class Settings:
    """What is measured, besides the recipe."""

    variants: str
    """Names, separated by commas."""
    shape: str | None = None
    """Random base of a known shape instead of the recipe's."""
    layers: int | None = None
    """Of the shape, where the depth is cut."""
    tokens: int | None = None
    """Random tokens per row; None: the recipe's rows, or with a shape ``data.max_length``."""
    layer_only: bool = False
    """One linear layer instead of the model."""
    rounds: int = 10
    warmup: int = 2
    seed: int = 0


@dataclass(frozen=True)
class _Bench:
    """What is timed, and what is known of it."""

    subjects: Mapping[str, Subject]
    base_bytes: int
    tokens: Callable[[str], float]
    """Tokens of the data per step, of a variant."""
    found: Mapping[str, Any]
    """For the conditions."""
    training: dict[str, float] | None = None


def benchmark(recipe: Recipe, settings: Settings, announce: Callable[[str], None]) -> Result:
    """Time and memory of each variant on the recipe's settings, ratios to plain LoRA in one run.

    Args:
        recipe: whose base, adapter, batch and training settings all variants share.
        settings: of the measurement.
        announce: told what happens, for a progress line.

    Raises:
        UserError: what cannot be run, or not on this machine.
    """
    variants = parse_variants(settings.variants, recipe.adapter.dropout)
    recipe = _with_tokens(recipe, settings)
    _check(recipe, settings)
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    config = shape_config(settings.shape, settings.layers) if settings.shape else load_config(recipe.base)
    check_length(config, recipe.base, recipe.data.max_length)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if settings.layer_only:
                bench = _one_layer(recipe, settings, config, variants, device)
            else:
                _check_memory(recipe, config, variants)
                bench = _whole_model(recipe, settings, config, variants, device, Path(folder), announce)
            peaks = {}
            for name, subject in bench.subjects.items():
                announce(f"warm-up and memory: {name}")
                subject.run()  # creates the optimizer's states
                peaks[name] = bench.base_bytes + subject.own_bytes() + memory_rise(subject.run, device)
            samples = interleaved(
                bench.subjects,
                device,
                settings.rounds,
                max(settings.warmup - 2, 0),
                settings.seed,
                lambda number: announce(f"round {number} of {settings.rounds}"),
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: {_ADVICE}") from error
    rows = []
    for variant in variants:
        reference = samples[REFERENCE]
        phases = {
            phase: timing(seconds, reference[phase], settings.seed) for phase, seconds in samples[variant.name].items()
        }
        whole = list(phases.values())[-1].median
        rows.append(Row(variant, phases, bench.tokens(variant.name) / whole, peaks[variant.name]))
    return Result({**_conditions(recipe, settings, device), **bench.found}, rows, bench.training)


_ADVICE = "name fewer or smaller --variants, or lower training.per_device_train_batch_size, --tokens or --layers"


def _with_tokens(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the length of synthetic rows as its longest, which the estimates go by."""
    if settings.tokens is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": settings.tokens})})


def _check(recipe: Recipe, settings: Settings) -> None:
    """Refuse what is not compared here.

    Raises:
        UserError: says why.
    """
    if launched():
        raise UserError("launch/benchmark.py times one process: start it with `python`, not through a launcher")
    if settings.layers is not None and settings.shape is None:
        raise UserError("--layers: cuts the depth of a --shape; the recipe's own base is timed whole")
    if recipe.adapter.method != "lora":
        raise UserError(f"adapter.method: found {recipe.adapter.method!r}; the benchmark compares lora")
    if recipe.base.quantization == "int8":
        raise UserError(
            "base.quantization: bitsandbytes moves an int8 weight into the layer that first uses it, so that the "
            "variants cannot share one base.\nSet base.quantization to nf4 or none."
        )
    if flat(recipe):
        raise UserError("training.packing, training.padding_free: stock peft cannot mask packed examples; unset them")
    check_device(recipe.base)


def _check_memory(recipe: Recipe, config: PretrainedConfig, variants: Sequence[Variant]) -> None:
    """Refuse what does not fit: the base once, every variant's adapter and optimizer, the largest step.

    Raises:
        UserError: with the estimate.
    """
    device = device_memory()
    needed, largest, largest_step = 0, "", 0
    shapes: dict[bool, ModelShape] = {}  # with masks and without: numbers of instances change no size
    for variant in variants:
        applied = variant.applied(recipe)
        if variant.stock not in shapes:
            shapes[variant.stock] = model_shape(config, applied)
        shape = shapes[variant.stock]
        execution: Execution = "sequential" if variant.copies_at_once < variant.copies else "batched"
        memory = memory_of(applied, shape, PLAIN, 1, execution, recipe.data.max_length)
        needed += memory.at_rest - memory.base + (memory.base if variant.name == REFERENCE else 0)
        if memory.step_peak - memory.at_rest > largest_step:
            largest, largest_step = variant.name, memory.step_peak - memory.at_rest
    needed += largest_step
    if needed > device.free:
        raise UserError(
            f"memory: about {in_words(needed)} are needed ({in_words(largest_step)} of them for a step of {largest}), "
            f"and {device.device} has {in_words(device.free)} free of {in_words(device.total)}.\n"
            f"{_ADVICE[0].upper()}{_ADVICE[1:]}."
        )


def _whole_model(
    recipe: Recipe,
    settings: Settings,
    config: PretrainedConfig,
    variants: Sequence[Variant],
    device: torch.device,
    folder: Path,
    announce: Callable[[str], None],
) -> _Bench:
    """A trainer per variant on one base."""
    text = config.get_text_config()
    announce("building the base" if settings.shape else "loading the base")
    base, tokenizer, found = _base(recipe, settings, config, device)
    training = None
    if settings.shape is None and settings.tokens is None:
        rows = load_splits(recipe, tokenizer).train
        run = batch_of(recipe, len(rows), 1)
        training = {"steps": float(run.steps), "accumulation": float(run.accumulation)}
    else:
        micro_batch = resolved_training(recipe)["per_device_train_batch_size"]
        rows = synthetic_rows(8 * micro_batch, recipe.data.max_length, text.vocab_size, settings.seed)
    subjects = {}
    for variant in variants:
        announce(f"building the trainer: {variant.name}")
        subjects[variant.name] = TrainingSubject(variant, recipe, base, tokenizer, rows, folder)
    mean_length = _mean_length(rows)
    found |= {"layers": text.num_hidden_layers, "vocabulary": text.vocab_size, "tokens_per_row": mean_length}

    def tokens(name: str) -> float:
        seen = subjects[name].tokens[-settings.rounds :]
        return sum(seen) / len(seen)

    return _Bench(subjects, found["base_bytes"], tokens, found, training)


def _base(
    recipe: Recipe, settings: Settings, config: PretrainedConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model and tokenizer; a random one with what building it took."""
    if settings.shape is None:
        model = load_base(recipe.base)
        return model, load_tokenizer(recipe.base), {"base_bytes": frozen_bytes(model)}
    built: list[PreTrainedModel] = []
    assert isinstance(config, LlamaConfig)
    peak = memory_rise(lambda: built.append(random_base(config, recipe.base, device, settings.seed)), device)
    gc.collect()
    found = {"base_bytes": frozen_bytes(built[0]), "building_peak_bytes": peak}
    return built[0], plain_tokenizer(config.get_text_config().vocab_size), found


def _mean_length(rows: Dataset) -> float:
    return sum(len(ids) for ids in rows["input_ids"]) / len(rows)


def _one_layer(
    recipe: Recipe, settings: Settings, config: PretrainedConfig, variants: Sequence[Variant], device: torch.device
) -> _Bench:
    """The up projection of the model's MLP, by itself."""
    text = config.get_text_config()
    size_in, size_out = text.hidden_size, text.intermediate_size
    linear = frozen_linear(size_in, size_out, recipe, device)
    rows, length = resolved_training(recipe)["per_device_train_batch_size"], recipe.data.max_length
    x = torch.randn(rows, length, size_in, dtype=DTYPES[recipe.base.dtype], device=device)
    subjects = {variant.name: LayerSubject(variant, recipe, linear, x, size_out) for variant in variants}
    found = {"in": size_in, "out": size_out, "tokens_per_row": length, "base_bytes": frozen_bytes(linear)}
    return _Bench(subjects, found["base_bytes"], lambda _: float(rows * length), found)


def _conditions(recipe: Recipe, settings: Settings, device: torch.device) -> dict[str, Any]:
    """What the numbers hold under."""
    training = resolved_training(recipe)
    return {
        "level": "layer" if settings.layer_only else "model",
        "model": settings.shape or recipe.base.model,
        "quantization": recipe.base.quantization,
        "dtype": recipe.base.dtype,
        "rank": recipe.adapter.rank,
        "rate": recipe.adapter.dropout.rate,
        "target_modules": recipe.adapter.target_modules,
        "rows": training["per_device_train_batch_size"],
        "activation_checkpointing": training["activation_checkpointing"],
        "optimizer": training["optim"],
        "rounds": settings.rounds,
        "warmup": max(settings.warmup, 2),
        "seed": settings.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state(),
        "command": command_line(sys.argv),
        "finished": now(),
    }


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
