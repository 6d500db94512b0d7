"""Do adapters belong to the recipe's base, and to one ensemble? Told before the base is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.adapter.check import check_adapter
from pipeline.adapter.files import WEIGHTS_FILE, read_peft_config, read_settings
from pipeline.errors import UserError
from pipeline.recipe import Recipe, load_recipe, schema
from pipeline.run.folder import RECIPE_FILE


def check_base(base: schema.Base, adapter: Path) -> None:
    """Compare the recipe's base with the one that the adapter was trained on.

    How it was stored stands in the recipe beside the adapter; an adapter without one is not compared in that.

    Raises:
        UserError: they are of another name (a folder of the same name elsewhere counts as moved), or stored or computed
            in another type; the recipe beside the adapter cannot be read.
    """
    trained = read_peft_config(adapter).get("base_model_name_or_path")  # null where peft was given a bare model
    if trained is not None and Path(trained).name != Path(base.model).name:
        raise UserError(
            f"{adapter}: trained on the base {trained!r}, but base.model is {base.model!r}.\n"
            f"Evaluate with base.model={trained}; if that folder was only renamed, mend base_model_name_or_path in "
            f"{adapter / 'adapter_config.json'}."
        )
    if (adapter / RECIPE_FILE).exists():
        check_storage(base, load_recipe(adapter / RECIPE_FILE).base, adapter)


def check_storage(base: schema.Base, trained: schema.Base, adapter: Path) -> None:
    """Refuse a base of the same name whose weights have other values than those the adapter was trained on.

    Raises:
        UserError: names both and the overrides that restore the trained one.
    """
    keys = ["quantization", "dtype"] + (["double_quantization"] if trained.quantization == "nf4" else [])
    ours, theirs = base.model_dump(), trained.model_dump()
    different = [key for key in keys if ours[key] != theirs[key]]
    if different:
        was, found = (
            " ".join(f"base.{key}={str(values[key]).lower()}" for key in different) for values in (theirs, ours)
        )
        raise UserError(
            f"{adapter}: trained on {was}, but this recipe has {found}: another base, whose scores would not be this "
            f"adapter's.\nEvaluate with {was}"
        )


def check_deep_ensemble(recipe: Recipe, adapter: Path | None) -> None:
    """Refuse adapters that make no deep ensemble with this one, where the recipe asks for one.

    Args:
        recipe: its base and ``eval.deep_ensemble`` are read.
        adapter: its own; None while it is not trained yet: a mistake then shows before hours of training.

    Raises:
        UserError: there are none; a folder holds no adapter, or one that does not fit the base, was trained on another
            one, or is of another method; two are the same.
    """
    if "deep_ensemble" not in recipe.eval.systems:
        return
    further = [Path(folder) for folder in recipe.eval.deep_ensemble]
    if not further:
        raise UserError(
            "eval.deep_ensemble: found no folder, and a deep ensemble averages at least two adapters; name those of "
            "other training seeds, e.g. eval.deep_ensemble=[outputs/seed-1, outputs/seed-2]"
        )
    try:
        for folder in further:
            read_settings(folder)
            check_base(recipe.base, folder)
            check_adapter(recipe.base, folder)
    except UserError as error:
        raise UserError(f"eval.deep_ensemble: {error}") from error
    members = [*([] if adapter is None else [adapter]), *further]
    method = read_peft_config(members[0])["peft_type"]
    seen: dict[str, Path] = {}
    for folder in members:
        found = read_peft_config(folder)["peft_type"]
        if found != method:
            raise UserError(
                f"eval.deep_ensemble: {folder} is {found}, and {members[0]} is {method}: peft has no model with both. "
                "Name adapters of one method"
            )
        twin = seen.setdefault(weights_hash(folder), folder)
        if twin is not folder:
            raise UserError(
                f"eval.deep_ensemble: {folder} has the weights of {twin}, and would count twice; name adapters of "
                "other training seeds"
            )


def weights_hash(adapter: Path) -> str:
    """SHA-256, hexadecimal, of an adapter's weights."""
    with (adapter / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
