"""From a recipe file and `key=value` overrides to one frozen `Recipe`, or every problem at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.recipe.nodes import Node, Yaml12Dumper, merged, overridden, read_file, read_text
from pipeline.recipe.problems import Place, Problem, RecipeError, close_names, display_key, shown
from pipeline.recipe.schema import LocalOrHub, Recipe, Section
from pipeline.recipe.words import field_expects

Path_ = tuple[str | int, ...]


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with what it extends and the command line's `key=value` laid upon it.

    Raises RecipeError with all problems, each with file, line, key, what was found and what was expected.
    """
    problems: list[Problem] = []
    root = _with_overrides(_read_chain(Path(path), (), problems), overrides, problems)
    recipe, found = _validated(root)
    problems += found
    if recipe is None or problems:
        raise RecipeError(problems)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every key written out; `load_recipe` of it gives an equal Recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def _read_chain(path: Path, children: tuple[Path, ...], problems: list[Problem]) -> Node:
    """The file's mapping laid upon that of the file it extends, local paths resolved."""
    root, found = read_file(path)
    problems += found
    root = _resolved(root, Recipe, path.parent)
    assert isinstance(root.value, dict)
    parent = root.value.get("extends")
    if parent is None:
        return root
    own = Node({key: child for key, child in root.value.items() if key != "extends"}, root.place)
    if not isinstance(parent.value, str):
        message = f"found {shown(parent.plain())}, expected the path of one recipe file, relative to this one"
        problems.append(Problem(parent.place, "extends", message))
        return own
    extended = path.parent / parent.value
    chain = (*children, path)
    if any(extended.resolve() == seen.resolve() for seen in chain):
        circle = " -> ".join(str(seen) for seen in (*chain, extended))
        problems.append(Problem(parent.place, "extends", f"the recipes extend each other in a circle: {circle}"))
        return own
    below = _read_chain(extended, chain, problems)
    return merged(below, own)


def _with_overrides(root: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    place = Place(None)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key or "" in key.split("."):
            message = f"found {override!r}, expected key=value, e.g. adapter.dropout.rate=0.3"
            problems.append(Problem(place, "", message))
            continue
        try:
            value, found = read_text(text, place)
            problems += [replace(problem, key=f"{key}.{problem.key}") for problem in found]
            root = overridden(root, key.split("."), value)
            root = _resolved(root, Recipe, Path.cwd())
        except RecipeError as error:
            problems += [replace(problem, key=problem.key or key) for problem in error.problems]
    return root


def _resolved(node: Node, annotation: Any, folder: Path, is_path: bool = False) -> Node:
    """`node` with every `./` and `../` path that the schema marks as LocalOrHub made absolute from `folder`."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        is_path = is_path or any(isinstance(mark, LocalOrHub) for mark in metadata)
    value = node.value
    if is_path and isinstance(value, str):
        if value in (".", "..") or value.startswith(("./", "../")):
            return replace(node, value=os.path.normpath(folder.resolve() / value))
        return node
    if isinstance(value, list):
        for arm in _arms(annotation):
            if get_origin(arm) is list:
                return replace(node, value=[_resolved(item, get_args(arm)[0], folder) for item in value])
    if isinstance(value, dict):
        for arm in _arms(annotation):
            if isinstance(arm, type) and issubclass(arm, Section):
                fields = arm.model_fields
                entries = {
                    key: _resolved(
                        child,
                        fields[key].annotation,
                        folder,
                        any(isinstance(mark, LocalOrHub) for mark in fields[key].metadata),
                    )
                    if key in fields
                    else child
                    for key, child in value.items()
                }
                return replace(node, value=entries)
    if isinstance(value, str):
        for arm in _arms(annotation):
            if get_origin(arm) is Annotated:
                return _resolved(node, arm, folder)
    return node


def _arms(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    if arguments and get_origin(annotation) not in (list, dict, Annotated):
        for arm in arguments:
            yield from _arms(arm)
    else:
        yield annotation


def _validated(root: Node) -> tuple[Recipe | None, list[Problem]]:
    try:
        return Recipe.model_validate(root.plain()), []
    except ValidationError as error:
        return None, [Problem(root.place, display_key(e["loc"]), e["msg"]) for e in error.errors()]
