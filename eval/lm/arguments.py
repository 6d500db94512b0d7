"""What ``--model_args`` says of the model ``lora-dropout``; the adapter's own files fill in the rest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel

from eval.adapters import check_base
from eval.lm.members import OneModel
from eval.systems import System, mode_of, system
from pipeline.adapter.check import why_unmasked
from pipeline.adapter.files import AdapterSettings, check_adapter_folder, read_peft_config, read_settings
from pipeline.base import DTYPES, load_config
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe, schema
from pipeline.recipe.json_schema import schema_at
from pipeline.recipe.problems import shown
from pipeline.recipe.words import expected, hint
from pipeline.run.folder import RECIPE_FILE

BASE = {
    "pretrained": "model",
    "revision": "revision",
    "tokenizer": "tokenizer",
    "quantization": "quantization",
    "double_quantization": "double_quantization",
    "dtype": "dtype",
    "attention": "attention",
    "trust_remote_code": "trust_remote_code",
}
ENSEMBLE = {
    "instances": "instances",
    "average": "average",
    "balanced": "balanced",
    "mask_seed": "seed",
    "rows_per_pass": "rows_per_pass",
}
EVAL = {"mode": "mode", "tokens_per_pass": "tokens_per_pass"}
SECTIONS: dict[tuple[str, ...], Mapping[str, str]] = {("base",): BASE, ("eval", "ensemble"): ENSEMBLE, ("eval",): EVAL}
"""Arguments that are keys of a recipe: section of the recipe, argument, key."""
OWN = {
    "peft": "Folder of the adapter, as training left it; without one the base alone is evaluated.",
    "rate": "Of an ensemble's masks, where the adapter was trained without any.",
    "answers": "Folder in which finished answers are kept, so that an evaluation that was ended goes on where it "
    "stopped.",
}
ARGUMENTS = (*BASE, *ENSEMBLE, *EVAL, *OWN)
ELSEWHERE = {
    "attn_implementation": "write attention=...",
    "load_in_4bit": "write quantization=nf4",
    "load_in_8bit": "write quantization=int8",
    "batch_size": "give it as --batch_size",
    "max_batch_size": "give it as --max_batch_size",
    "device": "give it as --device",
    "parallelize": "the model is never split over devices: several processes (torchrun, accelerate launch, deepspeed) "
    "each hold all of it and share the requests",
}
"""Arguments of lm-eval's ``hf`` that have another place here."""

SectionT = TypeVar("SectionT", bound=schema.Section)


@dataclass(frozen=True)
class ModelArguments:
    """What is evaluated, and how."""

    base: schema.Base
    adapter: Path | None
    """Its folder; None: the base alone."""
    how: schema.Eval
    """Mode, sizes, and the ensemble, if there is one; its other keys mean nothing here."""
    masks: AdapterSettings | None
    """Of the ensemble; None: one model."""
    answers: Path | None
    recipe: Recipe | None
    """The one beside the adapter."""
    warnings: tuple[str, ...] = ()
    """What the reader of the scores must know."""

    @property
    def name(self) -> str:
        """Of the system."""
        if self.masks is not None:
            return "ensemble"
        return "base" if self.adapter is None else "deterministic"

    @property
    def mode(self) -> Literal["exact", "fast"]:
        """How it is scored."""
        return mode_of(self.how, [self.name])

    def system(self, model: PeftModel | PreTrainedModel) -> System:
        """What answers, on the loaded model."""
        if self.masks is None:
            return System(self.name, OneModel(), None)
        assert isinstance(model, PeftModel)
        return system(self.name, model, self.how, self.masks)


def model_arguments(given: Mapping[str, object]) -> ModelArguments:
    """Check ``--model_args``, and fill in what the adapter knows of itself.

    Defaults are the recipe's beside the adapter (base, how it is stored, the ensemble's average), so that scores are
    those of ``launch/evaluate.py``. Without a recipe the base is loaded as lm-eval's ``hf`` does: not quantised, in
    its own dtype. Without ``instances`` there is no ensemble.

    Args:
        given: name to value, as lm-eval has parsed them.

    Raises:
        UserError: an unknown argument or a wrong value; no adapter; arguments that contradict each other or the
            adapter.
    """
    _refuse_unknown(given)
    adapter = Path(str(given["peft"])).expanduser() if "peft" in given else None
    if adapter is not None:
        check_adapter_folder(adapter)
    beside = None if adapter is None else adapter / RECIPE_FILE
    recipe = load_recipe(beside) if beside is not None and beside.exists() else None
    base = _base(given, adapter, recipe)
    if adapter is not None:
        _check_base(base, adapter)
    how = _section(schema.Eval, ("eval",), {}, given)
    masks: AdapterSettings | None = None
    warnings: tuple[str, ...] = ()
    if _ensemble_is_asked(given, adapter):
        assert adapter is not None
        defaults = {} if recipe is None else recipe.eval.ensemble.model_dump()
        how = how.model_copy(update={"ensemble": _section(schema.Ensemble, ("eval", "ensemble"), defaults, given)})
        masks, warnings = _masks(given, adapter, recipe, how.ensemble)
    return ModelArguments(
        base=base,
        adapter=adapter,
        how=how,
        masks=masks,
        answers=Path(str(given["answers"])).expanduser() if "answers" in given else None,
        recipe=recipe,
        warnings=warnings,
    )


