"""Templates as pages: HTML with the style sheet inside, and Markdown. Shared by the report and the comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from eval.numbers import capital

TEMPLATES = Path(__file__).parent / "templates"


def style_sheet() -> Markup:
    """``report.css``, for a ``<style>`` element: its colours are the variables that ``svg.THEME`` names."""
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))


def render(template: Path, context: Mapping[str, Any]) -> str:
    """A template's text. Values are escaped where its name ends in ``.html.j2``; an undefined name is an error.

    Args:
        template: the file; it may include others of its folder.
        context: the names it uses. Filters: ``cell`` (text for a Markdown table), ``breakable`` (a name that may
            break), ``capital``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=template.name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": markdown_cell, "breakable": breakable, "capital": capital}
    return environment.get_template(template.name).render(context)


def markdown_cell(text: Any) -> str:
    """Text inside a Markdown table: bars, markup and line ends would break it."""
    plain = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", str(text).replace("&", "&amp;")).replace("|", "\\|")
    return re.sub(r"[ \t\r\n]+", " ", plain).strip(" ")  # spaces that do not break stay


def breakable(text: str) -> Markup:
    """A name in HTML that may break after underscores only."""
    return escape(text).replace("_", Markup("_<wbr>"))
