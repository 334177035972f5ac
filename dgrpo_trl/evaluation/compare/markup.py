"""Colors of the page, cells of tables, and tables as Markdown."""

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


class TableCell(NamedTuple):
    """A cell of a table that is more than a text."""

    text: str
    note: str = ""  # follows in brackets or in small print, such as an interval
    kind: str = ""  # `"better"` or `"worse"`: emphasized
    share: float | None = None  # in [0, 1]: how strong its background color is


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
