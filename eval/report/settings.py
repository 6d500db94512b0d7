"""Settings and provenance, as the run recorded them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.numbers import capital
from pipeline.recipe import Recipe

BASELINES = {"mc_dropout": "MC dropout", "deep_ensemble": "Deep ensemble"}
MODES = {
    "exact": "exact: lm-eval's own code",
    "fast": "fast: shared prompt beginnings computed once, scores in float32",
}
PROVENANCE_ORDER = ("command", "started", "finished", "recipe sha256", "seed", "base", "data", "git", "versions")


def setting_rows(ours: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    """(setting, value). The adapter's are its own: the recipe may have changed since training."""
    base, trained, ensemble = recipe.base, ours.get("adapter_settings"), ours.get("ensemble")
    storage = {"nf4": "4-bit nf4", "int8": "8-bit int8", "none": "not quantised"}[base.quantization]
    found = [("Base model", f"{base.model}, {storage}, {base.dtype}"), ("Adapter", ours.get("adapter") or "none")]
    if trained:
        alpha, in_file = trained.get("alpha", trained["lora_alpha"]), trained["lora_alpha"]
        folded = "" if alpha == in_file else f" ({in_file:g} in adapter_config.json)"
        found += [("Rank, alpha", f"{trained['r']}, {alpha:g}{folded}")]
        found += dropout_rows(trained)
    if ensemble:
        balanced = "balanced " if ensemble.get("balanced") else ""
        members = f"{ensemble['instances']} {balanced}members, average of {ensemble['average']} at every token"
        found += [("Test ensemble", f"{members}, mask seed {ensemble['seed']}")]
    found += baseline_rows(ours["systems"])
    found += [(label, baseline_words(name, ours)) for name, label in BASELINES.items() if name in ours["systems"]]
    modes = sorted({system["mode"] for system in ours["systems"].values() if system.get("mode")})
    found += [("Scoring mode", " and ".join(MODES[mode] for mode in modes))] if modes else []
    prompts = {"task": "the task's own", "training": "the training prompt around the task's text"}
    fewshot, limit = recipe.eval.num_fewshot, ours.get("limit")
    return [
        *found,
        ("Prompt", prompts[ours["prompt"]]),
        ("Few-shot examples", "each task's own number" if fewshot is None else str(fewshot)),
        ("Documents", "all" if limit is None else f"first {limit} of each task"),
    ]


def baseline_rows(systems: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Members of the baselines, where they were run."""
    rows = []
    noise, adapters = (systems.get(name, {}).get("members") for name in ("mc_dropout", "deep_ensemble"))
    if noise:
        members = f"{noise['instances']} members, average of {noise['average']} at every token"
        drawn = f"rate {noise['rate']:g} on the adapter's input, noise seed {noise['seed']}"
        shares = "its noise also depends on what shares a forward pass (batch size, documents, processes)"
        rows.append(("MC dropout", f"{members}; {drawn}; {shares}"))
    if adapters:
        members = f"{adapters['instances']} adapters, average of {adapters['average']} at every token"
        rows.append(("Deep ensemble", f"{members}; with {', '.join(adapters['folders'])}"))
    return rows


def baseline_words(name: str, ours: Mapping[str, Any]) -> str:
    """What a baseline with several models averages."""
    members = ours["systems"][name].get("members") or {}
    words = [f"{members['instances']} members, average of {members['average']} at every token"] if members else []
    words += [f"rate {members['rate']:g} on the adapter's input, seed {members['seed']}"] if "rate" in members else []
    words += [f"this adapter and {', '.join(members['folders'])}"] if "folders" in members else []
    return ", ".join(words) or "not recorded"


def dropout_rows(trained: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the adapter was trained."""
    if "rate" not in trained:
        return [("Dropout rate p", "not recorded: an adapter of another origin")]
    if trained["rate"] == 0 and not trained.get("rate_pattern"):
        return [("Dropout rate p", "0 (plain LoRA)")]
    masks = {"example": "each example draws its own masks", "instance": "masks shared by the micro-batch"}
    others = "".join(f", {rate:g} in {name}" for name, rate in trained.get("rate_pattern", {}).items())
    return [
        ("Dropout rate p", f"{trained['rate']:g}{others}"),
        ("Training instances N", f"{trained['instances']}, {masks[trained['sampling']]}"),
        ("Rescale by 1/(1-p)", "yes" if trained["rescale"] else "no: equation 2 verbatim, folded into alpha"),
    ]


def provenance_tables(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(title, rows): training, evaluation and task versions, each value as lines of text."""
    recorded = results["lora_dropout"].get("provenance") or {}
    parts = [
        (capital(str(name)), {key.replace("_", " "): value for key, value in part.items()})
        for name, part in recorded.items()
        if isinstance(part, Mapping) and part
    ]
    tasks = results.get("versions", {})
    if tasks:
        versions = {version: [name for name in tasks if tasks[name] == version] for version in tasks.values()}
        parts.append(("Tasks", {f"version {version}": ", ".join(names) for version, names in versions.items()}))

    def place(name: str) -> int:
        return PROVENANCE_ORDER.index(name) if name in PROVENANCE_ORDER else len(PROVENANCE_ORDER)

    return [
        (title, [(name, value_lines(part[name])) for name in sorted(part, key=place) if part[name] is not None])
        for title, part in parts
    ]


def value_lines(value: Any) -> list[str]:
    """A recorded value as lines: a mapping as ``key value`` pairs, a list with one line per item."""
    if isinstance(value, Mapping):
        return [", ".join(f"{key} {' '.join(value_lines(item))}" for key, item in value.items() if item is not None)]
    if isinstance(value, list):
        return [line for item in value for line in value_lines(item)] or ["none"]
    return [{True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)]
