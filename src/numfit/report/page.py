"""One self-contained HTML page: headings, paragraphs, sortable tables, SVG figures.

The page loads nothing (its own content policy forbids it), so it can be mailed or archived; it follows the reader's
light or dark setting and reads well without its few lines of script, which only sort tables. All text is escaped;
figures are inserted as they are and must come from `numfit.report.svg`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from numfit.report.tables import Column


@dataclass(frozen=True)
class Heading:
    """A section's heading."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text; `preformatted` keeps line ends and has a fixed-width font (for a transcript)."""

    text: str
    preformatted: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of plain data; a click on a heading sorts by that column."""

    rows: Sequence[Mapping[str, Any]]
    columns: Sequence[Column]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """An <svg> element made by `numfit.report.svg`, with a caption."""

    svg: str
    caption: str = ""


Part = Heading | Paragraph | Table | Figure


def page(title: str, parts: Sequence[Part], language: str = "en") -> str:
    """The whole page as a string, to be written as UTF-8."""
    return (
        f'<!DOCTYPE html>\n<html lang="{escape(language)}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(_part(part) for part in parts)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _part(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h2>{escape(part.text)}</h2>"
    if isinstance(part, Paragraph):
        tag = "pre" if part.preformatted else "p"
        return f"<{tag}>{escape(part.text)}</{tag}>"
    if isinstance(part, Figure):
        caption = f"<figcaption>{escape(part.caption)}</figcaption>" if part.caption else ""
        return f"<figure>\n{part.svg}\n{caption}</figure>"
    return _table(part)


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    heads = "".join(
        f'<th scope="col" class="{column.align}"{_hint(column)}>'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in table.columns
    )
    body = "\n".join("<tr>" + "".join(_cell(row, column) for column in table.columns) + "</tr>" for row in table.rows)
    return (
        f'<div class="wide"><table>{caption}\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _hint(column: Column) -> str:
    return f' title="{escape(column.hint)}"' if column.hint else ""


def _cell(row: Mapping[str, Any], column: Column) -> str:
    """A cell; numbers carry their full value for sorting, absent ones sort last."""
    value = row.get(column.key)
    number = f' data-value="{value!r}"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f'<td class="{column.align}"{number}>{escape(column.show(row))}</td>'


_STYLE = """
:root{color-scheme:light dark;--back:#ffffff;--text:#26313d;--faint:#5b6773;--rule:#dde3e8;--shade:#f5f7f9}
@media (prefers-color-scheme:dark){:root{--back:#14191f;--text:#dfe6ec;--faint:#9aa7b3;--rule:#2c353f;--shade:#1b2229}}
body{margin:0;background:var(--back);color:var(--text);
 font:16px/1.55 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}
main{max-width:60rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 1rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
p{max-width:46rem;margin:.6rem 0}
pre{background:var(--shade);border:1px solid var(--rule);border-radius:6px;padding:.8rem 1rem;white-space:pre-wrap;
 overflow-wrap:anywhere;font-size:.88rem}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.94rem}
caption{text-align:left;color:var(--faint);padding-bottom:.4rem}
th,td{padding:.35rem .8rem;border-bottom:1px solid var(--rule);white-space:nowrap}
th{vertical-align:bottom;border-bottom-width:2px;padding:0}
th button{all:unset;box-sizing:border-box;width:100%;padding:.35rem .8rem;cursor:pointer;font-weight:600;
 text-align:inherit}
th button:focus-visible{outline:2px solid currentColor;outline-offset:-2px}
th button::after{content:'\\2195';opacity:.3;padding-left:.35em}
th[aria-sort=ascending] button::after{content:'\\2191';opacity:1}
th[aria-sort=descending] button::after{content:'\\2193';opacity:1}
tbody tr:hover{background:var(--shade)}
.left{text-align:left}.right{text-align:right}
figure{margin:1.2rem 0}figure svg{max-width:100%;height:auto}
figcaption{color:var(--faint);font-size:.9rem;max-width:46rem}
"""

_SCRIPT = """
for (const table of document.querySelectorAll('table')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') === 'ascending';
    heads.forEach(h => h.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const key = row => {
      const cell = row.cells[column];
      return 'value' in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
    };
    const numeric = v => typeof v === 'number';
    const absent = v => v === '\\u2013' || Number.isNaN(v);
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (absent(x) || absent(y)) return absent(x) - absent(y);
      const order = numeric(x) && numeric(y) ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
"""
