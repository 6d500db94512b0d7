"""What is evaluated: the base, the adapter, and the ways to average several models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftModel

from eval.adapters import weights_hash
from eval.lm.baselines import AdapterMembers, McDropoutMembers, adapter_names, further_adapters
from eval.lm.members import MaskedMembers, Members, OneModel
from eval.scores import SYSTEMS as SYSTEMS
from pipeline.adapter.check import ensemble_settings, why_unmasked
from pipeline.adapter.files import AdapterSettings, adapter_dropout, read_peft_config
from pipeline.errors import UserError
from pipeline.process.rank import world_size
from pipeline.recipe import Recipe, schema


@dataclass(frozen=True)
class System:
    """One of them, ready to answer."""

    name: str
    members: Members
    identity: Mapping[str, object] | None
    """What decides the members' answers beside base and adapter; None for one model."""
    further: tuple[Path, ...] = ()
    """Folders of the members' adapters, without the first."""

    @contextmanager
    def loaded(self, model: PeftModel) -> Iterator[None]:
        """The model as this system uses it."""
        if self.name == "base":
            with model.disable_adapter():
                yield
        else:
            with further_adapters(model, self.further):
                yield


def systems_of(recipe: Recipe, settings: AdapterSettings | None, adapter: Path) -> tuple[list[str], list[str]]:
    """The systems to run, in order, and what the reader of their scores must be warned of.

    An adapter that was not trained with masks, or with dropout on its input, gets their averages only where the recipe
    has a rate to draw with.

    Raises:
        UserError: nothing is left to run.
    """
    systems: list[str] = [system for system in SYSTEMS if system in recipe.eval.systems]
    if not systems:
        raise UserError(f"eval.systems: empty; name at least one of {', '.join(SYSTEMS)}")
    doubts = {
        "mc_dropout": _noise_doubt(recipe, adapter) if "mc_dropout" in systems else None,
        "ensemble": _mask_doubt(recipe, settings, adapter) if "ensemble" in systems else None,
    }
    found = {name: doubt for name, doubt in doubts.items() if doubt is not None}
    left = [system for system in systems if system not in found or found[system].rate is not None]
    if not left:
        reasons = "; ".join(doubt.reason for doubt in found.values())
        raise UserError(f"eval.systems: {reasons}; evaluate it with eval.systems=[base, deterministic]")
    return left, [doubt.warning for doubt in found.values()]


@dataclass(frozen=True)
class _Doubt:
    """About a system whose randomness the adapter was not trained with."""

    reason: str
    rate: float | None
    """At which it is evaluated all the same; None: it is left out."""
    worse: str
    """Why that is no good idea, as a sentence without its end."""

    @property
    def warning(self) -> str:
        return (
            f"{self.reason}, and {self.worse}." if self.rate else f"{self.reason}; {self.worse}. Evaluating the rest."
        )


def _mask_doubt(recipe: Recipe, settings: AdapterSettings | None, adapter: Path) -> _Doubt | None:
    """Masks at test time only are worse than none (``Drop_test`` in arXiv 2404.09610)."""
    if settings is not None and settings.masked:
        return None
    untrained, worse = f"{adapter} {why_unmasked(settings)}", "masks at test time only are worse than none"
    if not recipe.adapter.dropout.masked:
        reason = f"{untrained} and this recipe has no rate, so there is no ensemble over masks"
        return _Doubt(reason, None, worse)
    rate = recipe.adapter.dropout.rate
    return _Doubt(f"{untrained}; its ensemble is drawn with this recipe's rate {rate:g}", rate, worse)


def _noise_doubt(recipe: Recipe, adapter: Path) -> _Doubt | None:
    """Whether the adapter knows dropout on its input."""
    if read_peft_config(adapter).get("lora_dropout"):
        return None
    untrained = f"{adapter} was trained without dropout on the adapter's input"
    worse = "noise that training did not know is no estimate of what the adapter is unsure of"
    rate = recipe.eval.mc_dropout.rate
    if rate is None:
        reason = f"{untrained} and eval.mc_dropout.rate gives none, so there is no Monte Carlo dropout"
        return _Doubt(reason, None, worse)
    return _Doubt(f"{untrained}; its Monte Carlo dropout has this recipe's rate {rate:g}", rate, worse)


