"""Small pieces of the report page that all of its parts share. Everything that comes from a config or a log is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def section(title: str, body: str) -> str:
    """A section of the page under its heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def absent(reason: str) -> str:
    """Says what is not shown, and why."""
    return f'<p class="absent">Not shown: {escape(reason)}.</p>'


def table(head: Sequence[str], rows: Sequence[str], numbers_from: int | None = None) -> str:
    """A table; columns from `numbers_from` on are set to the right."""
    cells = "".join(f'<th scope="col"{" class=n" if numbers_from is not None and place >= numbers_from else ""}>'
                    f"{escape(name)}</th>" for place, name in enumerate(head))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def number(value: float | None, form: str) -> str:
    """A number in a format; a dash where there is none."""
    return format(int(value) if form.endswith("d") else value, form) if is_number(value) else "-"


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def with_interval(measured: Mapping[str, Any], form: str = ".3f") -> str:
    """A measured value with its 95% interval."""
    low, high = measured.get("ci95") or (None, None)
    interval = f" [{low:{form}}, {high:{form}}]" if is_number(low) and is_number(high) else ""
    return number(measured.get("mean"), form) + interval


def dot_value(measured: Mapping[str, Any] | None) -> tuple[float, float | None, float | None] | None:
    """A measured value as a dot chart takes it."""
    if not measured or not is_number(measured.get("mean")):
        return None
    return (measured["mean"], *(measured.get("ci95") or (None, None)))


def verdict(ok: bool | None, floor: Any) -> str:
    """Whether a check was reached, in a colour."""
    if ok is None:
        return f'<span class="open">{"no floor" if floor is None else "not measured"}</span>'
    return '<span class="good">✓ reached</span>' if ok else '<span class="bad">✗ not reached</span>'
