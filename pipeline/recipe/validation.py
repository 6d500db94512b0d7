"""The schema's verdict on a recipe's tree, every finding with its place and in plain words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from pipeline.recipe.json_schema import Schema, all_keys, arms, known_keys, recipe_schema, schema_at
from pipeline.recipe.nodes import Node, edited
from pipeline.recipe.problems import KeyPath, Problem, close_names, display_key, shown, shown_under
from pipeline.recipe.schema import Recipe
from pipeline.recipe.section import Contradiction
from pipeline.recipe.training import sft_contradictions, sft_field_names, training_problems
from pipeline.recipe.words import expected, hint

MOST_ROUNDS = 10
MISSING = "missing"


def validated(root: Node, problems: list[Problem], whole: bool = True) -> Recipe | None:
    """The recipe in a tree; what is wrong with it is added to `problems`, and None returned.

    pydantic looks for contradictions only where every value is right. So that all problems are found at once, wrong
    values are taken out, missing ones stood in for, and the rest is validated again.

    Args:
        root: the tree.
        problems: added to.
        whole: whether all that the recipe extends could be read; if not, a missing key says nothing.
    """
    training = root.child("training")
    if training is not None:
        problems += training_problems(training)
    tree, repaired = root, set[KeyPath]()
    for _ in range(MOST_ROUNDS):
        try:
            recipe = Recipe.model_validate(tree.plain())
            contradiction = sft_contradictions(recipe)
            if contradiction is not None:
                problems += _contradictions(contradiction, (), tree, repaired)
            return recipe if not repaired else None
        except ValidationError as error:
            found: list[Problem] = []
            tree, repaired = _judged(error, tree, repaired, found)
            problems += [problem for problem in found if whole or not problem.message.startswith(MISSING)]
    return None


def _judged(
    error: ValidationError, tree: Node, repaired: set[KeyPath], problems: list[Problem]
) -> tuple[Node, set[KeyPath]]:
    """Adds the error's findings to `problems`; returns the tree without them and all keys repaired so far."""
    found: dict[KeyPath, str] = {}
    for detail in error.errors():
        path = _located(detail["loc"], tree)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Contradiction):
            problems += _contradictions(cause, path, tree, repaired)
            keys = {(*path, *key.split(".")) for names, _ in cause.problems for key in names}
            written = {key for key in keys if tree.at(key) is not None}
            found.update(dict.fromkeys(written or {key for key in (path,) if key}, "contradiction"))
        else:
            found[path] = detail["type"]
    for path, kind in found.items():
        names_an_item = any(len(other) > len(path) and other[: len(path)] == path for other in found)
        if kind != "contradiction" and not names_an_item and not _touches(path, repaired):
            problems.append(_problem(path, kind, tree))
    # from the last list item to the first, so that the indices of those still to come stay true
    for path in sorted(found, key=lambda path: [(isinstance(part, int), str(part).zfill(9)) for part in path])[::-1]:
        schema = schema_at(path)
        stand_in = _stand_in(schema) if found[path] == "missing" and schema is not None else None
        tree = edited(tree, path, stand_in)
    return tree, repaired | set(found)


def _located(loc: Iterable[Any], tree: Node) -> KeyPath:
    """pydantic's location without the names it adds for the arms of a union."""
    path: KeyPath = ()
    node: Node | None = tree
    for part in loc:
        child = node.child(part) if node is not None else None
        if child is not None or (node is not None and part in known_keys(schema_at(path) or {})):
            path, node = (*path, part), child
    return path


def _touches(path: KeyPath, repaired: Iterable[KeyPath]) -> bool:
    """Whether a key, something above it or something below it is among those repaired."""
    return any(path[: len(other)] == other or other[: len(path)] == path for other in repaired)


def _stand_in(schema: Schema) -> Any:
    """The least value of a required key's kind, so that the keys beside it can be looked at."""
    match next(arms(schema)).get("type"):
        case "object":
            return {}
        case "array":
            return [{}]
    return "x"


def _contradictions(cause: Contradiction, section: KeyPath, tree: Node, repaired: set[KeyPath]) -> list[Problem]:
    problems = []
    for names, message in cause.problems:
        keys = [(*section, *name.split(".")) for name in names]
        if any(_touches(key, repaired) for key in keys):
            continue  # it may be the repair that contradicts
        culprit = next((key for key in keys if tree.at(key) is not None), section)
        problems.append(Problem(tree.nearest(culprit).place, display_key(culprit), message))
    return problems


def _problem(path: KeyPath, kind: str, tree: Node) -> Problem:
    place = tree.nearest(path).place
    schema = schema_at(path)
    if kind == "missing" and schema is not None:
        return Problem(place, display_key(path), f"{MISSING}; expected {expected(schema)}")
    node = tree.at(path)
    value = node.plain() if node is not None else None
    if kind == "extra_forbidden":
        return Problem(place, display_key(path), unknown_key(path, value))
    if schema is None:
        schema = recipe_schema()
    message = f"found {shown(value)}, expected {expected(schema)}{hint(value, schema)}"
    return Problem(place, display_key(path), message)


def unknown_key(path: KeyPath, value: Any) -> str:
    """What to say of a key that its section does not have: the keys it has, and the one that was meant."""
    *above, last = path
    siblings = known_keys(schema_at(above) or {})
    message = f"unknown key (found {shown_under(path, value)}), expected one of {', '.join(siblings)}"
    near = difflib.get_close_matches(str(last), siblings, n=1)
    if near:
        return f"{message}; did you mean {display_key([*above, near[0]])}?"
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == last]
    if not elsewhere and last in sft_field_names():
        elsewhere = [f"training.{last}"]
    if elsewhere:
        return f"{message}; did you mean {' or '.join(elsewhere)}?"
    return message + close_names(display_key(path), all_keys())
