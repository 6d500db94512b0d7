"""Inline SVG whose colours follow the page's theme. Shared by the report and the comparison.

Every colour is a stand-in that ``inline_svg`` replaces by a CSS variable of ``report.css``, so one picture serves
light, dark and print. Text stays text: it takes the page's font and can be searched and read aloud.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-in colour -> CSS variable of report.css.
THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--base)",
    "#050505": "var(--deterministic)",
    "#060606": "var(--ensemble)",
    "#070707": "var(--paper)",
}
INK, MUTED, LINE, BASE, DETERMINISTIC, ENSEMBLE, PAPER = THEME
SYSTEM_STYLE = {
    "base": (BASE, "o", PAPER),
    "deterministic": (DETERMINISTIC, "s", DETERMINISTIC),
    "ensemble": (ENSEMBLE, "D", ENSEMBLE),
}  # colour, marker (told apart in grey print), marker's filling
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-dropout",  # ids of clip paths and markers repeat from run to run
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}
WIDE, NARROW = 7.6, 4.0  # inches: the same text on a page's column and on a phone, of which CSS shows one


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element without ids that another picture on the page could share."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)  # implied inside HTML
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for stand_in, variable in THEME.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()  # the table and the words say the same


def axes_in(width: float, height: float, left: float, right: float) -> tuple[Figure, Axes]:
    """Axes of this height in a figure of this width, with these margins (inches) and room for an axis below.

    Fixed margins, not a tight crop: equal widths give equal text sizes on the page.
    """
    below, above = 0.48, 0.06
    whole = height + below + above
    figure = Figure(figsize=(width, whole))
    return figure, figure.add_axes((left / width, below / whole, (width - left - right) / width, height / whole))


def both_widths(draw: Callable[[float], Figure], name: str) -> str:
    """The picture for a page and for a phone, as two ``<svg>`` elements with the classes ``wide`` and ``narrow``."""
    return "\n".join(
        inline_svg(draw(width), f"{name}-{kind}").replace("<svg", f'<svg class="{kind}"', 1)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )
