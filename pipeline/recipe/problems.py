"""What is wrong with a recipe, and where, in words."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.errors import UserError
from pipeline.redaction import is_secret

MOST_KEYS_SHOWN = 12
"""Of a mapping, in a message."""

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands in the recipe: `("data", "train", 0, "path")`."""


@dataclass(frozen=True)
class Place:
    """A line of a file, or the command line."""

    file: Path | None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return "command line"
        relative = os.path.relpath(self.file)
        name = str(self.file) if relative.startswith("..") else relative
        return name if self.line is None else f"{name}:{self.line}"

    def at(self, line: int) -> Place:
        """Another line of the same file; the command line has none."""
        return self if self.file is None else replace(self, line=line)


@dataclass(frozen=True)
class Problem:
    """One thing to repair: `file:line: key: found, expected, nearest`."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.message) if part)


class RecipeError(UserError):
    """Every problem of a recipe, in the order of its lines, one per line of the message."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        ordered = sorted(problems, key=lambda p: (p.place.file is None, str(p.place.file), p.place.line or 0, p.key))
        self.problems = tuple(dict.fromkeys(ordered))
        lines = [str(problem) for problem in self.problems]
        if len(lines) > 1:
            lines.insert(0, f"{len(lines)} problems in the recipe:")
        super().__init__("\n".join(lines))


def display_key(path: Iterable[str | int]) -> str:
    """`("data", "train", 0, "path")` as `data.train.0.path`, the form that an override takes."""
    return ".".join(str(part) for part in path)


def shown_under(key: KeyPath, value: Any) -> str:
    """:func:`shown`, but for a value whose key says that it is a secret."""
    return "a secret" if key and is_secret(str(key[-1])) else shown(value)


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text[:60] + "..." if len(text) > 60 else text


def shown(value: Any) -> str:
    """A value as YAML spells it, with its kind where the spelling alone would mislead."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {shortened(value)!r}"
    if isinstance(value, dict):
        more = f", ... ({len(value)} in all)" if len(value) > MOST_KEYS_SHOWN else ""
        keys = ", ".join(map(str, list(value)[:MOST_KEYS_SHOWN]))
        return f"a mapping with {keys}{more}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return str(value)


def close_names(name: str, known: Iterable[str], most: int = 1) -> str:
    """`; did you mean X?`, or nothing where no known name is close."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
