"""From a recipe file and `key=value` overrides to one frozen `Recipe`, or every problem at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from pipeline.recipe.json_schema import Schema, arms, child_schema, recipe_schema
from pipeline.recipe.nodes import (
    MOST_LEVELS,
    NOT_TEXT,
    Node,
    Yaml12Dumper,
    merged,
    not_text,
    overridden,
    read_file,
    read_text,
)
from pipeline.recipe.problems import Place, Problem, RecipeError, shortened, shown
from pipeline.recipe.schema import Recipe
from pipeline.recipe.section import LOCAL_OR_HUB
from pipeline.recipe.validation import validated

COMMAND_LINE = Place(None)
MOST_FILES = 10
"""Recipes that extend each other in a chain."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, laid upon those it extends, with the command line's `key=value` on top.

    Args:
        path: a YAML file.
        overrides: `adapter.dropout.rate=0.3`; the value is YAML, list items go by index (`data.train.0.path=...`).

    Raises:
        RecipeError: all problems, each with file, line, key, what was found, what was expected and the nearest key.
    """
    problems: list[Problem] = []
    root = _read_chain(Path(path), (), problems)
    root = _with_overrides(root, overrides, problems)
    whole = all(problem.key != "extends" for problem in problems)
    recipe = validated(root, problems, whole)
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def output_and_name(path: Path | str, overrides: Sequence[str] = ()) -> tuple[str, str]:
    """Of a recipe that :func:`load_recipe` takes, in a second: without the checks for which trl is imported.

    Raises:
        RecipeError: the file cannot be read, or has no name.
    """
    problems: list[Problem] = []
    root = _with_overrides(_read_chain(Path(path), (), problems), overrides, problems)
    name, output = root.child("name"), root.child("output")
    if problems or name is None:
        raise RecipeError(problems or [Problem(Place(Path(path)), "name", "missing")])
    return str(Recipe.model_fields["output"].default if output is None else output.value), str(name.value)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every key written out; `load_recipe` of it gives an equal Recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_chain(path: Path, readers: tuple[Path, ...], problems: list[Problem]) -> Node:
    """The file's mapping laid upon that of the file it extends; `readers` are the files that led here."""
    root, found = read_file(path)
    problems += found
    root = _with_absolute_paths(root, recipe_schema(), path.parent)
    assert isinstance(root.value, dict)  # read_file raises for anything else
    own = Node({key: child for key, child in root.value.items() if key != "extends"}, root.place)
    parent = root.child("extends")
    if parent is None:
        return own
    if not isinstance(parent.value, str):
        message = f"found {shown(parent.plain())}, expected the path of one recipe, relative to this file"
        problems.append(Problem(parent.place, "extends", message))
        return own
    chain = (*readers, path)
    extended = Path(os.path.normpath(path.parent / parent.value))
    if any(os.path.realpath(extended) == os.path.realpath(reader) for reader in chain):
        circle = " -> ".join(str(reader) for reader in (*chain, extended))
        problems.append(Problem(parent.place, "extends", f"recipes extend each other in a circle: {circle}"))
        return own
    if len(chain) == MOST_FILES:
        problems.append(Problem(parent.place, "extends", f"a chain of more than {MOST_FILES} recipes; shorten it"))
        return own
    try:
        below = _read_chain(extended, chain, problems)
    except RecipeError as error:
        problems += [
            replace(problem, place=parent.place, key="extends", message=f"{extended}: {problem.message}")
            if problem.place == Place(extended)  # the file itself, not a line of it: there is none
            else problem
            for problem in error.problems
        ]
        return own
    if below.child("name") is not None and own.child("name") is None:
        message = "missing; a recipe that extends another needs a name of its own, or both would write to one folder"
        problems.append(Problem(parent.place, "name", message))
    return merged(below, own)


def _with_overrides(root: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    for override in overrides:
        key, equals, text = override.partition("=")
        found = NOT_TEXT.search(override)
        if found is not None:
            problems.append(Problem(COMMAND_LINE, "", not_text(found)))
            continue
        if not equals or "" in key.split(".") or key.count(".") >= MOST_LEVELS:
            message = f"found {shortened(override)!r}, expected key=value, e.g. adapter.dropout.rate=0.3"
            problems.append(Problem(COMMAND_LINE, "", message))
            continue
        if key == "extends":
            message = "what a recipe extends is written in the recipe; on the command line, name the other recipe"
            problems.append(Problem(COMMAND_LINE, key, message))
            continue
        try:
            value, noted = read_text(text, COMMAND_LINE)
            problems += [replace(problem, key=f"{key}.{problem.key}".rstrip(".")) for problem in noted]
            root = overridden(root, key.split("."), value)
        except RecipeError as error:
            problems += [replace(problem, key=key) for problem in error.problems]
    # what files hold is absolute by now; what is left was typed on the command line
    return _with_absolute_paths(root, recipe_schema(), Path.cwd())


def _with_absolute_paths(node: Node, schema: Schema, folder: Path) -> Node:
    """`node` with every `./`, `../` and `~/` under a key that the schema marks as local-or-hub made absolute."""
    value = node.value
    if isinstance(value, str):
        if all(arm.get("format") != LOCAL_OR_HUB for arm in arms(schema)):
            return node
        if value.startswith("~/"):
            return replace(node, value=os.path.expanduser(value))
        if value in (".", "..") or value.startswith(("./", "../")):
            return replace(node, value=os.path.normpath(folder.absolute() / value))
        return node
    if isinstance(value, list):
        return replace(node, value=[_child_with_absolute_paths(item, schema, 0, folder) for item in value])
    if isinstance(value, dict):
        entries = {key: _child_with_absolute_paths(child, schema, key, folder) for key, child in value.items()}
        return replace(node, value=entries)
    return node


def _child_with_absolute_paths(child: Node, schema: Schema, key: str | int, folder: Path) -> Node:
    inner = child_schema(schema, key)
    return child if inner is None else _with_absolute_paths(child, inner, folder)