def help_text() -> str:
    """All arguments, a line each."""
    lines = {name: OWN[name] for name in OWN}
    for path, names in SECTIONS.items():
        for argument, key in names.items():
            found = schema_at((*path, key)) or {}
            lines[argument] = f"{found.get('description', '')} Expects {expected(found)}.".replace("\n", " ")
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {lines[name]}" for name in ARGUMENTS)


def _refuse_unknown(given: Mapping[str, object]) -> None:
    problems = []
    for name in given:
        if name in ELSEWHERE:
            problems.append(f"--model_args {name}: {ELSEWHERE[name]}")
        elif name not in ARGUMENTS:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(ARGUMENTS)}"
            problems.append(f"--model_args {name}: lora-dropout has no such argument; {meant}")
    if problems:
        raise UserError("\n".join(problems))


def _base(given: Mapping[str, object], adapter: Path | None, recipe: Recipe | None) -> schema.Base:
    """The base, stored as the adapter's recipe says unless the arguments say otherwise."""
    if recipe is not None:
        defaults = recipe.base.model_dump()
    else:
        trained = None if adapter is None else read_peft_config(adapter).get("base_model_name_or_path")
        defaults = {"quantization": "none", **({} if trained is None else {"model": trained})}
    if "pretrained" not in given and "model" not in defaults:
        raise UserError("--model_args pretrained: missing; expected the base, a folder or a Hub id")
    own_dtype = given.get("dtype", None if recipe is not None else "auto") == "auto"
    typed = {name: value for name, value in given.items() if name != "dtype" or not own_dtype}
    base = _section(schema.Base, ("base",), defaults, typed)
    if not own_dtype:
        return base
    dtype = load_config(base).dtype
    names = [name for name, known in DTYPES.items() if known == dtype]
    return base.model_copy(update={"dtype": names[0] if names else "float32"})


def _check_base(base: schema.Base, adapter: Path) -> None:
    """Refuse another base than the adapter's, or one stored otherwise."""
    try:
        check_base(base, adapter)
    except UserError as error:
        raise UserError(
            f"{error}\nIn --model_args, base.model is called pretrained, and the other keys have no base. before them."
        ) from error


def _ensemble_is_asked(given: Mapping[str, object], adapter: Path | None) -> bool:
    """Whether there is one; refuses half of one."""
    if "instances" in given:
        if adapter is None:
            raise UserError("--model_args instances: an ensemble over masks needs an adapter; add peft=FOLDER")
        return True
    idle = [name for name in (*ENSEMBLE, "rate") if name in given]
    if idle:
        raise UserError(f"--model_args {idle[0]}: is about an ensemble; add its members, e.g. instances=8")
    return False


def _masks(
    given: Mapping[str, object], adapter: Path, recipe: Recipe | None, ensemble: schema.Ensemble
) -> tuple[AdapterSettings, tuple[str, ...]]:
    """The masks of an adapter's ensemble, and what is to be said of them."""
    settings = read_settings(adapter)
    if settings is not None and settings.masked:
        if "rate" in given:
            raise UserError(
                f"--model_args rate: {adapter} was trained with rate {settings.rate:g}, and its ensemble has that one; "
                "leave rate out"
            )
        return (settings if ensemble.seed is None else replace(settings, seed=ensemble.seed)), ()
    reason = f"{adapter} {why_unmasked(settings)}"
    worse = "masks at test time only are worse than none"
    if "rate" not in given:
        raise UserError(
            f"--model_args instances: {reason}, so there is no ensemble over masks; {worse}.\n"
            "Leave instances out; to see it all the same, give the masks a rate, e.g. rate=0.5"
        )
    dropout = _section(schema.Dropout, ("adapter", "dropout"), {}, {"rate": given["rate"]}, {"rate": "rate"})
    seed = ensemble.seed if ensemble.seed is not None else recipe.seed if recipe is not None else 0
    config = read_peft_config(adapter)
    masks = AdapterSettings(
        rate=dropout.rate,
        instances=1,
        sampling="example",
        rescale=True,
        alpha=float(config["lora_alpha"]),
        seed=seed,
        method="adalora" if config["peft_type"] == "ADALORA" else "lora",
    )
    return masks, (f"{reason}; its ensemble is drawn with rate {dropout.rate:g}, and {worse}.",)


def _section(
    kind: type[SectionT],
    path: tuple[str, ...],
    defaults: Mapping[str, object],
    given: Mapping[str, object],
    names: Mapping[str, str] | None = None,
) -> SectionT:
    """A section of the recipe with the arguments that are its keys.

    Args:
        kind: of section.
        path: where it stands in a recipe.
        defaults: key to value, where no argument is given.
        given: all arguments.
        names: argument to key; :data:`SECTIONS` by default.
    """
    names = names or SECTIONS[path]
    arguments = {names[name]: name for name in given if name in names}
    values = {key: _path(given[name]) for key, name in arguments.items()}
    try:
        return kind.model_validate({**defaults, **values})
    except ValidationError as error:
        problems = []
        for found in error.errors():
            key = str(found["loc"][0]) if found["loc"] else ""
            wanted = schema_at((*path, key)) if key else None
            if wanted is None:  # two keys that contradict each other
                problems.append(f"--model_args: {found['msg'].removeprefix('Value error, ')}")
            else:
                said = f"found {shown(found['input'])}, expected {expected(wanted)}{hint(found['input'], wanted)}"
                problems.append(f"--model_args {arguments.get(key, key)}: {said}")
        raise UserError("\n".join(problems)) from error


def _path(value: object) -> object:
    """The shell expands ``~`` only where a word begins."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value
