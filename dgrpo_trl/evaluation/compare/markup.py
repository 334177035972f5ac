"""Colors of the page, cells of tables, and tables as Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

from ...files import read_table


COLORS: dict[str, list[str]] = read_table(__package__, "colors.yaml")


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
