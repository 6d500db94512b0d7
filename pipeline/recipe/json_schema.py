"""The recipe's JSON schema: what an editor completes, and what the loader's messages call expected."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.recipe.schema import Recipe

Schema = Mapping[str, Any]

_EXTENDS = {
    "type": "string",
    "description": "Another recipe, relative to this file: this one is laid upon it, mappings key by key, lists whole.",
}


@functools.cache
def recipe_schema() -> Schema:
    """JSON schema of the recipe, `training` left open (its fields are trl's, see ``training.py``)."""
    return Recipe.model_json_schema()


def editor_schema(training_fields: Mapping[str, Schema]) -> dict[str, Any]:
    """JSON schema for editors: `extends` and SFTConfig's fields added, nothing required (what is extended may have it).

    Args:
        training_fields: JSON schema of each field, from ``training.field_schemas``.
    """
    schema = _without(dict(recipe_schema()), ("required", "title", "words"))
    training = schema["properties"]["training"]
    training |= {"properties": dict(training_fields), "additionalProperties": False}
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "LoRA Dropout recipe", **schema}


def _without(schema: Any, names: tuple[str, ...]) -> Any:
    """A copy in which no schema has the keywords in `names`; properties of that name stay."""
    if isinstance(schema, list):
        return [_without(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        keyword: {name: _without(inner, names) for name, inner in value.items()}
        if keyword in ("properties", "$defs")
        else _without(value, names)
        for keyword, value in schema.items()
        if keyword not in names
    }


def arms(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema, references followed: `int | None` has two."""
    if "$ref" in schema:
        yield from arms(recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for arm in schema["anyOf"]:
            yield from arms(arm)
    else:
        yield schema


def child_schema(schema: Schema, key: str | int) -> Schema | None:
    """What a mapping's key or a list's index may hold, None where the schema knows no such key."""
    for arm in arms(schema):
        if isinstance(key, int) and "items" in arm:
            return arm["items"]
        if isinstance(key, str) and key in arm.get("properties", {}):
            return arm["properties"][key]
        if isinstance(key, str) and isinstance(arm.get("additionalProperties"), Mapping):
            return arm["additionalProperties"]
    return None


def schema_at(path: Sequence[str | int]) -> Schema | None:
    """The schema of a key of the recipe, None where it is unknown."""
    schema: Schema | None = recipe_schema()
    for key in path:
        if schema is None:
            return None
        schema = child_schema(schema, key)
    return schema


def known_keys(schema: Schema) -> list[str]:
    """The keys of a section."""
    return [key for arm in arms(schema) for key in arm.get("properties", {})]


def choices(schema: Schema) -> list[str]:
    """The words that a key takes, where it takes words from a list."""
    return [str(word) for arm in arms(schema) for word in arm.get("enum", [arm["const"]] if "const" in arm else [])]


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key of the recipe, list items as 0."""
    return tuple(_dotted(recipe_schema(), ""))


def _dotted(schema: Schema, prefix: str) -> Iterator[str]:
    for arm in arms(schema):
        for key, inner in arm.get("properties", {}).items():
            yield prefix + key
            yield from _dotted(inner, f"{prefix}{key}.")
        if isinstance(arm.get("items"), Mapping):
            yield from _dotted(arm["items"], prefix + "0.")
