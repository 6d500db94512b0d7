"""What the schema expects at a key, in plain words."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false values"),
    str: ("text", "texts"),
    type(None): ("null", "nulls"),
}


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that `annotation` takes, e.g. `a number of at least 0 and below 1, or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return expected(inner, [*metadata, *more])
    if origin in (Union, types.UnionType):
        arms = sorted(get_args(annotation), key=lambda arm: arm is type(None))
        return ", or ".join(expected(arm, metadata) for arm in arms)
    if origin is Literal:
        values = [str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list:
        (item,) = get_args(annotation)
        return "a list" + (", each " + expected(item) if item is not Any else "") + _bounds(metadata)
    if origin is dict or annotation is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with the keys {', '.join(annotation.model_fields)}"
    if annotation in _KINDS:
        return _KINDS[annotation][0] + _bounds(metadata)
    return str(annotation)


def field_expects(field: FieldInfo) -> str:
    """The values that a schema field takes."""
    return expected(field.annotation, field.metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for rule in metadata:
        if isinstance(rule, annotated_types.Ge):
            words.append(f"at least {rule.ge}")
        elif isinstance(rule, annotated_types.Gt):
            words.append(f"above {rule.gt}")
        elif isinstance(rule, annotated_types.Le):
            words.append(f"at most {rule.le}")
        elif isinstance(rule, annotated_types.Lt):
            words.append(f"below {rule.lt}")
        elif isinstance(rule, annotated_types.MinLen):
            words.append(f"at least {rule.min_length} of them")
    pattern = next((rule.pattern for rule in metadata if hasattr(rule, "pattern")), None)
    if pattern is not None:
        words.append(f"matching {pattern}")
    return " " + " and ".join(words) if words else ""
