"""Formats numbers for the report, the model card, the tables and the progress lines."""

from __future__ import annotations

import math


def number(value: object, digits: int = 4) -> str:
    """A float to `digits` significant digits without a needless exponent; "–" if it is absent or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e7):
        return f"{value:.{max(digits - 2, 0)}e}"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text else text


def percent(value: object, places: int = 2) -> str:
    """`91.234` -> "91.23 %"; the value is a percentage already."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{places}f} %"


def count(value: object) -> str:
    """`175066` -> "175,066"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{round(value):,}"


def duration(seconds: object) -> str:
    """`228` -> "3 min 48 s"."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def sentence(text: str) -> str:
    """`the curve still rose` -> "The curve still rose."; text that is empty stays so."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""
