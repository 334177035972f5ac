"""Pieces of a report: tables as Markdown and HTML, figures as SVG, and the page around them, which loads nothing."""

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2328; --muted: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --heat: #62a1f2; --better: #116329; --worse: #a40e26; --s0: #2a78d6; --s1: #d9480f; --s2: #12875c; --s3: #8250df;
  --s4: #a87400; --s5: #c2255c; --s6: #0b7285; --s7: #59636e; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --muted: #9ba5b1; --line: #30363d;
  --panel: #161b22; --heat: #215fae; --better: #56d364; --worse: #ff8b82; --s0: #58a6ff; --s1: #ff9150; --s2: #3fc38c;
  --s3: #bc96ff; --s4: #dfae30; --s5: #f77fae; --s6: #46c3d6; --s7: #9ba5b1; } }
* { box-sizing: border-box; }
body { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--page); color: var(--text); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul { max-width: 46rem; margin: .5rem 0; } code { overflow-wrap: anywhere; } .muted, small { color: var(--muted); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; color: var(--muted); font-weight: 600; }
.numbers th, .numbers td { text-align: right; white-space: nowrap; font-weight: normal; padding: .3rem .5rem; }
.numbers thead th { font-weight: 600; white-space: normal; }
.numbers th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); padding-left: 0;
  white-space: normal; min-width: 7.5rem; max-width: 14rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .numbers th:first-child { max-width: 8rem; } }
.numbers small { display: block; font-size: .75rem; }
.better { color: var(--better); } .worse { color: var(--worse); } .better, .worse { font-weight: 600 !important; }
.heat { width: 100%; } .heat th, .heat td { padding: .25rem .3rem; font-size: .85rem; }
.heat thead th + th, .heat td { text-align: center; }
.heat td { border: 2px solid var(--page); min-width: 2.4rem;
  background: color-mix(in srgb, var(--heat) calc(var(--share) * 100%), var(--panel)); }
