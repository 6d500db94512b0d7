"""What a JSON schema expects, in plain words, and how to repair what it refuses."""

from __future__ import annotations

from typing import Any

from pipeline.recipe.json_schema import Schema, arms, choices
from pipeline.recipe.nodes import read_text
from pipeline.recipe.problems import Place, RecipeError, close_names

MOST_CHOICES_SHOWN = 12


def expected(schema: Schema) -> str:
    """The values that a schema takes: `a number of at least 0 and below 1, or null`."""
    null_last = sorted(arms(schema), key=lambda arm: arm.get("type") == "null")
    return ", or ".join(dict.fromkeys(_kind(arm) for arm in null_last))


def _kind(arm: Schema) -> str:
    words = choices(arm)
    if words:
        more = f", ... ({len(words)} in all)" if len(words) > MOST_CHOICES_SHOWN else ""
        return words[0] if len(words) == 1 else f"one of {', '.join(words[:MOST_CHOICES_SHOWN])}{more}"
    match arm.get("type"):
        case "integer":
            return "a whole number" + _bounds(arm)
        case "number":
            return "a number" + _bounds(arm)
        case "string":
            return arm.get("words", "text")
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array":
            least = f" of at least {arm['minItems']}" if "minItems" in arm else ""
            items = arm.get("items")
            return f"a list{least}" + (f", each {expected(items)}" if items else "")
        case "object":
            keys = list(arm.get("properties", {}))
            return f"a mapping with keys among {', '.join(keys)}" if keys else "a mapping"
    return "any value"


def _bounds(arm: Schema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    parts = [f"{word} {arm[keyword]:.10g}" for keyword, word in words.items() if keyword in arm]
    return " " + " and ".join(parts) if parts else ""


def hint(value: Any, schema: Schema) -> str:
    """How to repair a value of the wrong kind, where that can be told from the value; begins with `; `."""
    kinds = {arm.get("type") for arm in arms(schema)}
    words = choices(schema)
    if isinstance(value, str) and words:
        longer = [word for word in words if value and word.startswith(value)]
        return f"; did you mean {longer[0]}?" if longer else close_names(value, words)
    if isinstance(value, str):
        if "boolean" in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        if kinds & {"integer", "number", "boolean", "null"} and _reads_as_other(value):
            return "; write it without quotes"
    if "array" in kinds and value is not None and not isinstance(value, list):
        return "; a list of one is written [item], or `- item` on a line of its own"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"; write {int(value)}"
    return ""


def _reads_as_other(text: str) -> bool:
    """Whether YAML reads the text as a number, a truth value or null."""
    try:
        node, _ = read_text(text, Place(None))
    except RecipeError:
        return False
    return not isinstance(node.value, str | dict | list)
