"""Does a saved adapter fit the recipe and the base? Told before the base is loaded.

Stock peft loads what matches by name: tensors that are missing stay random, tensors too many are left out, both in
silence or with a warning.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from pipeline.adapter.files import (
    SETTINGS_FILE,
    WEIGHTS_FILE,
    AdapterSettings,
    adapter_dropout,
    adapter_rank,
    check_weights_file,
    load_adapter,
    read_peft_config,
    settings_of,
    without_false_warnings,
)
from pipeline.base import hollow_base
from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema
from pipeline.run.folder import RECIPE_FILE

PEFT_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError, re.error)
"""What peft raises for a configuration that finds no layer, contradicts itself, or holds values of another kind."""

Shape = tuple[int, ...]

SETTING_KEYS = {
    "method": "adapter.method",
    "alpha": "adapter.alpha",
    "rate": "adapter.dropout.rate",
    "rate_pattern": "adapter.dropout.rate_pattern",
    "rescale": "adapter.dropout.rescale",
}
"""Recorded settings that decide what the weights and their masks mean, and the recipe's key of each."""


def check_settings(settings: AdapterSettings | None, recipe: Recipe, folder: Path) -> None:
    """Compare what was recorded beside an adapter with the recipe that is to be its.

    An adapter without masks of its own has no rate that could differ: see :func:`ensemble_settings`.

    Raises:
        UserError: lists the differences, and what makes them agree.
    """
    if settings is None:
        return
    ours = settings_of(recipe.adapter, recipe.seed)
    names = list(SETTING_KEYS) if settings.masked else ["method", "alpha"]
    recorded = {SETTING_KEYS[name]: getattr(settings, name) for name in names}
    asked = {SETTING_KEYS[name]: getattr(ours, name) for name in names}
    stored = read_peft_config(folder)
    recorded |= {"adapter.rank": adapter_rank(stored), "adapter.rank_stabilized": stored.get("use_rslora", False)}
    asked |= {"adapter.rank": recipe.adapter.rank, "adapter.rank_stabilized": recipe.adapter.rank_stabilized}
    different = [key for key in recorded if recorded[key] != asked[key]]
    if not different:
        return
    lines = "\n".join(
        f"  {key}: trained with {_text(recorded[key])}, the recipe has {_text(asked[key])}" for key in different
    )
    overrides = " ".join(f"'{key}={_text(recorded[key])}'" for key in different)
    own = folder / RECIPE_FILE
    advice = f"Use its own recipe ({own}), or" if own.exists() else "Use the recipe that it was trained with, or"
    raise UserError(
        f"{folder}: trained with other settings than this recipe's, so scores would go under the wrong name:\n{lines}\n"
        f"{advice} make this one agree: {overrides}"
    )


def _text(value: object) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def why_unmasked(settings: AdapterSettings | None) -> str:
    """What is known of the training of an adapter that has no masks of its own."""
    if settings is None:
        return f"comes without {SETTINGS_FILE}, the record of a training with LoRA Dropout"
    return "was trained without LoRA Dropout (rate 0)"


def ensemble_settings(settings: AdapterSettings | None, recipe: Recipe) -> AdapterSettings:
    """The masks of an adapter's ensemble: its own; the recipe's, where it was trained without any."""
    return settings if settings is not None and settings.masked else settings_of(recipe.adapter, recipe.seed)


def check_adapter(base: schema.Base, folder: Path, ensemble: AdapterSettings | None = None) -> PeftModel:
    """Check an adapter's files against the layers of its base, without reading the base's weights.

    Args:
        base: only its configuration is read.
        folder: of the adapter.
        ensemble: also check that these masks can be made.

    Returns:
        The adapter on :func:`pipeline.base.hollow_base`: its weights and its layers are real, the base's are zero.

    Raises:
        UserError: the file is damaged or no safetensors file; numbers are not finite; tensors are missing, too many, or
            of other shapes.
    """
    found = stored_shapes(folder)
    check_finite(folder / WEIGHTS_FILE)
    config = read_peft_config(folder)
    hollow = hollow_base(base)
    try:
        with without_false_warnings():
            adapted = PeftModel(hollow, PeftConfig.from_pretrained(str(folder)))
    except PEFT_ERRORS as error:
        raise UserError(
            f"{folder}: this adapter does not go on {base.model!r}: {error}\n"
            f"It was trained on {config.get('base_model_name_or_path')!r}; name that base."
        ) from error
    _compare(found, adapter_shapes(adapted), base, folder / WEIGHTS_FILE, config)
    adapted = load_adapter(hollow_base(base), folder)
    if ensemble is not None:
        adapter_dropout(adapted, ensemble)
    return adapted


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes in ``adapter_model.safetensors``; only its header is read, against the file's size.

    Raises:
        UserError: no such file; truncated; not a safetensors file.
    """
    check_weights_file(folder)
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: {_damage(file, error)}") from error


def check_finite(file: Path) -> None:
    """Raise ``UserError`` for tensors with NaN or infinite values, which make every output NaN."""
    with safe_open(file, framework="pt") as tensors:
        broken = [
            f"{name} ({int((~finite).sum()):,} of {finite.numel():,})"
            for name in tensors.keys()  # noqa: SIM118
            if not (finite := torch.isfinite(tensors.get_tensor(name).float())).all()
        ]
    if broken:
        more = f", and {len(broken) - 4} more tensors" if len(broken) > 4 else ""
        raise UserError(
            f"{file}: NaN or infinite values in {', '.join(broken[:4])}{more}.\n"
            "Expected finite numbers: the training diverged, or the file was damaged. Take an earlier checkpoint of "
            "the run, or train again at a lower learning_rate."
        )


def _damage(file: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors cannot read, and what to do."""
    size, begin = file.stat().st_size, file.open("rb").read(64)
    if "incomplete metadata" in str(error) or "invalid header length" in str(error) or size < 8:
        return (
            f"truncated: it ends after {size:,} bytes, before what its header lists (safetensors: {error}).\n"
            "Copy it again, or train again: an interrupted copy or a full disk leaves this."
        )
    if begin.startswith((b"PK\x03\x04", b"\x80")):
        return (
            "a pickle (torch.save), not a safetensors file; a pickle can run code when it is read, so it is not.\n"
            "Expected safetensors. If you trust it: safetensors.torch.save_file(torch.load(FILE), NEW_FILE)."
        )
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights.\nFetch them with `git lfs pull`."
    return f"not a safetensors file (safetensors: {error}).\nExpected the adapter's weights as safetensors."


def adapter_shapes(model: PeftModel) -> dict[str, Shape]:
    """Names and shapes of an adapter's tensors, as in its file."""
    with without_false_warnings():
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _compare(
    found: dict[str, Shape], expected: dict[str, Shape], base: schema.Base, file: Path, config: dict[str, object]
) -> None:
    """Raise ``UserError`` for tensors that are missing, too many, or of other shapes."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    surplus = [f"{name} belongs to no layer of the base" for name in found if "lora_" in name and name not in expected]
    other = [
        f"{name}: found {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = other + missing + surplus
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:4])
        more = f"\n  and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{file}: {len(problems)} of its tensors do not fit {base.model!r} with this adapter_config.json:\n"
            f"{shown}{more}\n"
            f"It was trained on {config.get('base_model_name_or_path')!r}. Name that base; or, if files of two runs "
            "were mixed here, take the whole folder of one."
        )
