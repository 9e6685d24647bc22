"""Rows of plain data → aligned text, or Markdown. Says nothing about what the numbers mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ABSENT = "–"  # what a missing value looks like


@dataclass(frozen=True)
class Column:
    """One column: which key of a row it shows, under which title, and how.

    Attributes:
        key: key into each row; a row without it, or with None, shows a dash.
        title: heading.
        format: a format specification (".4f", ",d") or a function from the value to text.
        align: "right" for numbers, "left" for words.
        hint: an explanation of the heading, shown where there is room for one (the HTML page).
    """

    key: str
    title: str
    format: str | Callable[[Any], str] = ""
    align: Literal["left", "right"] = "right"
    hint: str = ""

    def show(self, row: Mapping[str, Any]) -> str:
        """The cell of `row` as text."""
        value = row.get(self.key)
        if value is None:
            return ABSENT
        return self.format(value) if callable(self.format) else format(value, self.format)


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], indent: str = "") -> str:
    """Aligned text: headings, a rule, one line a row; no space at line ends, no final newline."""
    cells = [[column.title for column in columns]] + [[column.show(row) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    cells.insert(1, ["─" * width for width in widths])
    return "\n".join(indent + _line(line, widths, columns).rstrip() for line in cells)


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[Column]) -> str:
    return "  ".join(
        cell.rjust(width) if column.align == "right" else cell.ljust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    )


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """A GitHub-flavoured Markdown table; what Markdown or HTML would take as its own is escaped."""

    def line(cells: Sequence[str]) -> str:
        escaped = (re.sub(r"([\\|<&*_`\[])", r"\\\1", cell.replace("\n", " ")) for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    rule = "|" + "|".join("---:" if column.align == "right" else ":---" for column in columns) + "|"
    body = [line([column.show(row) for column in columns]) for row in rows]
    return "\n".join([line([column.title for column in columns]), rule, *body])


def pair_table(pairs: Sequence[tuple[str, str]], indent: str = "") -> str:
    """Name and value on a line each, values aligned to one column."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{indent}{name.ljust(width)}  {value}".rstrip() for name, value in pairs)
