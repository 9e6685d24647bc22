"""Where to put the labels of a plot so that none covers a point, a line or another label.

Each label tries some hundred places around its point, nearest first, and takes the one that costs least; a few rounds
let labels placed early make room for late ones. Greedy and deterministic: a dozen labels come out well, two dozen come
out legible, hundreds would not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# degrees, y downwards: right first, as reading expects
_DIRECTIONS = (0, -35, 35, 180, -145, 145, -90, 90, -15, 15, -165, 165, -60, 60, -120, 120)
_DISTANCES = (9, 15, 24, 36, 52, 72, 96, 124)  # pixels from the point to the label's nearest edge
_ROUNDS = 6

Segment = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area in common, square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: Box) -> float:
        """How far this box sticks out of `frame`, pixels."""
        across = max(0.0, frame.left - self.left) + max(0.0, self.right - frame.right)
        return across + max(0.0, frame.top - self.top) + max(0.0, self.bottom - frame.bottom)

    def crossed(self, start: tuple[float, float], end: tuple[float, float]) -> float:
        """Length of the segment start–end inside this box, pixels (Liang–Barsky clipping)."""
        (x0, y0), (x1, y1) = start, end
        dx, dy = x1 - x0, y1 - y0
        enter, leave = 0.0, 1.0
        for p, q in ((-dx, x0 - self.left), (dx, self.right - x0), (-dy, y0 - self.top), (dy, self.bottom - y0)):
            if p == 0:
                if q < 0:
                    return 0.0
            elif p < 0:
                enter = max(enter, q / p)
            else:
                leave = min(leave, q / p)
        return max(0.0, leave - enter) * math.hypot(dx, dy)


def place_labels(
    anchors: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    segments: Sequence[Segment] = (),
    obstacles: Sequence[Box] = (),
) -> list[Box]:
    """One box per label.

    Args:
        anchors: the points, pixels.
        sizes: width and height of each label, pixels; (0, 0) for a point without one.
        frame: labels should stay inside.
        segments: lines that labels should not lie on.
        obstacles: rectangles that labels should not lie on.
    """
    markers = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    placed = [_candidates(anchor, size)[0][1] for anchor, size in zip(anchors, sizes, strict=True)]
    halos = [Box(x - 12, y - 12, x + 12, y + 12) for x, y in anchors]  # a label this near seems to belong to the point
    fixed = [*markers, *obstacles]
    for _ in range(_ROUNDS):
        before = list(placed)
        for i, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
            if not size[0]:
                continue
            labels = [box for j, box in enumerate(placed) if j != i and sizes[j][0]]
            lines = [(anchors[j], nearest(placed[j], anchors[j])) for j in range(len(placed)) if j != i and sizes[j][0]]
            best = math.inf
            for reluctance, box in _candidates(anchor, size):
                if reluctance >= best:
                    continue
                leader = (anchor, nearest(box, anchor))
                cost = reluctance + 50 * box.outside(frame)
                cost += sum(60 + 3 * area for other in labels if (area := box.overlap(other)))
                cost += sum(60 + 2 * area for other in fixed if (area := box.overlap(other)))
                cost += sum(12 for j, halo in enumerate(halos) if j != i and box.overlap(halo))
                cost += sum(0.7 * box.crossed(*segment) for segment in segments)
                cost += sum(10 + 2 * length for line in lines if (length := box.crossed(*line)))
                cost += sum(10 + 2 * length for other in labels if (length := other.crossed(*leader)))
                cost += sum(8 + length for j, m in enumerate(markers) if j != i and (length := m.crossed(*leader)))
                cost += sum(25 for line in lines if _cross(leader, line))
                if cost < best:
                    best, placed[i] = cost, box
        if placed == before:
            break
    return placed


def nearest(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    """The point of `box` nearest to `point`: where a leader line ends."""
    return min(max(point[0], box.left), box.right), min(max(point[1], box.top), box.bottom)


def _cross(one: Segment, other: Segment) -> bool:
    """Whether two segments cross inside both."""

    def side(segment: Segment, point: tuple[float, float]) -> float:
        (x0, y0), (x1, y1) = segment
        return (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0)

    return side(one, other[0]) * side(one, other[1]) < 0 and side(other, one[0]) * side(other, one[1]) < 0


def _candidates(anchor: tuple[float, float], size: tuple[float, float]) -> list[tuple[float, Box]]:
    """(reluctance, box) of every place a label may take, the most welcome first."""
    (x, y), (width, height) = anchor, size
    found = []
    for distance in _DISTANCES:
        for order, degrees in enumerate(_DIRECTIONS):
            ux, uy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            # the box's centre: `distance` away from the point along u, plus half the box in that direction
            cx = x + ux * distance + (0 if abs(ux) < 1e-9 else math.copysign(width / 2, ux))
            cy = y + uy * distance + (0 if abs(uy) < 1e-9 else math.copysign(height / 2, uy))
            box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            found.append((0.6 * (distance - _DISTANCES[0]) + 0.4 * order, box))
    return found
