"""Tables as Markdown and HTML, and the page around them, which loads nothing and follows light or dark mode."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple


# Name of a CSS variable -> its color in light and in dark mode. `s0` to `s7` are those of the series of a figure
COLORS: Mapping[str, tuple[str, str]] = {
    "page": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9ba5b1"),
    "line": ("#d1d9e0", "#30363d"),
    "panel": ("#f6f8fa", "#161b22"),
    "heat": ("#62a1f2", "#215fae"),
    "better": ("#116329", "#56d364"),
    "worse": ("#a40e26", "#ff8b82"),
    "s0": ("#2a78d6", "#58a6ff"),
    "s1": ("#d9480f", "#ff9150"),
    "s2": ("#12875c", "#3fc38c"),
    "s3": ("#8250df", "#bc96ff"),
    "s4": ("#a87400", "#dfae30"),
    "s5": ("#c2255c", "#f77fae"),
    "s6": ("#0b7285", "#46c3d6"),
    "s7": ("#5f5e5a", "#a9a8a0"),
}

_STYLE = """
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
.heat td { border: 2px solid var(--page); min-width: 2.4rem; }
.heat td[style] { background: color-mix(in srgb, var(--heat) calc(var(--share) * 100%), var(--panel)); }
.grid { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.grid figure, .grid .scroll { margin: 0; } figure { margin: 1.5rem 0; }
figcaption { color: var(--muted); font-size: .875rem; } .grid figcaption { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; max-width: 34rem; stroke-linejoin: round; }
svg text { font-family: system-ui, sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: .75rem 0; }
details { margin: .5rem 0; } summary { cursor: pointer; padding: .25rem 0; }
"""


class TableCell(NamedTuple):
    """A cell of a table that is more than a text.

    Args:
        text (`str`):
            Its text.
        note (`str`):
            Follows it in brackets or in small print, such as an interval.
        kind (`str`):
            `"better"` or `"worse"`: emphasized.
        share (`float` or `None`):
            In [0, 1]: how strong its background color is.
    """

    text: str
    note: str = ""
    kind: str = ""
    share: float | None = None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str | TableCell]]) -> str:
    """A table in Markdown; bars in its cells are escaped."""
    lines = [[_markdown_cell(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: str | TableCell) -> str:
    if isinstance(cell, str):
        return cell
    text = f"**{cell.text}**" if cell.kind else cell.text
    return f"{text} ({cell.note})" if cell.note else text


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str | TableCell]], name: str = "", kind: str = "", caption: str = ""
) -> str:
    """A table in HTML, which scrolls if it is wider than the page.

    Args:
        header (`Sequence[str]`):
            Names of the columns.
        rows (`Sequence[Sequence[str or TableCell]]`):
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


def _html_cell(cell: str | TableCell, is_name: bool) -> str:
    if isinstance(cell, str):
        return f'<th scope="row">{html.escape(cell)}</th>' if is_name else f"<td>{html.escape(cell)}</td>"
    kind = f' class="{cell.kind}"' if cell.kind else ""
    shade = "" if cell.share is None else f' style="--share: {cell.share:.3f}"'
    note = f" <small>{html.escape(cell.note)}</small>" if cell.note else ""
    return f"<td{kind}{shade}>{html.escape(cell.text)}{note}</td>"


def html_page(title: str, body: Sequence[str]) -> str:
    """A page of the given parts, which loads nothing and follows the reader's light or dark mode."""
    light, dark = ("".join(f" --{name}: {pair[i]};" for name, pair in COLORS.items()) for i in (0, 1))
    colors = f":root {{ color-scheme: light dark;{light} }}"
    colors += f" @media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{colors}{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
