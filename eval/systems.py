"""What is evaluated: the base, the adapter, and the ways to average several models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from peft import PeftModel

from eval.lm.members import MaskedMembers, Members, OneModel
from pipeline.adapter.check import ensemble_settings, why_unmasked
from pipeline.adapter.files import AdapterSettings, adapter_dropout
from pipeline.errors import UserError
from pipeline.recipe import Recipe, schema

SYSTEMS = ("base", "deterministic", "mc_dropout", "deep_ensemble", "ensemble")
"""In the order they run; the last one that ran is what ``results.json`` reports at its top."""


@dataclass(frozen=True)
class System:
    """One of them, ready to answer."""

    name: str
    members: Members
    identity: Mapping[str, object] | None
    """What decides the members' answers beside base and adapter; None for one model."""

    @contextmanager
    def loaded(self, model: PeftModel) -> Iterator[None]:
        """The model as this system uses it."""
        if self.name == "base":
            with model.disable_adapter():
                yield
        else:
            yield


def systems_of(recipe: Recipe, settings: AdapterSettings | None, adapter: Path) -> tuple[list[str], list[str]]:
    """The systems to run, in order, and what the reader of their scores must be warned of.

    An adapter that was not trained with LoRA Dropout gets an ensemble only where the recipe has a rate to draw masks
    with; masks at test time only are worse than none (``Drop_test`` in arXiv 2404.09610).

    Raises:
        UserError: nothing is left to run.
    """
    systems: list[str] = [system for system in SYSTEMS if system in recipe.eval.systems]
    warnings = []
    if "ensemble" in systems and not (settings is not None and settings.masked):
        reason = f"{adapter} {why_unmasked(settings)}"
        worse = "masks at test time only are worse than none"
        if recipe.adapter.dropout.masked:
            rate = f"rate {recipe.adapter.dropout.rate:g}"
            warnings = [f"{reason}; its ensemble is drawn with this recipe's {rate}, and {worse}."]
        else:
            systems.remove("ensemble")
            reason = f"{reason} and this recipe has no rate, so there is no ensemble over masks"
            warnings = [f"{reason}; {worse}. Evaluating the rest."]
            if not systems:
                raise UserError(f"eval.systems: {reason}; evaluate it with eval.systems=[base, deterministic]")
    if not systems:
        raise UserError("eval.systems: empty; name at least one of base, deterministic, ensemble")
    return systems, warnings


def mask_settings(settings: AdapterSettings | None, recipe: Recipe) -> AdapterSettings:
    """The masks of the ensemble: the adapter's, or the recipe's, with ``eval.ensemble.seed`` where it is given."""
    masks = ensemble_settings(settings, recipe)
    seed = recipe.eval.ensemble.seed
    return masks if seed is None else replace(masks, seed=seed)


def system(name: str, model: PeftModel, section: schema.Eval, masks: AdapterSettings) -> System:
    """The system of this name on a loaded model."""
    if name != "ensemble":
        return System(name, OneModel(), None)
    ensemble = section.ensemble
    identity = {
        "kind": "masks",
        "instances": ensemble.instances,
        "average": ensemble.average,
        "balanced": ensemble.balanced,
        "rate": masks.rate,
        "rate_pattern": dict(masks.rate_pattern),
        "seed": masks.seed,
    }
    return System(name, MaskedMembers(adapter_dropout(model, masks), ensemble), identity)


def description(name: str, section: schema.Eval) -> str:
    """A system in words."""
    if name == "base":
        return "the base without adapter"
    if name == "deterministic":
        return "the adapter, masks off"
    balanced = "balanced " if section.ensemble.balanced else ""
    members = f"{section.ensemble.instances} {balanced}masked adapters"
    return f"the ensemble of {members}, average of {section.ensemble.average}"


def mode_of(section: schema.Eval, systems: list[str]) -> Literal["exact", "fast"]:
    """How all systems of a run are scored: alike, so that their difference is theirs."""
    if section.mode != "auto":
        return section.mode
    return "exact" if set(systems) <= {"base", "deterministic"} else "fast"
