"""Figures as inline SVG that follows the page's theme, and as SVG and PNG files. Shared with the comparison.

Figures are drawn in the colours of the light page. ``inline_svg`` replaces each by its CSS variable of ``report.css``,
so one picture serves light, dark and print. Text stays text: it takes the page's font, can be searched and read aloud.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

# Colour of the light page -> CSS variable of report.css, which has the same value there.
THEME = {
    "#1c2024": "var(--ink)",
    "#5c656e": "var(--muted)",
    "#d5dade": "var(--line)",
    "#ffffff": "var(--paper)",
    "#eceff1": "var(--band)",
    "#767d84": "var(--base)",
    "#1666a8": "var(--deterministic)",
    "#15806b": "var(--mc-dropout)",
    "#9c3f8f": "var(--deep-ensemble)",
    "#b8480f": "var(--ensemble)",
}
INK, MUTED, LINE, PAPER, BAND, BASE, DETERMINISTIC, MC_DROPOUT, DEEP_ENSEMBLE, ENSEMBLE = THEME


@dataclass(frozen=True)
class Style:
    """How a system is drawn: colour, a marker that tells it apart without colour, and the marker's filling."""

    colour: str
    marker: str
    filling: str


SYSTEM_STYLE = {
    "base": Style(BASE, "o", PAPER),
    "deterministic": Style(DETERMINISTIC, "s", DETERMINISTIC),
    "mc_dropout": Style(MC_DROPOUT, "^", MC_DROPOUT),
    "deep_ensemble": Style(DEEP_ENSEMBLE, "v", PAPER),
    "ensemble": Style(ENSEMBLE, "D", ENSEMBLE),
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-dropout",  # ids of clip paths and markers repeat from run to run
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.unicode_minus": True,
}
WIDE, NARROW = 7.6, 4.0  # inches: the same text on a page's column and on a phone, of which CSS shows one
PNG_DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A figure in the forms it is needed in."""

    name: str
    """Of its files and ids: letters, digits, `_`, `-` and `.`."""
    inline: Markup
    """For a page and for a phone: two ``<svg>`` elements with the classes ``wide`` and ``narrow``."""
    svg: str
    """A file of its own, on white."""
    png: bytes


def picture(draw: Callable[[float], Figure], name: str, key: Mapping[str, str] | None = None) -> Picture:
    """Draw it.

    Args:
        draw: from a width in inches to the figure.
        name: of the picture, unique on the page; other characters than letters and digits become dashes.
        key: labels by system, for the files; on the page the key stands above the picture.
    """
    name = re.sub(r"[^\w.-]", "-", name)
    figure = draw(WIDE)
    wide, narrow = svg_text(figure), svg_text(draw(NARROW))
    inline = "\n".join(
        inline_svg(svg, f"{name}-{kind}").replace("<svg", f'<svg class="{kind}"', 1)
        for kind, svg in (("wide", wide), ("narrow", narrow))
    )
    above = add_key(figure, key) if key else 0.0
    whole = Bbox.from_extents(0, 0, figure.get_figwidth(), figure.get_figheight() + above)
    file = svg_text(figure, whole) if key else wide
    png = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            png,
            format="png",
            dpi=PNG_DOTS_PER_INCH,
            facecolor=PAPER,
            bbox_inches=whole,
            metadata={"Software": None},
        )
    on_white = file.replace("<defs>", f'<rect width="100%" height="100%" fill="{PAPER}"/>\n <defs>', 1)
    return Picture(name, Markup(inline), on_white, png.getvalue())


def add_key(figure: Figure, labels: Mapping[str, str]) -> float:
    """What the markers mean, above the figure. Returns the inches that it takes there."""
    with matplotlib.rc_context(SETTINGS):
        handles = [
            Line2D(
                [],
                [],
                color=SYSTEM_STYLE[system].colour,
                marker=SYSTEM_STYLE[system].marker,
                markerfacecolor=SYSTEM_STYLE[system].filling,
                markersize=5,
                linewidth=1.4,
                label=plain(label),
            )
            for system, label in labels.items()
        ]
        columns = min(len(handles), 3)
        place = (0.05 / figure.get_figwidth(), 1.0)
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=place, ncols=columns, frameon=False, borderaxespad=0.2
        )
    return 0.12 + 0.22 * math.ceil(len(handles) / columns)


def write_pictures(pictures: list[Picture], folder: Path) -> None:
    """``<name>.svg`` and ``<name>.png`` for each."""
    folder.mkdir(exist_ok=True)
    for one in pictures:
        (folder / f"{one.name}.svg").write_text(one.svg, encoding="utf-8", newline="\n")
        (folder / f"{one.name}.png").write_bytes(one.png)


def svg_text(figure: Figure, part: Bbox | None = None) -> str:
    """The figure, or a part of its plane in inches, as a transparent SVG file. Equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches=part,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return buffer.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """An SVG file as an ``<svg>`` element without ids that another picture on the page could share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)  # implied inside HTML
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()  # the table and the words say the same


def axes_in(width: float, height: float, left: float, right: float) -> tuple[Figure, Axes]:
    """Axes of this height in a figure of this width, with these margins (inches) and room for an axis below.

    Fixed margins, not a tight crop: equal widths give equal text sizes on the page.
    """
    below, above = 0.48, 0.06
    whole = height + below + above
    figure = Figure(figsize=(width, whole))
    return figure, axes_at(figure, left, above, width - left - right, height)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes of this size whose upper left corner is so far from the figure's, in inches."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def plain(text: str) -> str:
    """Text as it is: matplotlib would read a pair of dollars as mathematics."""
    return text.replace("$", r"\$")


def cut(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
