"""Where an engine puts everything: its JSON read into plain numbers, y pointing down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Route:
    """The curve of an edge: Bézier control points, the tip of its arrow, where its label goes."""

    points: tuple[Point, ...]
    tip: Point | None
    label: Point | None


@dataclass(frozen=True)
class Layout:
    """Positions in points.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        nodes: id -> centre.
        boxes: id -> (left, top, right, bottom).
        edges: index in the view -> route.
    """

    width: float
    height: float
    nodes: dict[str, Point]
    boxes: dict[str, tuple[float, float, float, float]]
    edges: dict[int, Route]


def read_layout(text: bytes, mirrored: bool = False) -> Layout:
    """Reads what an engine wrote as `json0`.

    Args:
        text: the JSON.
        mirrored: True to leave y as Graphviz has it, upside down: a drawing to the right is laid
            out with its first node at the bottom, and reads from the top this way.
    """
    data = json.loads(text.decode("utf-8"))
    _, _, width, height = _numbers(data["bb"])

    def flip(pos: str) -> Point:
        x, y = _numbers(pos)
        return x, y if mirrored else height - y

    nodes: dict[str, Point] = {}
    boxes: dict[str, tuple[float, float, float, float]] = {}
    for thing in data.get("objects", ()):
        name = thing["name"]
        if name.startswith("cluster_") and "bb" in thing:
            x0, y0, x1, y1 = _numbers(thing["bb"])
            top, bottom = (y0, y1) if mirrored else (height - y1, height - y0)
            boxes[name.removeprefix("cluster_")] = (x0, top, x1, bottom)
        elif "pos" in thing:
            nodes[name] = flip(thing["pos"])
    edges = {
        int(e["id"].removeprefix("e")): _route(e["pos"], e.get("lp"), flip)
        for e in data.get("edges", ())
        if "pos" in e and "id" in e
    }
    return Layout(width, height, nodes, boxes, edges)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(n) for n in text.split(","))


def _route(pos: str, label: str | None, flip: Callable[[str], Point]) -> Route:
    tip: Point | None = None
    points: list[Point] = []
    for part in pos.split(";")[0].split():
        if part.startswith("e,"):
            tip = flip(part[2:])
        elif not part.startswith("s,"):
            points.append(flip(part))
    return Route(tuple(points), tip, flip(label) if label else None)
