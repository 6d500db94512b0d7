"""YAML as a tree that remembers where every value was written.

Scalars follow YAML 1.2's core schema (`2e-4` is a number, `no` is text), not PyYAML's YAML 1.1. Files are read
safely: bounded in bytes, depth, nodes and digits, no tags, no anchors or aliases, no control characters, no key twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from pipeline.recipe.problems import KeyPath, Place, Problem, RecipeError, display_key, shown
from pipeline.redaction import HIDDEN, TOKEN

MOST_BYTES = 256 * 1024
MOST_LEVELS = 20
MOST_NODES = 5_000
"""Keys, values and list items together."""
MOST_KEY = 200
"""Characters of a key."""
MOST_DIGITS = 18
"""Of a whole number: what has more is no 64-bit integer, and no key of a recipe takes it."""
TOKEN_FOUND = (
    "found an access token (not shown here); a recipe is written into every result, so it takes none: set HF_TOKEN or "
    "run `hf auth login`, and renew a token that others may have seen"
)
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that YAML can write with a backslash: controls, which a terminal obeys, and halves of characters."""

Scalar: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True)
class Node:
    """A value and where it was written: for a mapping's entry the line of its key."""

    value: Scalar | dict[str, Node] | list[Node]
    place: Place

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The entry under a mapping's key or a list's index, None where there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(key)) if isinstance(key, str) else None
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def at(self, path: KeyPath) -> Node | None:
        """The node under a path of keys and indices, None where it leads nowhere."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def nearest(self, path: KeyPath) -> Node:
        """The node under a path, or the last one on the way to it."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                break
            node = child
        return node


# YAML 1.2.2, section 10.3.2: pattern, first characters.
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.nan|\.NaN|\.NAN",
        list("-+.0123456789"),
    ),
}


class _Yaml12Resolver(yaml.resolver.BaseResolver):
    pass


class _Composer(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, _Yaml12Resolver):
    """PyYAML's reader up to the node tree; no Python object is ever constructed from a tag."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _Yaml12Resolver.__init__(self)
        self.levels = self.nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if event.anchor is not None:  # of an anchor, or of an alias
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._refuse(f"found {sign}{event.anchor}; anchors and aliases are not read: write the value out")
        if not isinstance(event, yaml.AliasEvent) and event.tag is not None:
            self._refuse(f"the tag {event.tag} is not read: write the plain value")
        if self.levels == MOST_LEVELS:
            self._refuse(f"nested more than {MOST_LEVELS} levels deep")
        if self.nodes == MOST_NODES:
            self._refuse(f"more than {MOST_NODES:,} keys, values and list items in all")
        self.levels += 1
        self.nodes += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def _refuse(self, problem: str) -> None:
        raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)


class Yaml12Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    for _resolver in (_Yaml12Resolver, Yaml12Dumper):
        _resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read_file(path: Path) -> tuple[Node, list[Problem]]:
    """The mapping in a YAML file, and the keys it holds twice. Raises RecipeError where there is no mapping."""
    top = Place(path, 1)
    try:
        if not path.is_file():
            raise RecipeError([Problem(Place(path), "", _missing_file(path))])
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        size = path.stat().st_size
    except OSError as error:
        raise RecipeError([Problem(Place(path), "", f"cannot be read: {error.strerror}")]) from error
    if len(raw) > MOST_BYTES:
        raise RecipeError([Problem(top, "", f"{size:,} bytes long; expected a recipe of at most {MOST_BYTES:,}")])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        raise RecipeError([Problem(Place(path, line), "", message)]) from error
    node, problems = read_text(text, top)
    if not isinstance(node.value, dict):
        message = f"found {shown(node.plain())}, expected a mapping of keys to values (a recipe)"
        raise RecipeError([Problem(top, "", message)])
    return node, problems


def read_text(text: str, place: Place) -> tuple[Node, list[Problem]]:
    """The value written in `text`, and the keys it holds twice; lines are counted from `place`."""
    try:
        composed = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError([_syntax_problem(error, text, place)]) from error
    problems: list[Problem] = []
    if composed is None:
        return Node(None, place), problems
    return _located(composed, place, (), problems), problems


def _located(node: yaml.Node, place: Place, path: tuple[str | int, ...], problems: list[Problem]) -> Node:
    if isinstance(node, yaml.ScalarNode):
        return _located_scalar(node, place, path, problems)
    if isinstance(node, yaml.SequenceNode):
        items = [
            _located(item, place.at(item.start_mark.line + 1), (*path, index), problems)
            for index, item in enumerate(node.value)
        ]
        return Node(items, place)
    entries: dict[str, Node] = {}
    for key_node, value_node in node.value:
        here = place.at(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(here, display_key(path), "found a list or mapping as a key; expected a word"))
            continue
        key = key_node.value  # as text: `1:` and `yes:` are keys like any other
        problem = _key_problem(key)
        if problem is not None:
            problems.append(Problem(here, display_key(path), problem))
            continue
        if key in entries:
            message = f"the key is written twice; first on line {entries[key].place.line}. Keep one of them"
            problems.append(Problem(here, display_key((*path, key)), message))
            continue
        entries[key] = _located(value_node, here, (*path, key), problems)
    return Node(entries, place)


def _located_scalar(node: yaml.ScalarNode, place: Place, path: KeyPath, problems: list[Problem]) -> Node:
    value = _scalar(node.tag.rpartition(":")[2], node.value)
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        message = f"found a whole number of {len(node.value)} digits, expected at most {MOST_DIGITS}"
        problems.append(Problem(place, display_key(path), message))
    if isinstance(value, str) and TOKEN.search(value) is not None:
        problems.append(Problem(place, display_key(path), TOKEN_FOUND))
        value = TOKEN.sub(HIDDEN, value)
    if isinstance(value, str) and (found := NOT_TEXT.search(value)) is not None:
        problems.append(Problem(place, display_key(path), not_text(found)))
        value = NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", value)
    return Node(value, place)


def not_text(found: re.Match[str]) -> str:
    """What to say of a character that is none."""
    return f"found the character U+{ord(found[0]):04X}, which is not text; take it out"


def _key_problem(key: str) -> str | None:
    """Why a text is no key."""
    if len(key) > MOST_KEY:
        return f"found a key of {len(key):,} characters, expected at most {MOST_KEY}"
    if TOKEN.search(key) is not None:
        return TOKEN_FOUND
    found = NOT_TEXT.search(key)
    return None if found is None else f"in a key: {not_text(found)}"


def _scalar(kind: str, text: str) -> Scalar:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


# PyYAML's words: what they usually mean.
_PLAIN_WORDS = {
    "mapping values are not allowed here": "a second `: ` where one value was expected; check the indentation of the "
    "line, or quote a text that holds `: `",
    "could not find expected ':'": "a line without `: ` where a key was expected; write `key: value`",
    "found character '\\t' that cannot start any token": "a tab; indent with spaces",
    "found character '%' that cannot start any token": "a text that starts with %; quote it",
    "found character '@' that cannot start any token": "a text that starts with @; quote it",
    "found character '`' that cannot start any token": "a text that starts with a backtick; quote it",
    "expected <block end>, but found '<block mapping start>'": "a key that is indented unlike the keys beside it",
    "expected <block end>, but found '-'": "a list item that is indented unlike the items beside it",
    "expected the node content, but found '<stream end>'": "a list or mapping that is not closed",
    "found unexpected end of stream": "the file ends inside a quoted text; close the quote",
    "expected ',' or ']'": "a list that is not closed; expected a comma or ]",
    "expected ',' or '}'": "a mapping that is not closed; expected a comma or }",
    "but found another document": "a second document (---); expected one recipe per file",
}


def _syntax_problem(error: yaml.YAMLError, text: str, place: Place) -> Problem:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        found = error.problem or error.context or "unreadable YAML"
        plain = next((words for theirs, words in _PLAIN_WORDS.items() if theirs in found), None)
        return Problem(place.at(line), "", f"not valid YAML: {plain or found}")
    if isinstance(error, yaml.reader.ReaderError):
        line = text[: error.position].count("\n") + 1
        return Problem(place.at(line), "", f"not valid YAML: the character U+{error.character:04X} is not allowed")
    return Problem(place, "", f"not valid YAML: {error}")


def _missing_file(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.yaml"))
        return f"found a folder, expected a recipe file{'; it holds ' + ', '.join(names[:10]) if names else ''}"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    close = difflib.get_close_matches(path.name, {file.name for file in files}, n=3)
    near = [str(file) for name in close for file in files if file.name == name][:3]
    return "no such file" + (f"; did you mean {' or '.join(near)}?" if near else "")


def merged(under: Node, over: Node) -> Node:
    """`over` laid upon `under`: mappings are merged key by key, anything else replaces what was there."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    entries = dict(under.value)
    for key, child in over.value.items():
        entries[key] = merged(entries[key], child) if key in entries else child
    return Node(entries, over.place)


