"""Which experiment a checkpoint belongs to: what must be equal for a run to go on in it as if nothing had happened."""

from __future__ import annotations

import re
from typing import Any

from pipeline.base import base_fingerprint
from pipeline.data import Splits
from pipeline.recipe import Recipe
from pipeline.recipe.training import resolved_training

FREE_SECTIONS = ("output", "eval", "supervision", "training")
"""What may change between two parts of a run; ``training`` is compared field by field."""

FREE_KEYS = (
    "name",
    "base.model",
    "base.tokenizer",
    "base.revision",
    "data.validation.source.path",
)
"""Names and places, where what lies there is compared by content; and what only measures."""

FREE_TRAINING = (
    "per_device_train_batch_size",  # their product with the number of ranks is compared
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "torch_empty_cache_steps",
    "ddp_timeout",
    "project",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "skip_memory_metrics",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
)
FREE_PREFIXES = ("save_", "log_", "logging_", "report_to", "trackio_", "dataloader_", "include_tokens_per_second")
"""Fields of ``training`` that leave every weight of the run as it is."""

NOT_FREE = "dataloader_drop_last"
"""Begins like them, and leaves out rows."""


def identity_of(recipe: Recipe, splits: Splits, rows_per_step: int) -> dict[str, Any]:
    """Of a run: dotted key of the recipe -> value, and fingerprints of what its paths lead to.

    Args:
        recipe: resolved.
        splits: of its data.
        rows_per_step: of the data in an optimizer step, over all ranks.
    """
    return {
        **significant_keys(recipe),
        "rows per optimizer step": rows_per_step,
        "files of the base": base_fingerprint(recipe.base),
        **{f"{source['split']} data": f"{source['rows']} rows, {source['sha256']}" for source in splits.sources},
        "tokens of the training rows": splits.tokens_sha256,
    }


def significant_keys(recipe: Recipe) -> dict[str, Any]:
    """Every key that can change a weight, with its value; defaults written out."""
    sections = recipe.model_dump(mode="json", exclude=set(FREE_SECTIONS))
    training = {
        name: value
        for name, value in resolved_training(recipe).items()
        if name == NOT_FREE or (name not in FREE_TRAINING and not name.startswith(FREE_PREFIXES))
    }
    keys = _flat({**sections, "training": training})
    return {key: value for key, value in keys.items() if key not in FREE_KEYS and not _is_place(key)}


def _is_place(key: str) -> bool:
    """Whether the key is ``data.train.<n>.path``."""
    return key.startswith("data.train.") and key.endswith(".path")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {key: value}
    return {dotted: leaf for name, child in items for dotted, leaf in _flat(child, f"{key}.{name}".lstrip(".")).items()}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key in which two identities differ."""
    return [
        f"{key}: {_shown(saved, key)} there, {_shown(now, key)} here"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and not key.startswith("distributed.")
    ]


def _shown(identity: dict[str, Any], key: str) -> str:
    return _HASH.sub(r"\1...", repr(identity[key])) if key in identity else "nothing"


_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
"""SHA-256: its beginning tells two apart."""
