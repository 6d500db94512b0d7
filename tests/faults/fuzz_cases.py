"""What the fuzzer does to good files: hypothesis draws edits, and these functions carry them out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hypothesis import strategies as st

from pipeline.recipe.json_schema import Schema, arms, choices

REPOSITORY = Path(__file__).resolve().parents[2]
Edit: TypeAlias = tuple[str, float, Any]
"""What to do, where (0 the beginning, 1 the end), and with what."""


@dataclass(frozen=True)
class Target:
    """Something that reads what a user gives it."""

    cases: st.SearchStrategy[Any]
    read: Callable[[Any], None]


DEEP = "[" * 5000
NASTY = (
    *("", " ", "~", "null", "yes", "0x1F", "1e999", "-0", ".nan", "-.inf", "1" * 39, "1" * 5000, "2026-11-22"),
    *("&a [*a, *a]", "*a", "!!python/object/apply:os.system [id]", "!!binary aGk=", "<<: {a: 1}", "? [a]: b"),
    *(
        DEEP,
        "{a: " * 30,
        "- " * 40,
        "'",
        '"',
        '"\\0"',
        '"\\ud800"',
        '"\\x1b[2J"',
        "\u202e",
        "\ufeff",
        "%YAML 9.9",
        "---",
    ),
    *(
        "../../../etc/passwd",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "~nosuchuser/x",
        ".",
        "/",
        "\\\\host\\x",
        "a" * 5000,
    ),
    *("{{ x", "{{ ''.__class__ }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 'a' * 10**9 }}", "(a+)+$", "[", "*"),
    *(
        "hf_" + "a" * 34,
        "json",
        "text",
        "https://x.invalid/a",
        "pocket",
        "auto",
        "none",
        "all-linear",
        "[]",
        "{}",
        "[[]]",
    ),
)
SCALARS = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=20),
    st.integers(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**18, 10**30, -(2**63)]),
    st.floats(),
    st.booleans(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = st.floats(0, 1)

TEXT_EDITS = ("value", "value", "value", "key", "delete", "double", "swap", "insert", "indent", "cut")
BYTE_EDITS = ("flip", "flip", "zero", "drop", "insert", "cut", "double", "gzip", "mark", "utf-16", "latin-1", "empty")
TREE_EDITS = ("set", "set", "set", "remove", "rename", "double", "wrap", "whole")


def edits(names: Sequence[str], most: int = 4) -> st.SearchStrategy[list[Edit]]:
    """One to ``most`` edits."""
    return st.lists(st.tuples(st.sampled_from(names), PLACES, VALUES), min_size=1, max_size=most)


def written(value: Any) -> str:
    """A value in a line of YAML or JSON: text as it stands, which may be syntax."""
    return value if isinstance(value, str) else json.dumps(value, allow_nan=True, default=str)


def edited_text(text: str, changes: Sequence[Edit]) -> str:
    """Lines changed: values, keys, order, indentation, and strange ones put in between."""
    for kind, where, what in changes:
        lines = text.split("\n")
        place = int(where * (len(lines) - 1))
        line = lines[place]
        if kind == "value":
            lines[place] = f"{line.partition(':')[0]}: {written(what)}"
        elif kind == "key":
            lines[place] = f"{written(what)}:{line.partition(':')[2]}"
        elif kind == "delete":
            del lines[place]
        elif kind == "double":
            lines.insert(place, line)
        elif kind == "swap":
            lines[place], lines[-1 - place] = lines[-1 - place], lines[place]
        elif kind == "insert":
            lines.insert(place, written(what))
        elif kind == "indent":
            lines[place] = "  " + line if where < 0.5 else line.strip()
        else:
            lines = lines[:place]
        text = "\n".join(lines)
    return text


def edited_bytes(content: bytes, changes: Sequence[Edit]) -> bytes:
    """Bytes flipped, lost, doubled, cut off; other encodings; compressed."""
    for kind, where, what in changes:
        place = int(where * len(content))
        new = written(what).encode(errors="surrogatepass")
        if kind == "flip" and content:
            place = min(place, len(content) - 1)
            content = content[:place] + bytes([content[place] ^ (1 << len(new) % 8)]) + content[place + 1 :]
        elif kind == "zero":
            content = content[:place] + bytes(len(new)) + content[place + len(new) :]
        elif kind == "drop":
            content = content[:place] + content[place + 1 + len(new) :]
        elif kind == "insert":
            content = content[:place] + new + content[place:]
        elif kind == "cut":
            content = content[:place]
        elif kind == "double":
            content = content[:place] + content
        elif kind == "gzip":
            content = gzip.compress(content)
        elif kind == "mark":
            content = b"\xef\xbb\xbf" + content
        elif kind in ("utf-16", "latin-1"):
            content = content.decode(errors="replace").encode(kind, errors="replace")
        elif kind == "empty":
            content = b""
    return content


def edited_tree(tree: Any, changes: Sequence[Edit]) -> Any:
    """A value as JSON has it with parts of it replaced, removed, renamed, doubled, or put into lists."""
    tree = json.loads(json.dumps(tree))
    for kind, where, what in changes:
        holders = _entries(tree)
        if kind == "whole" or not holders:
            return what
        holder, key = holders[int(where * (len(holders) - 1))]
        if kind == "set":
            holder[key] = what
        elif kind == "remove":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [[holder[key]]]
        elif isinstance(holder, dict):
            holder[written(what)] = holder.pop(key) if kind == "rename" else holder[key]
        else:
            holder.insert(0, holder[key])
    return tree


def _entries(tree: Any) -> list[tuple[Any, Any]]:
    """Every (mapping, key) and (list, index) in a tree."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    return [entry for key in keys for entry in [(tree, key), *_entries(tree[key])]]


def fitting(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of a key's kind, mostly: small, large, and on the borders."""
    kinds = {arm.get("type") for arm in arms(schema)}
    found = [st.sampled_from(choices(schema))] if choices(schema) else []
    if kinds & {"integer", "number"}:
        found += [st.integers(0, 4), st.integers(0, 100), st.sampled_from([10**4, 2**31, 2**40, 10**17])]
    if "number" in kinds:
        found += [st.floats(0, 1, allow_nan=False), st.floats(0, 1e9), st.sampled_from([1e-300, 1e300, 5e-324])]
    if "boolean" in kinds:
        found.append(st.booleans())
    if "string" in kinds:
        found.append(st.sampled_from(NASTY))
    if "array" in kinds:
        found.append(st.lists(st.sampled_from(["q_proj", "lm_head", "embed_tokens", "a", "base", ""]), max_size=2))
    return st.one_of(*found, SCALARS) if found else VALUES
