"""What the runs of a comparison have different: recipe keys, seeds, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.compare.runs import Run
from eval.compare.schema import RunFacts, Setting

NO_MATTER = {
    "name",
    "output",
    "eval.batch_size",
    "eval.tokens_per_pass",
    "eval.keep_answers",
    "eval.systems",
    "eval.tasks",
    "eval.ensemble.rows_per_pass",
}
"""Recipe keys that do not change a system's answers to a task, beyond rounding."""
MASK_SEEDS = {"ensemble": "eval.ensemble.seed", "mc_dropout": "eval.mc_dropout.seed"}
"""By system: the key of the seed that its masks are drawn with."""


def training_seed(run: Run) -> int:
    """The seed that the adapter was trained with; the recipe's where training left no record."""
    training = (run.ours.get("provenance") or {}).get("training") or {}
    return int(training.get("seed", run.recipe.seed))


def mask_seed(run: Run) -> int | None:
    """The seed of the system's masks; None for a system without masks."""
    if run.system == "ensemble":
        return int(run.ours["ensemble"]["seed"])
    return run.recipe.eval.mc_dropout.seed if run.system == "mc_dropout" else None


def run_facts(run: Run) -> RunFacts:
    """The run as the reader of a comparison sees it."""
    evaluation = (run.ours.get("provenance") or {}).get("evaluation") or {}
    return RunFacts(
        label=run.label,
        folder=str(run.folder),
        system=run.system,
        system_taken="named" if run.named else "the last that ran",
        adapter=str(run.ours.get("adapter") or "none"),
        training_seed=training_seed(run),
        mask_seed=mask_seed(run),
        finished=str(evaluation.get("finished", "not recorded")),
    )


def different_settings(runs: Sequence[Run]) -> list[Setting]:
    """Every recipe key that can change an answer and is not the same in all runs."""
    flat = [flattened(run.recipe.model_dump()) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in NO_MATTER]
    found = [Setting(key=key, values=[said(one.get(key)) for one in flat]) for key in keys]
    return [setting for setting in found if len(set(setting.values)) > 1]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"eval.ensemble.seed": 7}``: dotted keys, lists whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def said(value: object) -> str:
    """A value of a recipe as text."""
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
