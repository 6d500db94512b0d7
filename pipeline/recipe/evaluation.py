"""The recipe's section ``eval``. Imported through ``schema.py``, as all sections are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe.section import Contradiction, PathOrHubId, Section


class Ensemble(Section):
    """Test-time ensemble over mask instances (equation 8)."""

    instances: int = Field(default=8, ge=1)
    """Members N. 1 is a single masked model."""
    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged over the members at every token, of the baselines' members too."""
    balanced: bool = False
    """Members keep each feature about (1-p) N times between them: better with few members, which belong together."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Of the members' masks; none takes the adapter's own. Three or more show the ensemble's own noise."""
    rows_per_pass: int | None = Field(default=None, ge=1)
    """Most rows (members x requests) in one forward pass, where memory is short; same results but for
    the noise of mc_dropout, which depends on it."""


class McDropout(Section):
    """Baseline: Monte Carlo dropout, peft's `lora_dropout` on the adapter's input left on at test time (Gal and
    Ghahramani, arXiv 1506.02142)."""

    instances: int = Field(default=8, ge=1)
    """Members N, each with noise of its own at every token."""
    rate: float | None = Field(default=None, gt=0.0, lt=1.0)
    """None takes the rate that the adapter was trained with (`adapter.input_dropout`)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the noise, which also depends on what shares a forward pass: on batch size, limit and number of processes."""


class Eval(Section):
    """The lm-evaluation-harness stage."""

    tasks: list[PathOrHubId] = []
    """lm-eval task names, names from eval/tasks, or paths of task YAML files. Empty: no evaluation stage."""
    task_folders: list[PathOrHubId] = []
    """More folders with lm-eval task files. A task file may run Python code (`!function`): only files you trust."""
    data_folder: PathOrHubId | None = None
    """Folder of the local task data that eval/tasks reads; the LORA_DROPOUT_DATA variable is its default."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; none keeps each task's own number."""
    limit: int | None = Field(default=None, ge=1)
    """Evaluate only the first documents of each task (the report says so)."""
    mode: Literal["auto", "exact", "fast"] = "auto"
    """`exact`: lm-eval's own code, bit for bit. `fast`: shared prompt beginnings are computed once, batches are cut by
    tokens, scores are float32, curves over members are kept. `auto`: fast where an ensemble is among the systems, so
    that all are scored alike, else exact."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Requests per forward pass, before the ensemble multiplies them, in mode exact and in generation."""
    tokens_per_pass: int | None = Field(default=None, ge=1)
    """Most new tokens (of all members) in one forward pass of mode fast; none asks the device."""
    keep_answers: bool = True
    """Keep finished answers on disk, so that an evaluation that was ended goes on where it stopped. Not of
    an int8 base, whose scores depend on what shares a batch."""
    prompt: Literal["task", "training"] = "task"
    """`task`: lm-eval's own prompt. `training`: the same text as instruction in the training prompt."""
    systems: list[Literal["base", "deterministic", "ensemble", "mc_dropout", "deep_ensemble"]] = [
        "base",
        "deterministic",
        "ensemble",
    ]
    """What is evaluated, on the same base: without adapter, adapter without masks, ensemble over masks, and the
    baselines Monte Carlo dropout and an ensemble of several adapters."""
    ensemble: Ensemble = Ensemble()
    """The ensemble."""
    mc_dropout: McDropout = McDropout()
    """The baseline of that name."""
    deep_ensemble: list[PathOrHubId] = []
    """Folders of further adapters, of other training seeds, that the baseline of that name averages with this one."""

    @model_validator(mode="after")
    def _deep_ensemble_has_members(self) -> Eval:
        if "deep_ensemble" in self.systems and not self.deep_ensemble:
            raise Contradiction(
                (
                    ("deep_ensemble", "systems"),
                    "found no folder, and the system deep_ensemble averages at least two adapters: name those of other "
                    "training seeds, e.g. eval.deep_ensemble=[outputs/seed-1, outputs/seed-2]",
                )
            )
        return self
