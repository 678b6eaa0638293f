"""Charts of the report as inline SVG, drawn by hand: no library, no script, no font or file from elsewhere.

Colours are CSS variables (`--s0` .. `--s5`, `--ink`, `--faint`), so that the page decides on light and dark. No chart
tells series apart by colour alone: each has its own marker and, past six, its own dash as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
COLOURS = 6
DASHES = ("", "6 4", "2 3")
WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 34, 44


@dataclass(frozen=True)
class Series:
    """One line of a chart: its mean, and the lines that it is the mean of."""

    name: str
    points: Sequence[Point]
    slot: int
    """Decides colour, marker and dash; the same model has the same slot in all charts."""

    members: Sequence[Sequence[Point]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart: for each panel a value with its interval, or None."""

    label: str
    values: Sequence[tuple[float, float | None, float | None] | None]
    slot: int
    hollow: bool = False


def line_chart(title: str, description: str, series: Sequence[Series], x_label: str, y_label: str, *,
               log_x: bool = False, x_ticks: Sequence[float] | None = None, from_zero: bool = True,
               markers: bool = True, level: float | None = None) -> str:
    """A figure of lines over a common axis, with thin lines for the members of each mean and a legend below.

    Args:
        title: heading of the figure and the SVG's title.
        description: what it shows in a sentence, for those who cannot see it.
        series: lines; ones without points are left out.
        x_label: below the axis, with the unit.
        y_label: above the axis, with the unit.
        log_x: logarithmic x axis; all x must be above 0.
        x_ticks: where the x axis is labelled; None: round numbers.
        from_zero: the y axis begins at 0.
        markers: whether points are marked.
        level: value of y that a dashed horizontal line is drawn at.
    """
    series = [s for s in series if s.points]
    points = [p for s in series for line in (s.points, *s.members) for p in line]
    if not points:
        return missing_figure(title, "nothing was recorded")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_values = [y for _, y in points] + ([] if level is None else [level])
    y_ticks = round_ticks(0.0 if from_zero and min(y_values) >= 0 else min(y_values), max(y_values), 5)
    x_at = _scale(x_low, x_high, LEFT + 8, WIDTH - RIGHT - 8, log=log_x)
    y_at = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    body = [_y_axis(y_ticks, y_at, y_label),
            _x_axis(x_ticks or _inside(round_ticks(x_low, x_high, 6), x_low, x_high), x_at, x_label)]
    if level is not None:
        body.append(f'<path class="level" d="M{LEFT} {y_at(level):.1f}H{WIDTH - RIGHT}"/>')
    body += [_line(line, s, x_at, y_at, "member") for s in series for line in s.members]
    for s in series:
        body.append(_line(s.points, s, x_at, y_at, "mean"))
        if markers or len(s.points) == 1:
            body += [_marker(s.slot, x_at(x), y_at(y)) for x, y in s.points]
    return _figure(title, description, WIDTH, HEIGHT, body, _legend(series))


def dot_chart(title: str, description: str, groups: Sequence[tuple[str, Sequence[Dot]]],
              panels: Sequence[tuple[str, Callable[[float], str]]]) -> str:
    """Rows in groups, and beside them one panel a measure with dots and 95% intervals; hollow dots stand apart.

    Args:
        title: heading of the figure.
        description: what it shows in a sentence.
        groups: name and rows of each group.
        panels: axis label (with unit) and format of the value that is written beside the dot.
    """
    width, label_width, row, head = 1100, 150, 20, 46
    rows = sum(len(dots) + 1 for _, dots in groups)
    height = head + rows * row + 12
    panel_width = (width - label_width) / len(panels)
    scales, body = [], []
    for p, (label, _) in enumerate(panels):
        values = [v for _, dots in groups for dot in dots if dot.values[p] for v in dot.values[p] if v is not None]
        ticks = round_ticks(min(0.0, min(values, default=0.0)), max(values, default=1.0), 5)
        left = label_width + p * panel_width
        scales.append(_scale(ticks[0], ticks[-1], left, left + panel_width - 72))
        body.append(f'<text class="axis" x="{left:.0f}" y="12">{escape(label)}</text>')
        for tick in ticks:
            x = scales[p](tick)
            body.append(f'<path class="grid" d="M{x:.1f} {head - 8}V{height - 8}"/>'
                        f'<text class="tick" x="{x:.1f}" y="{head - 14}" text-anchor="middle">{tick:g}</text>')
    y = head
    for name, dots in groups:
        y += row
        body.append(f'<text class="group" x="0" y="{y - 4}">{escape(name)}</text>')
        for dot in dots:
            y += row
            body.append(f'<text class="row" x="14" y="{y - 4}">{escape(dot.label)}</text>')
            body += [_dot(dot, value, scales[p], y - 8, panels[p][1]) for p, value in enumerate(dot.values) if value]
    return _figure(title, description, width, height, body, "", wide=True)


