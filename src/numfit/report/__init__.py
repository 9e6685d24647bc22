"""Tables, SVG plots and one self-contained HTML page, made of plain data: nothing here knows what a model is."""

from numfit.report.page import Figure, Heading, Paragraph, Table, page
from numfit.report.svg import Line, Point, frontier, scatter
from numfit.report.tables import Column, markdown_table, pair_table, text_table

__all__ = [
    "Column",
    "Figure",
    "Heading",
    "Line",
    "Paragraph",
    "Point",
    "Table",
    "frontier",
    "markdown_table",
    "page",
    "pair_table",
    "scatter",
    "text_table",
]