.grid { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.grid figure, .grid .scroll { margin: 0; } figure { margin: 1.5rem 0; } img { max-width: 100%; background: #fff; }
figcaption { color: var(--muted); font-size: .875rem; } .grid figcaption { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; max-width: 34rem; } svg text { fill: var(--muted); font-size: 12px; }
svg .name { fill: var(--text); font-size: 13px; } .line { fill: none; stroke-width: 2; } .band { opacity: .1; }
.rule { stroke: var(--line); } .zero { stroke: var(--muted); stroke-dasharray: 4 3; } .hover { fill: transparent; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: .75rem 0; }
.legend svg { display: inline-block; width: 28px; height: 12px; margin-right: .4rem; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .25rem 0; }
"""

_WIDTH, _HEIGHT = 420, 270  # of a figure; at this width its text is readable on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 42  # margins around its axes


class Cell(NamedTuple):
    """A cell of a table that is more than a text.

    Args:
        text (`str`):
            What it says.
        note (`str`):
            Said after it, in brackets or small: an interval.
        kind (`str`):
            `"better"` or `"worse"`: emphasised.
        share (`float` or `None`):
            In [0, 1]: how dark its ground is.
    """

    text: str
    note: str = ""
    kind: str = ""
    share: float | None = None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """A table in Markdown; bars in its cells are escaped."""
    lines = [[_markdown_cell(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return cell
    text = f"**{cell.text}**" if cell.kind else cell.text
    return f"{text} ({cell.note})" if cell.note else text


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str | Cell]], name: str = "", kind: str = "", caption: str = ""
) -> str:
    """A table in HTML, which scrolls by itself where it is wider than the page.

    Args:
        header (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence[str or Cell]]`):
            The rows; with a `kind` the first cell of each is its name.
        name (`str`, *optional*):
            Its `id` on the page.
        kind (`str`, *optional*):
            CSS classes: `"numbers"`, `"numbers heat"`.
        caption (`str`, *optional*):
            Text above it.
    """
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(_html_cell(cell, is_name=bool(kind) and i == 0) for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    attributes = "".join(f' {key}="{html.escape(value)}"' for key, value in (("id", name), ("class", kind)) if value)
    above = f"<caption><span>{html.escape(caption)}</span></caption>" if caption else ""
    table = f"<table{attributes}>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    label = html.escape(caption or name or "table")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _html_cell(cell: str | Cell, is_name: bool) -> str:
    if isinstance(cell, str):
        return f'<th scope="row">{html.escape(cell)}</th>' if is_name else f"<td>{html.escape(cell)}</td>"
    kind = f' class="{cell.kind}"' if cell.kind else ""
    shade = "" if cell.share is None else f' style="--share: {cell.share:.3f}"'
    note = f" <small>{html.escape(cell.note)}</small>" if cell.note else ""
    return f"<td{kind}{shade}>{html.escape(cell.text)}{note}</td>"


def html_page(title: str, body: Sequence[str]) -> str:
    """A page of the given parts, which loads nothing from anywhere and follows the reader's light or dark mode."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def legend(order: Sequence[str], shown: Collection[str] | None = None) -> str:
    """The line and marker of each series; `order` as of [`line_figure`], of which `shown` (or all) are listed."""
    items = (
        f'<li><svg viewBox="0 0 28 12" aria-hidden="true"><path class="line" {_stroke(i)} d="M0 6H28"/>'
        f"{_marker(i, 14, 6)}</svg>{html.escape(name)}</li>"
        for i, name in enumerate(order)
        if shown is None or name in shown
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def line_figure(
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float, float | None, float | None]]],
    order: Sequence[str],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with bands, as inline SVG.

    Args:
        caption (`str`):
            Text above the figure; with the labels it is its alternative text too.
        series (`Mapping[str, Sequence[tuple]]`):
            From the name of a series to its points `(x, y, low, high)`, by x; `low` and `high` may be `None`.
        order (`Sequence[str]`):
            All names of the page: the place in it decides colour, dashes and marker.
        x_label, y_label (`str`):
            Names of the axes, with their units.
        x_ticks (`Sequence[tuple[float, str]]`, *optional*):
            Places and texts on the x axis; made if not given.
        y_range (`tuple[float, float]`, *optional*):
            Ends of the y axis; from the points if not given.
    """
    points = [point for line in series.values() for point in line]
    xs = [point[0] for point in points] + [x for x, _ in x_ticks or ()]
    low_x, high_x = min(xs), max(xs)
    ys = [value for point in points for value in point[1:] if value is not None]
    y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
    low_y, high_y = y_ticks[0], y_ticks[-1]
    if x_ticks is None:
        x_ticks = [(x, f"{x:g}") for x in nice_ticks(low_x, high_x) if low_x <= x <= high_x]

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = 0.5 if high_x == low_x else (x - low_x) / (high_x - low_x)
        share_y = (y - low_y) / (high_y - low_y)
        return _LEFT + share_x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - share_y * (_HEIGHT - _TOP - _BOTTOM)

    bottom = _HEIGHT - _BOTTOM
    parts = []
    for y in y_ticks:
        height = place(low_x, y)[1]
        rule = "zero" if y == 0 and low_y < 0 else "rule"
        parts.append(f'<path class="{rule}" d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x, text in x_ticks:
        anchor = "end" if x == high_x > low_x else "middle"
        across = place(x, low_y)[0] + (6 if anchor == "end" else 0)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{html.escape(text)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>')
    for name, line in series.items():
        i = order.index(name)
        band = [(x, low, high) for x, _, low, high in line if low is not None and high is not None]
        if len(band) > 1:
            corners = [place(x, high) for x, _, high in band] + [place(x, low) for x, low, _ in reversed(band)]
            parts.append(f'<path class="band" style="fill: {_color(i)}" d="{_path(corners)}Z"/>')
    texts = dict(x_ticks)
    for name, line in series.items():
        i = order.index(name)
        parts.append(f'<path class="line" {_stroke(i)} d="{_path([place(x, y) for x, y, *_ in line])}"/>')
        stride = 1 + len(line) // 60  # enough to point at
        for x, y, low, high in line[::stride]:
            across, down = place(x, y)
            interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
            text = html.escape(f"{name}, {texts.get(x, f'{x:g}')}: {y:.4g}{interval}")
            marker = _marker(i, across, down) if len(line) <= 16 else ""
            target = f'<circle class="hover" cx="{across:.1f}" cy="{down:.1f}" r="8"/>'
            parts.append(f"<g>{marker}{target}<title>{text}</title></g>")
    label = (
        f"{caption}: {y_label} by {x_label}, {len(series)} lines ({', '.join(series)}). The numbers are in the tables."
    )
    return _figure(caption, label, "".join(parts), _HEIGHT)


def interval_figure(
    caption: str, intervals: Mapping[str, tuple[float, float, float]], order: Sequence[str], x_label: str
) -> str:
    """One row for each name: a point and its interval, against 0. Arguments as of [`line_figure`]."""
    row_height, right = 40, _WIDTH - _RIGHT
    bottom = _TOP + row_height * len(intervals)
    ticks = nice_ticks(*(f(0.0, *(f(values) for values in intervals.values())) for f in (min, max)))

    def place(x: float) -> float:
        return 14 + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - 28)

    parts = []
    for x in ticks:
        rule = "zero" if x == 0 else "rule"
        parts.append(f'<path class="{rule}" d="M{place(x):.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{place(x):.1f}" y="{bottom + 16}" text-anchor="middle">{f"{x:+g}" if x else 0}</text>')
    for row, (name, (value, low, high)) in enumerate(intervals.items()):
        i, down = order.index(name), _TOP + row_height * row + 28
        text = html.escape(f"{name}: {value:+.4g} ({low:+.4g} to {high:+.4g})")
        parts.append(f'<text class="name" x="14" y="{down - 12}">{html.escape(name)}</text>')
        parts.append(
            f'<g><path class="line" style="stroke: {_color(i)}" d="M{place(low):.1f} {down}H{place(high):.1f}'
            f'M{place(low):.1f} {down - 4}v8M{place(high):.1f} {down - 4}v8"/>{_marker(i, place(value), down)}'
            f'<circle class="hover" cx="{place(value):.1f}" cy="{down}" r="10"/><title>{text}</title></g>'
        )
    parts.append(f'<text x="{right}" y="{bottom + 34}" text-anchor="end">{html.escape(x_label)}</text>')
    label = f"{caption}: {x_label}, {len(intervals)} intervals against 0. The numbers are in the table."
    return _figure(caption, label, "".join(parts), bottom + 42)


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, evenly spaced, of which the first is at most `low` and the last at least `high`."""
    if high - low <= 1e-12 * max(1.0, abs(high)):  # one value: an axis of some height around it
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * min(factor for factor in (1, 2, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _figure(caption: str, label: str, parts: str, height: int) -> str:
    return (
        f'<figure><figcaption>{html.escape(caption)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(label)}">{parts}</svg></figure>'
    )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _color(i: int) -> str:
    return f"var(--s{i % 8})"


def _stroke(i: int) -> str:
    dashes = "; stroke-dasharray: 6 4" if i >= 8 else ""  # the colours begin again
    return f'style="stroke: {_color(i)}{dashes}"'


def _marker(i: int, x: float, y: float) -> str:
    """One of four shapes, so that a series is known by more than its colour."""
    outlines = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z", "M0 -5.5L5 0L0 5.5L-5 0Z")
    return f'<path style="fill: {_color(i)}" transform="translate({x:.1f} {y:.1f})" d="{outlines[i % 4]}"/>'