def bar_chart(title: str, description: str, bars: Sequence[tuple[str, float]], y_label: str) -> str:
    """Vertical bars, labelled below as far as there is room."""
    if not bars:
        return missing_figure(title, "nothing was recorded")
    ticks = round_ticks(0.0, max(value for _, value in bars), 4)
    y_at = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    every = max(1, math.ceil(len(bars) * 46 / (WIDTH - LEFT - RIGHT)))
    body = [_y_axis(ticks, y_at, y_label)]
    for place, (label, value) in enumerate(bars):
        x, y = LEFT + place * step, y_at(value)
        body.append(f'<path class="bar" d="M{x + step * 0.14:.1f} {HEIGHT - BOTTOM}V{y:.1f}h{step * 0.72:.1f}'
                    f'V{HEIGHT - BOTTOM}z"><title>{escape(label)}: {value:,.0f}</title></path>')
        if place % every == 0:
            body.append(f'<text class="tick" x="{x + step / 2:.1f}" y="{HEIGHT - BOTTOM + 16}" '
                        f'text-anchor="middle">{escape(label)}</text>')
    return _figure(title, description, WIDTH, HEIGHT, body, "")


def missing_figure(title: str, reason: str) -> str:
    """A figure that could not be drawn says so in its place."""
    return (f'<figure><figcaption>{escape(title)}</figcaption>'
            f'<p class="absent">Not shown: {escape(reason)}.</p></figure>')


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten) that enclose low and high."""
    if not high > low:
        low, high = (0.0, high or 1.0) if low >= 0 else (low, 0.0)
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _inside(ticks: Sequence[float], low: float, high: float) -> list[float]:
    return [tick for tick in ticks if low <= tick <= high] or [low]


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
    span = high - low

    def at(value: float) -> float:
        place = ((math.log(value) if log else value) - low) / span if span else 0.5
        return start + place * (end - start)
    return at


def _y_axis(ticks: Sequence[float], y_at: Callable[[float], float], label: str) -> str:
    lines = [f'<text class="axis" x="2" y="14">{escape(label)}</text>']
    for tick in ticks:
        y = y_at(tick)
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    return "".join(lines)


def _x_axis(ticks: Sequence[float], x_at: Callable[[float], float], label: str) -> str:
    base = HEIGHT - BOTTOM
    lines = [f'<path class="base" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>',
             f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
             f'{escape(label)}</text>']
    for tick in ticks:
        x = x_at(tick)
        lines.append(f'<path class="base" d="M{x:.1f} {base}v4"/>'
                     f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{_short(tick)}</text>')
    return "".join(lines)


def _short(tick: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(tick) >= size:
            return f"{tick / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{tick:g}"


def _line(points: Sequence[Point], series: Series, x_at, y_at, kind: str) -> str:
    path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)
    return f'<path class="{kind} c{series.slot % COLOURS}"{_dash(series.slot)} d="M{path}"/>'


def _dash(slot: int) -> str:
    dash = DASHES[slot // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _marker(slot: int, x: float, y: float, hollow: bool = False) -> str:
    shape = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        f"M{x:.1f} {y - 4.8:.1f}l4.8 8.6h-9.6z",
        f"M{x:.1f} {y - 5.2:.1f}l5.2 5.2l-5.2 5.2l-5.2 -5.2z",
        f"M{x:.1f} {y + 4.8:.1f}l4.8 -8.6h-9.6z",
        f"M{x - 1.6:.1f} {y - 5:.1f}h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    )[slot % COLOURS]
    return f'<path class="{"hollow" if hollow else "mark"} c{slot % COLOURS}" d="{shape}"/>'


def _dot(dot: Dot, value: tuple[float, float | None, float | None], x_at: Callable[[float], float], y: float,
         shown: Callable[[float], str]) -> str:
    mean, low, high = value
    right = x_at(mean if high is None else max(high, mean))
    whisker = "" if low is None or high is None else (
        f'<path class="whisker c{dot.slot % COLOURS}" d="M{x_at(low):.1f} {y:.1f}H{x_at(high):.1f}"/>')
    return (f'{whisker}{_marker(dot.slot, x_at(mean), y, dot.hollow)}'
            f'<text class="value" x="{right + 10:.1f}" y="{y + 4:.1f}">{escape(shown(mean))}</text>')


def _legend(series: Sequence[Series]) -> str:
    keys = "".join(
        f'<li><svg width="30" height="12" aria-hidden="true"><path class="mean c{s.slot % COLOURS}"{_dash(s.slot)} '
        f'd="M1 6H29"/>{_marker(s.slot, 15, 6)}</svg>{escape(s.name)}</li>' for s in series)
    return f'<ul class="legend">{keys}</ul>'


def _figure(title: str, description: str, width: float, height: float, body: Sequence[str], legend: str,
            wide: bool = False) -> str:
    return (f'<figure{" class=wide" if wide else ""}><figcaption>{escape(title)}</figcaption><div class="scroll">'
            f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg></div>"
            f"{legend}</figure>")


# --- a file of its own ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class StackedBar:
    """A horizontal bar of parts, in order; `told` is written behind it."""

    label: str
    parts: Mapping[str, float]
    told: str


PICTURE_STYLE = (
    "svg{--s0:#0072b2;--s1:#d55e00;--s2:#00875f;--s3:#a3478a;--s4:#94700a;--s5:#5a6570;--ink:#1b2227;--faint:#d8dde1;"
    "background:#fff;font:13px system-ui,sans-serif}text{fill:var(--ink)}.title{font-size:18px;font-weight:600}"
    ".group{font-weight:600}.grid{stroke:var(--faint);fill:none}.limit{stroke:#b3261e;stroke-width:2;fill:none;"
    "stroke-dasharray:6 4}.pale{fill-opacity:.45}" + "".join(f".c{c}{{fill:var(--s{c})}}" for c in range(COLOURS)))


def stacked_bars_picture(title: str, subtitle: str,
                         panels: Sequence[tuple[str, Sequence[StackedBar], float | None]]) -> str:
    """A whole SVG file: panels of stacked bars below each other, each with its legend.

    Args:
        title, subtitle: above all of it.
        panels: heading with the unit, bars, and a value that a dashed line is drawn at.
    """
    width, left, right, row = 1100, 290, 210, 26
    y, body = 62, [f'<text class="title" x="16" y="28">{escape(title)}</text>',
                   f'<text x="16" y="48">{escape(subtitle)}</text>']
    for heading, bars, limit in panels:
        names = list(dict.fromkeys(name for bar in bars for name, value in bar.parts.items() if value > 0))
        ends = [sum(bar.parts.values()) for bar in bars] + ([] if limit is None else [limit])
        ticks = round_ticks(0.0, max(ends, default=1.0), 6)
        x_at = _scale(0.0, ticks[-1], left, width - right)
        y += 34
        body.append(f'<text class="group" x="16" y="{y}">{escape(heading)}</text>')
        x = 16.0
        y += 22
        for place, name in enumerate(names):
            body.append(f'<path class="{_fill(place)}" d="M{x:.0f} {y - 10}h12v12h-12z"/>'
                        f'<text x="{x + 17:.0f}" y="{y}">{escape(name.replace("_", " "))}</text>')
            x += 34 + 7.5 * len(name)
        y += 20
        bottom = y + 6 + row * len(bars)
        for tick in ticks:
            body.append(f'<path class="grid" d="M{x_at(tick):.1f} {y}V{bottom}"/><text x="{x_at(tick):.1f}" '
                        f'y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>')
        for number, bar in enumerate(bars):
            top, begin = y + 6 + number * row, 0.0
            body.append(f'<text x="16" y="{top + 13}">{escape(bar.label)}</text>')
            for place, name in enumerate(names):
                value = bar.parts.get(name, 0.0)
                body.append(f'<path class="{_fill(place)}" d="M{x_at(begin):.1f} {top}H{x_at(begin + value):.1f}v18'
                            f'H{x_at(begin):.1f}z"><title>{escape(name)}: {value:.3g}</title></path>')
                begin += value
            body.append(f'<text x="{x_at(max(begin, limit or 0.0)) + 8:.1f}" y="{top + 13}">{escape(bar.told)}</text>')
        if limit is not None:
            body.append(f'<path class="limit" d="M{x_at(limit):.1f} {y}V{bottom}"/>')
        y = bottom + 18
    height = y + 12
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'role="img"><title>{escape(title)}</title><desc>{escape(subtitle)}</desc><style>{PICTURE_STYLE}</style>'
            f"{''.join(body)}</svg>\n")


def _fill(place: int) -> str:
    """Colour of a part; past six, a paler one."""
    return f"c{place % COLOURS}{' pale' if place >= COLOURS else ''}"
