"""Figures by matplotlib, as inline SVG whose colors are those of the page, in light and in dark mode."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...extras import import_extra
from ...files import read_table


matplotlib = import_extra("matplotlib", "The comparison", "demo")
Figure = import_extra("matplotlib.figure", "The comparison", "demo").Figure

# Name of a CSS variable of the page -> its color in light and in dark mode
COLORS: dict[str, list[str]] = read_table(__package__, "colors.yaml")

# From the name of a series to its points `(x, y, low, high)`, by x; `low` and `high` may be `None`
Series = Mapping[str, Sequence[Sequence[float | None]]]

# A series differs not only in color: also in marker (with its sign in the legend), from the ninth on in dashes
NUM_COLORS = 8
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"))
_WIDTH, _HEIGHT = 4.4, 2.9  # inches; at this size the text is readable on a phone


def draw_lines(axes: Any, series: Series, order: Sequence[str]) -> None:
    """Draws lines with bands. The place in `order`, all names of the page, decides color, dashes and marker."""
    for name, points in series.items():
        i = order.index(name)
        color = _color(i)
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        marker = _MARKERS[i % len(_MARKERS)][0] if len(points) <= 16 else ""
        dashes = "--" if i >= NUM_COLORS else "-"
        axes.plot(xs, ys, color=color, marker=marker, markersize=5, linestyle=dashes, label=name)
        band = [point for point in points if None not in point]
        if len(band) > 1:
            x, _, low, high = zip(*band, strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)


def line_figure(
    caption: str,
    series: Series,
    order: Sequence[str],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with bands, as HTML; labels name the axes with their units, ticks are places and texts."""
    figure, axes = _axes(_HEIGHT)
    draw_lines(axes, series, order)
    if x_ticks is None:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks([place for place, _ in x_ticks], [text for _, text in x_ticks])
    if y_range is not None:
        margin = 0.03 * (y_range[1] - y_range[0])  # for markers at the ends
        axes.set_ylim(y_range[0] - margin, y_range[1] + margin)
    elif axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
        axes.axhline(0, color=COLORS["muted"][0], linestyle="--", linewidth=0.8)
    axes.set_xlabel(x_label, loc="right")
    if y_label != caption:
        axes.set_title(y_label, loc="left", fontsize=10, color=COLORS["muted"][0])
    names = ", ".join(series)
    return _figure(figure, caption, f"{y_label} by {x_label}, {len(series)} lines ({names})")


def interval_figure(caption: str, intervals: Mapping[str, Sequence[float]], order: Sequence[str], x_label: str) -> str:
    """One row per name, a point and its interval `(value, low, high)` against 0, as HTML. See [`line_figure`]."""
    figure, axes = _axes(0.7 + 0.45 * len(intervals))
    for row, (name, (value, low, high)) in enumerate(intervals.items()):
        i = order.index(name)
        error = [[value - low], [high - value]]
        marker = _MARKERS[i % len(_MARKERS)][0]
        axes.errorbar([value], [-row], xerr=error, color=_color(i), marker=marker, markersize=6, capsize=4)
        axes.annotate(
            name,
            **{"xy": (0, -row), "xycoords": ("axes fraction", "data"), "parse_math": False},
            **{"xytext": (4, 8), "textcoords": "offset points", "color": COLORS["text"][0]},
        )
    axes.axvline(0, color=COLORS["muted"][0], linestyle="--", linewidth=0.8)
    axes.set_ylim(0.4 - len(intervals), 0.8)
    axes.set_yticks([])
    axes.set_xlabel(x_label, loc="right")
    return _figure(figure, caption, f"{x_label}, {len(intervals)} intervals against 0")


def sign(i: int) -> str:
    """Line and marker of the series in place `i`, as text."""
    return ("┄" if i >= NUM_COLORS else "─") + _MARKERS[i % len(_MARKERS)][1]


def _color(i: int) -> str:
    return COLORS[f"s{i % NUM_COLORS}"][0]


def _axes(height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[:].set_visible(False)
    axes.grid(color=COLORS["line"][0], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLORS["muted"][0], length=0)
    axes.xaxis.label.set_color(COLORS["muted"][0])
    return figure, axes


def _figure(figure: Any, caption: str, description: str) -> str:
    label = f"{caption}: {description}. The numbers are in the tables."
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{_inline_svg(figure, label)}</figure>"


def _inline_svg(figure: Any, label: str) -> str:
    """The figure as an SVG element that can stand in a page beside others."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):  # text as text; ids of its own
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    size = re.search(r'viewBox="[^"]*"', svg)
    content = svg[svg.index(">", svg.index("<svg")) + 1 :]
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL)  # it would apply to the whole page
    content = re.sub(r" font-family: [^;]*;", "", content)  # the page's
    content = re.sub(r' id="[\w.]+_\d+"', "", content)  # of groups, the same in every figure
    for name, (color, _) in COLORS.items():
        content = content.replace(color, f"var(--{name})")
    return f'<svg role="img" aria-label="{html.escape(label)}" {size[0] if size else ""}>{content}'
