"""Where prompt templates run: jinja2's sandbox, with bounds on what a template may build and how long it may loop.

Templates come from recipes, and recipes are shared. jinja2's own sandbox keeps them away from Python (no attribute
that begins with an underscore, nothing can be changed), but not from memory and time: ``{{ 'a' * 10 ** 9 }}``, two
nested loops over 100,000 numbers, a ``set`` that doubles a text forty times. So here

- what makes a text longer is checked against :data:`MOST_CHARACTERS`, and only named filters and methods are there;
- all loops of one rendering together make at most :data:`MOST_ROUNDS` rounds;
- what could go around both is refused: macros, blocks, includes, lists that are kept and put into lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes, pass_context, pass_environment
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range
from jinja2.utils import Namespace, htmlsafe_json_dumps

MOST_CHARACTERS = 4_000_000
"""Of a prompt, and of every text on the way to it: about a million tokens."""
MOST_ROUNDS = 1_000_000
"""Of all loops of one rendering."""
MOST_DIGITS = 40
"""Of a number."""

PLAIN_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "sort", "string", "striptags", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
"""jinja2's filters whose result is at most a few times as long as what goes in."""
METHODS = frozenset(
    (
        *("capitalize", "casefold", "count", "cycle", "endswith", "find", "get", "index", "isalnum", "isalpha"),
        *(
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isoformat",
            "isspace",
            "istitle",
            "isupper",
            "items",
            "keys",
        ),
        *("lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values"),
    )
)
"""Of texts, mappings, lists, dates and loops: those whose result is at most as long as what they belong to."""
REFUSED = {
    nodes.Macro: "macro",
    nodes.CallBlock: "call",
    nodes.FilterBlock: "filter",
    nodes.AssignBlock: "set without a value",
    nodes.Block: "block",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.Extends: "extends",
}
ROUNDS = "rounds so far"
"""Of the loops: a variable that no template can name."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with bounds; see the module. A missing column is an error, not an empty text."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        """Without loader: a template is all there is."""
        super().__init__(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        checked: dict[str, Callable[..., Any]] = {
            "join": joined,
            "replace": replaced,
            "tojson": in_json,
            "counted": counted,
        }
        checked |= {name: self.filters[name] for name in PLAIN_FILTERS}
        self.filters = {name: bounded(filter_) for name, filter_ in checked.items()}
        self.globals = {"range": safe_range, "namespace": Namespace}

    def template(self, text: str) -> jinja2.Template:
        """The template, bounded.

        Raises:
            jinja2.TemplateSyntaxError: no Jinja2, or a part of it that prompts may not use.
        """
        try:
            tree = self.parse(text)
            refuse(tree)
            return self.from_string(with_checks(tree))
        except ValueError as error:  # Python's limit on digits
            raise jinja2.TemplateSyntaxError(str(error), 1) from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # and on nesting
            raise jinja2.TemplateSyntaxError("nested too deeply", 1) from error

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Data, and the methods that are named above."""
        return super().is_safe_attribute(obj, attr, value) and (not callable(value) or attr in METHODS)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers; ``+`` of texts and lists too."""
        if operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                check_length(len(left) + len(right))
        elif not (is_number(left) and is_number(right)) or (operator == "**" and abs(right) > MOST_DIGITS):
            raise SecurityError(f"{operator} takes numbers, of at most {MOST_DIGITS} digits")
        return super().call_binop(context, operator, left, right)


def rendered(template: jinja2.Template, columns: Mapping[str, Any]) -> str:
    """The template's text.

    Raises:
        jinja2.TemplateError: it is too long, or loops for too long; and whatever the template itself raises.
    """
    parts, length = [], 0
    for part in template.generate({**columns, ROUNDS: [0]}):
        length += len(part)
        check_length(length)
        parts.append(part)
    return "".join(parts)


def check_length(length: int) -> None:
    """Raise ``SecurityError`` above :data:`MOST_CHARACTERS`."""
    if length > MOST_CHARACTERS:
        raise SecurityError(f"it makes a text of {length:,} characters; a prompt has at most {MOST_CHARACTERS:,}")


def is_number(value: object) -> bool:
    """Whether it is one, and of a reasonable size."""
    return isinstance(value, int | float) and abs(value) < 10**MOST_DIGITS


# --- the tree --------------------------------------------------------------------------------------------------------


def refuse(tree: nodes.Template) -> None:
    """Raise ``TemplateSyntaxError`` for what could go around the bounds."""
    for kind, name in REFUSED.items():
        for node in tree.find_all(kind):
            raise jinja2.TemplateSyntaxError(f"{name}: a prompt takes {{{{ }}}}, if, for and set", node.lineno)
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise jinja2.TemplateSyntaxError("for ... recursive: a prompt takes plain loops", loop.lineno)
    lists: tuple[type[nodes.Expr], ...] = (nodes.List, nodes.Tuple, nodes.Dict)
    for assignment in tree.find_all(nodes.Assign):
        # a list that holds another twice costs nothing; forty of them, one in the other, are endless when written out
        if isinstance(assignment.node, lists) or any(assignment.node.find_all(lists)):
            raise jinja2.TemplateSyntaxError("set: takes texts, numbers and columns, no list", assignment.lineno)


def with_checks(tree: nodes.Template) -> nodes.Template:
    """The template, its loops counted and its ``~`` joined by :func:`joined`."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
    for tilde in tree.find_all(nodes.Concat):
        parts = nodes.List(tilde.nodes, lineno=tilde.lineno)
        tilde.nodes = [nodes.Filter(parts, "join", [], [], None, None, lineno=tilde.lineno)]
    return tree


# --- the filters -----------------------------------------------------------------------------------------------------


def bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, its result checked: a few times the length of what is allowed is no harm, once."""

    @wraps(filter_)  # keeps jinja2's mark of what it wants passed
    def checked(*arguments: Any, **named: Any) -> Any:
        result = filter_(*arguments, **named)
        if isinstance(result, str | list):
            check_length(len(result))
        return result

    return checked


@pass_context
def counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, as long as the rendering has rounds left."""
    rounds = context.resolve(ROUNDS)
    for item in items:
        rounds[0] += 1
        if rounds[0] > MOST_ROUNDS:
            raise SecurityError(f"its loops make more than {MOST_ROUNDS:,} rounds")
        yield item


@pass_environment
def joined(environment: jinja2.Environment, items: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    """jinja2's ``join``, checked before it is carried out."""
    values = items if attribute is None else map(make_attrgetter(environment, attribute), items)
    texts = [str(value) for value in values]
    check_length(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def in_json(value: Any) -> str:
    """jinja2's ``tojson``, on one line."""
    return str(htmlsafe_json_dumps(value))


def replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    """jinja2's ``replace``, checked before it is carried out."""
    text = str(text)
    found = text.count(old) if count < 0 else min(text.count(old), count)
    check_length(len(text) + found * (len(new) - len(old)))
    return text.replace(old, new, count)
