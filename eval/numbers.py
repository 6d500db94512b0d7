"""Numbers as readers see them: sensible digits, true minus signs, intervals, durations."""

from __future__ import annotations

import math
from statistics import NormalDist

NORMAL_95 = NormalDist().inv_cdf(0.975)
MINUS, TIMES, FIXED_SPACE = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NO-BREAK SPACE}"


def number(value: float, digits: int, sign: bool = False) -> str:
    """A decimal number with a true minus sign; one that rounds to zero carries no sign."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def decimals(value: float, spread: float | None, percent: bool) -> int:
    """Digits after the point: tenths of a percent, else two digits of the spread (four at most), else four in all.

    Args:
        value: in the metric's own unit.
        spread: half of the 95 % interval, None where there is no interval.
        percent: whether it is shown times 100.
    """
    if percent:
        return 1
    if spread is not None and math.isfinite(spread) and spread > 0:
        most = 4 if abs(value) >= 0.01 else 8
        return min(most, max(0, 1 - math.floor(math.log10(spread / NORMAL_95))))
    return max(0, 3 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 3


def p_text(p: float) -> str:
    """``p = 0.031``, ``p < 0.001``: two digits, and no more zeros than three."""
    if not p >= 0.001:  # a NaN too
        return "p < 0.001" if p < 0.001 else "p unknown"
    return f"p = {p:.2f}" if p >= 0.095 else f"p = {p:.3f}"


def duration(seconds: float) -> str:
    """``8.4 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds) // 3600} h {round(seconds) % 3600 // 60:02d} min"


def capital(text: str) -> str:
    """The first letter upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
