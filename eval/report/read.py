"""``results.json`` of an evaluation folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.recipe import Recipe

OBJECTS = ("results", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better", "lora_dropout")
"""Of lm-eval's keys, those that are read here."""


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of an evaluation folder. Raises UserError where it is missing, broken or not ours."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder}: no results.json here; expected a folder that launch/evaluate.py wrote")
    try:
        results = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); evaluate again") from error
    except (ValueError, RecursionError) as error:  # not text; nested too deeply
        raise UserError(f"{path}: not JSON ({error}); evaluate again") from error
    ours = results.get("lora_dropout") if isinstance(results, dict) else None
    if not isinstance(ours, dict) or "systems" not in ours:
        raise UserError(
            f"{path}: no section lora_dropout.systems; expected the file that launch/evaluate.py writes, "
            "stock lm-eval results have no systems to compare"
        )
    _check_kinds(path, results, OBJECTS)
    _check_kinds(path, ours, ("systems",))
    _check_kinds(path, ours, ("provenance", "recipe", "ensemble"), or_null=True)
    _check_kinds(path, ours["systems"], tuple(ours["systems"]))
    for name, system in ours["systems"].items():
        if not isinstance(system.get("results"), dict):
            raise UserError(f"{path}: lora_dropout.systems.{name} has no object results; evaluate again")
    _check_kinds(path, ours.get("provenance") or {}, ("training", "evaluation"), or_null=True)
    training = (ours.get("provenance") or {}).get("training") or {}
    if "seed" in training:
        _check_seed(path, "provenance.training.seed", training["seed"])
    if "ensemble" in ours["systems"]:
        _check_seed(path, "ensemble.seed", (ours.get("ensemble") or {}).get("seed"))
    for group, parts in results.get("group_subtasks", {}).items():
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{path}: group_subtasks.{group} is {parts!r}, expected a list of names; evaluate again")
    try:
        TopologicalSorter(results.get("group_subtasks", {})).prepare()
    except CycleError as error:
        raise UserError(f"{path}: group_subtasks: {error.args[1][0]} is a part of itself; evaluate again") from error
    return results


def _check_kinds(path: Path, holder: Mapping[str, Any], keys: tuple[str, ...], or_null: bool = False) -> None:
    """Raise UserError where one of the keys is there, and holds no object."""
    for key in keys:
        if key in holder and not isinstance(holder[key], dict) and not (or_null and holder[key] is None):
            raise UserError(f"{path}: {key} is {type(holder[key]).__name__}, expected an object; evaluate again")


def _check_seed(path: Path, key: str, seed: Any) -> None:
    if not isinstance(seed, int):
        raise UserError(f"{path}: lora_dropout.{key} is {seed!r}, expected a whole number; evaluate again")


def recorded_recipe(ours: Mapping[str, Any]) -> Recipe:
    """The recipe that was evaluated. Raises UserError where another version of this project wrote it."""
    try:
        return Recipe.model_validate_json(json.dumps(ours.get("recipe")))
    except ValidationError as error:
        raise UserError(f"results.json, lora_dropout.recipe: this version reads other recipes; {error}") from error