def node_of(value: Any, place: Place) -> Node:
    """A plain value as a tree, all of it at one place."""
    if isinstance(value, dict):
        return Node({key: node_of(child, place) for key, child in value.items()}, place)
    if isinstance(value, list):
        return Node([node_of(child, place) for child in value], place)
    return Node(value, place)


def edited(root: Node, path: KeyPath, value: Any) -> Node:
    """`root` with a plain value at `path`, or without what is there where `value` is None."""
    if not path:
        return root if value is None else node_of(value, root.place)
    key, *rest = path
    if isinstance(root.value, dict) and isinstance(key, str):
        entries = dict(root.value)
        if rest or value is not None:
            entries[key] = edited(entries.get(key, Node({}, root.place)), tuple(rest), value)
        else:
            entries.pop(key, None)
        return replace(root, value=entries)
    if isinstance(root.value, list) and isinstance(key, int) and key < len(root.value):
        items = list(root.value)
        if rest or value is not None:
            items[key] = edited(items[key], tuple(rest), value)
        else:
            del items[key]
        return replace(root, value=items)
    return root


def overridden(root: Node, path: Sequence[str], value: Node) -> Node:
    """`root` with `value` at `path` (list items by index). Raises RecipeError where the path leads nowhere."""
    return _overridden(root, tuple(path), 0, value)


def _overridden(node: Node, path: tuple[str, ...], depth: int, value: Node) -> Node:
    if depth == len(path):
        return value
    part = path[depth]
    if isinstance(node.value, list):
        count = len(node.value)
        if not part.isdecimal() or int(part) >= count:
            known = "an empty list" if count == 0 else "0" if count == 1 else f"an index from 0 to {count - 1}"
            message = f"found {part!r} as the index into {'.'.join(path[:depth])}, expected {known}"
            raise RecipeError([Problem(value.place, ".".join(path), message)])
        items = list(node.value)
        items[int(part)] = _overridden(items[int(part)], path, depth + 1, value)
        return replace(node, value=items)
    if isinstance(node.value, dict) or node.value is None:
        entries = dict(node.value or {})
        entries[part] = _overridden(entries.get(part, Node(None, value.place)), path, depth + 1, value)
        return replace(node, value=entries)
    message = f"{'.'.join(path[:depth])} is {shown(node.plain())}, which has no keys"
    raise RecipeError([Problem(value.place, ".".join(path), message)])
