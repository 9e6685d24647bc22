"""Tables, plots and the page: alignment, escaping, valid XML, labels that do not cover each other."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from numfit.report import (
    Column,
    Figure,
    Heading,
    Line,
    Paragraph,
    Point,
    Table,
    frontier,
    markdown_table,
    page,
    pair_table,
    scatter,
    text_table,
)
from numfit.report.placement import Box, place_labels

EVIL = "<script>alert('1')</script> & \"quoted\" ]]>"
COLUMNS = [
    Column("name", "format", align="left"),
    Column("bits", "bits", ".4f"),
    Column("size", "MB", lambda v: f"{v / 1e6:.1f}"),
]
ROWS = [
    {"name": "mant4-g64", "bits": 4.3125, "size": 97_200_000},
    {"name": EVIL, "bits": 3.0, "size": None},
    {"name": "x"},
]
DEMO = [
    Point(4.3125, 0.2665, "mant4-g64"), Point(4.34, 0.213, "mant4-g32@e3m3"), Point(4.25, 0.3137, "fp4.25"),
    Point(5.357, 0.0443, "fp5.33"), Point(3.135, 2.1, "pot3-g128"), Point(4.135, 0.46, "int4-g128"),
    Point(4.25, 0.31, "nf4-g64"),
]  # fmt: skip


def test_text_table_is_aligned() -> None:
    lines = text_table(ROWS[:1] + ROWS[2:], COLUMNS).split("\n")
    assert lines == [
        "format       bits    MB",
        "─────────  ──────  ────",
        "mant4-g64  4.3125  97.2",
        "x               –     –",
    ]
    assert text_table([], COLUMNS, indent="  ").split("\n")[0] == "  format  bits  MB"


def test_markdown_table_escapes() -> None:
    text = markdown_table([{"name": "a|b\nc <i> *x*"}], COLUMNS)
    assert text.split("\n") == ["| format | bits | MB |", "|:---|---:|---:|", "| a\\|b c \\<i> \\*x\\* | – | – |"]


def test_pair_table() -> None:
    assert pair_table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_is_xml_and_says_everything() -> None:
    points = [*DEMO, Point(4.0, 0.5, EVIL, group="b & c"), Point(5, 0.6, group="d")]
    svg = scatter(points, title=EVIL, x_label="bits <", y_label="KL &", lines=[frontier(DEMO), Line(((3, 1), (4, 1)))])
    said = texts(svg)
    for label in [EVIL, "bits <", "KL &", "b & c", "d", *(p.label for p in DEMO)]:
        assert label in said
    assert "<script" not in svg
    root = ElementTree.fromstring(svg)
    marks = [e for e in root.iter() if (e.get("class") or "").startswith("nf-mark")]
    assert len(marks) == len(points) + 2  # and two in the legend
    assert "prefers-color-scheme:dark" in svg


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.05, 2.0], {"0.05", "0.1", "0.2", "0.5", "1", "2"}),
        ([1e-6, 10.0], {"1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10"}),
        ([0.21, 0.24], {"0.21", "0.22", "0.23", "0.24"}),
    ],
)
def test_logarithmic_ticks(values: list[float], ticks: set[str]) -> None:
    svg = scatter([Point(1000 + i, v) for i, v in enumerate(values)], title="t", x_label="x", y_label="y")
    root = ElementTree.fromstring(svg)
    shown = {e.text for e in root.iter() if e.get("class") == "nf-tick" and e.get("text-anchor") == "end"}
    assert ticks <= shown


def test_axes_are_true() -> None:
    """Pixels are affine in log y on the logarithmic axis, in x on the linear one; ticks sit where values would."""
    svg = scatter([Point(1, 1), Point(2, 10), Point(3, 100)], title="t", x_label="x", y_label="y")
    circles = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    xs, ys = ([float(e.get(k) or "nan") for e in circles] for k in ("cx", "cy"))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2) and xs[0] < xs[1]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2) and ys[0] > ys[1]
    tick = next(e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "nf-tick" and e.text == "10")
    assert float(tick.get("y") or "nan") - 4 == pytest.approx(ys[1], abs=0.2)


def test_bad_points_are_refused() -> None:
    for bad in (Point(1, 0, "zero"), Point(1, -1), Point(math.nan, 1), Point(1, math.inf)):
        with pytest.raises(ValueError, match="cannot be drawn"):
            scatter([Point(1, 1), bad], title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="at least one"):
        scatter([], title="t", x_label="x", y_label="y")
    scatter([Point(1, 0, "zero"), Point(1, -1)], title="t", x_label="x", y_label="y", log_y=False)


def test_frontier() -> None:
    line = frontier([Point(3, 1), Point(1, 3), Point(2, 4), Point(2, 2), Point(4, 1)])
    assert line.points == ((1, 3), (2, 2), (3, 1))


def test_labels_do_not_cover_each_other() -> None:
    anchors = [(100.0 + 3 * (i % 4), 100.0 + 4 * (i // 4)) for i in range(12)]  # a tight bunch
    sizes = [(80.0, 15.0)] * 12
    frame = Box(0, 0, 500, 400)
    boxes = place_labels(anchors, sizes, frame)
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) == 0
    for box in boxes:
        assert box.outside(frame) == 0
        assert all(box.overlap(Box(x - 5, y - 5, x + 5, y + 5)) == 0 for x, y in anchors)
    assert boxes == place_labels(anchors, sizes, frame)


def test_box_arithmetic() -> None:
    box = Box(0, 0, 10, 10)
    assert box.overlap(Box(5, 5, 20, 20)) == 25 and box.overlap(Box(10, 0, 20, 10)) == 0
    assert box.crossed((-5, 5), (15, 5)) == pytest.approx(10) and box.crossed((-5, 20), (15, 20)) == 0
    assert box.crossed((2, 2), (2, 5)) == pytest.approx(3) and box.crossed((11, -5), (11, 5)) == 0


class Reader(HTMLParser):
    """Counts tags and collects text, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def test_page_escapes_everything() -> None:
    plot = scatter([Point(1, 1, EVIL)], title=EVIL, x_label=EVIL, y_label=EVIL)
    columns = [Column("name", EVIL, align="left", hint=EVIL), Column("bits", "bits", ".4f")]
    parts = [
        Heading(EVIL), Paragraph(EVIL), Paragraph(EVIL, preformatted=True), Table(ROWS, columns, EVIL),
        Figure(plot, EVIL),
    ]  # fmt: skip
    html = page(EVIL, parts)
    seen = Reader(html)
    assert seen.tags.count("script") == 1 and seen.tags.count("tr") == 4 and seen.tags.count("svg") == 1
    assert seen.data.count(EVIL) >= 9
    assert seen.links == [] and not re.search(r"url\(|@import", html)  # loads nothing
    assert 'data-value="4.3125"' in html
