"""LoRA Dropout as a recipe asks for it."""

from __future__ import annotations

from peft import PeftModel

from pipeline.adapter.config import ADAPTER_NAME
from pipeline.errors import UserError
from pipeline.lora_dropout import LoraDropout
from pipeline.lora_dropout.attach import masked_layers
from pipeline.lora_dropout.rates import Rates
from pipeline.recipe import Recipe


def recipe_dropout(model: PeftModel, recipe: Recipe) -> LoraDropout | None:
    """The masks of the model's adapter; None where the recipe masks nothing.

    Raises:
        UserError: an adapted layer that cannot be masked; a rate for a module without an adapter.
    """
    settings = recipe.adapter.dropout
    if not settings.masked:
        return None
    try:
        names = list(masked_layers(model, ADAPTER_NAME))
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {error}.\nOr train without masks: adapter.dropout.rate=0.") from error
    check_rate_pattern(settings.rate_pattern, names)
    if not settings.rescale:
        check_folded_pattern(settings.rate_pattern, names)
    return LoraDropout(
        model,
        settings.rate,
        recipe.seed,
        ADAPTER_NAME,
        rate_pattern=settings.rate_pattern,
        initial_rate=settings.initial_rate,
    )


def check_rate_pattern(pattern: dict[str, float], names: list[str]) -> None:
    """Every key must name a module that holds the adapter.

    Raises:
        UserError: names the key, and the modules there are.
    """
    for key in pattern:
        try:
            found = not Rates(0.0, {key: 0.0}).unused(names)
        except ValueError as error:  # names the pattern
            raise UserError(
                f"adapter.dropout.{error}.\n"
                "Give a module's name, its end from a dot on, or a regular expression that matches it whole."
            ) from error
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"adapter.dropout.rate_pattern: {key!r} names no module that holds the adapter.\n"
                f"There are: {', '.join(endings)}, e.g. {names[0]}; a key is the end of such a name from a dot on, or "
                "a regular expression that matches it whole."
            )


def check_folded_pattern(pattern: dict[str, float], names: list[str]) -> None:
    """Rates that are folded into alphas (``rescale: false``) must not depend on the order of their keys.

    peft writes ``alpha_pattern`` sorted, and takes the first key that matches: a loaded adapter would get other alphas
    than it was trained with.

    Raises:
        UserError: names a module that changes its rate with the order.
    """
    given, stored = Rates(0.0, pattern), Rates(0.0, dict(sorted(pattern.items())))
    for name in names:
        if given.of(name) != stored.of(name):
            raise UserError(
                f"adapter.dropout.rate_pattern: several keys match {name}; with adapter.dropout.rescale false "
                f"peft's file keeps alphas sorted by key: it would get {stored.of(name):g} for {given.of(name):g}.\n"
                "Let one key match each module, or set adapter.dropout.rescale to true."
            )