def mask_settings(settings: AdapterSettings | None, recipe: Recipe) -> AdapterSettings:
    """The masks of the ensemble: the adapter's, or the recipe's, with ``eval.ensemble.seed`` where it is given."""
    masks = ensemble_settings(settings, recipe)
    seed = recipe.eval.ensemble.seed
    return masks if seed is None else replace(masks, seed=seed)


def system(name: str, model: PeftModel, section: schema.Eval, masks: AdapterSettings) -> System:
    """The system of this name on a loaded model.

    All members are averaged as ``eval.ensemble.average`` says, so that systems differ in their members alone.

    Raises:
        UserError: the adapter has no layer that could be masked, or could have noise on its input.
    """
    if name == "ensemble":
        return _masked(model, section, masks)
    if name == "mc_dropout":
        return _noisy(model, section)
    if name == "deep_ensemble":
        return _of_several_adapters(model, section)
    return System(name, OneModel(), None)


def _masked(model: PeftModel, section: schema.Eval, masks: AdapterSettings) -> System:
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
    dropout = adapter_dropout(model, masks)
    most = 1 if any(layer.one_group for layer in dropout.layers.values()) else None
    return System("ensemble", MaskedMembers(dropout, ensemble, most), identity)


def _noisy(model: PeftModel, section: schema.Eval) -> System:
    noise = section.mc_dropout
    config = model.active_peft_config
    assert isinstance(config, LoraConfig)
    rate = noise.rate or config.lora_dropout
    members = McDropoutMembers(
        model,
        count=noise.instances,
        average=section.ensemble.average,
        rate=rate,
        seed=noise.seed,
        rows_per_pass=section.ensemble.rows_per_pass,
    )
    identity = {
        "kind": "dropout on the adapter's input",
        "instances": noise.instances,
        "average": members.average,
        "rate": rate,
        "seed": noise.seed,
        "layers": len(members.layers),
        # what shares a forward pass, and with it the noise, depends on these
        "processes": world_size(),
        "tasks": section.tasks,
        "num_fewshot": section.num_fewshot,
        "limit": section.limit,
        "batch_size": section.batch_size,
        "tokens_per_pass": section.tokens_per_pass,
        "rows_per_pass": members.rows_per_pass,
    }
    return System("mc_dropout", members, identity)


def _of_several_adapters(model: PeftModel, section: schema.Eval) -> System:
    further = tuple(map(Path, section.deep_ensemble))
    names = adapter_names(model, len(further))
    members = AdapterMembers(model, names, section.ensemble.average, section.ensemble.rows_per_pass)
    identity = {
        "kind": "adapters",
        "instances": members.count,
        "average": members.average,
        "further": [weights_hash(folder) for folder in further],
    }
    return System("deep_ensemble", members, identity, further)


def members_record(evaluated: System) -> dict[str, object] | None:
    """What ``results.json`` says of a system's members; None for one model."""
    if evaluated.identity is None:
        return None
    folders = {"folders": [str(folder) for folder in evaluated.further]} if evaluated.further else {}
    return {**evaluated.identity, **folders}


def description(name: str, section: schema.Eval) -> str:
    """A system in words."""
    average = f"average of {section.ensemble.average}"
    if name == "base":
        return "the base without adapter"
    if name == "deterministic":
        return "the adapter, masks off"
    if name == "mc_dropout":
        return (
            f"Monte Carlo dropout, {section.mc_dropout.instances} members with noise on the adapter's input, {average}"
        )
    if name == "deep_ensemble":
        return f"the deep ensemble of {1 + len(section.deep_ensemble)} adapters, masks off, {average}"
    balanced = "balanced " if section.ensemble.balanced else ""
    return f"the ensemble of {section.ensemble.instances} {balanced}masked adapters, {average}"


def mode_of(section: schema.Eval, systems: list[str]) -> Literal["exact", "fast"]:
    """How all systems of a run are scored: alike, so that their difference is theirs."""
    if section.mode != "auto":
        return section.mode
    return "exact" if set(systems) <= {"base", "deterministic"} else "fast"
