"""The view and its layout -> SVG: our own text, cards, legend and colours, whatever the engine."""

from __future__ import annotations

import hashlib
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import networkx as nx

from fxlora_viz import legend, metrics, theme
from fxlora_viz.dot import box_texts, classes, edge_classes
from fxlora_viz.layout import Layout, Point, Route
from fxlora_viz.style import inline_style_sheet, style_sheet

_PAD = 22.0


def svg_text(graph: nx.MultiDiGraph, layout: Layout, mode: str = "auto") -> str:
    """Returns the SVG of a laid-out view.

    Args:
        graph: what `fxlora_viz.view.view` made.
        layout: where everything goes.
        mode: "auto" follows the reader's colour scheme; "light" or "dark" is fixed.
    """
    return _svg(graph, layout, mode, "")


def inline_svg_text(graph: nx.MultiDiGraph, layout: Layout, mode: str = "auto") -> str:
    """Returns the SVG for a page that holds others: no id and no rule of style is shared.

    What the names end in comes from the drawing itself, so that the same input gives the same
    bytes; two equal drawings in one page may share them.
    """
    plain = _svg(graph, layout, mode, "")
    digest = hashlib.sha256(plain.encode("utf-8")).hexdigest()[:8]
    return _svg(graph, layout, mode, f"_{digest}")


def _svg(graph: nx.MultiDiGraph, layout: Layout, mode: str, tail: str) -> str:
    """Returns the SVG; every id of it, and the class its rules hold for, ends in `tail`."""
    style = inline_style_sheet(mode, f"fxlora{tail}") if tail else style_sheet(mode)
    key = legend.legend(graph, max(layout.width - 16, 260.0))
    width = max(layout.width, key.width) + 2 * _PAD
    height = layout.height + key.height + 2 * _PAD
    title, description = _words(graph)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fxlora{tail}" role="img" '
        f'aria-labelledby="fx_title{tail} fx_desc{tail}" width="{_n(width)}" height="{_n(height)}" '
        f'viewBox="0 0 {_n(width)} {_n(height)}" font-family="{theme.FONT}">',
        f'<title id="fx_title{tail}">{escape(title)}</title>',
        f'<desc id="fx_desc{tail}">{escape(description)}</desc>',
        f"<style>{style}</style>",
        # A ground of its own: dark text or light, the page below may be of the other kind.
        f'<rect class="fx_ground" width="{_n(width)}" height="{_n(height)}"/>',
        f'<g transform="translate({_n(_PAD)} {_n(_PAD)})">',
        *(
            _box(box + tail, data, layout.boxes[box])
            for box, data in graph.graph["boxes"].items()
            if box in layout.boxes
        ),
        *_edges(graph, layout, tail),
        *(
            _node(n + tail, d, layout.nodes[n])
            for n, d in graph.nodes(data=True)
            if n in layout.nodes
        ),
        *(
            _box_label(data, layout.boxes[box])
            for box, data in graph.graph["boxes"].items()
            if box in layout.boxes
        ),
        f'<g class="fx_legend" transform="translate(8 {_n(layout.height + 14)})">{key.svg}</g>',
        "</g></svg>\n",
    ]
    return "\n".join(parts)


def _words(graph: nx.MultiDiGraph) -> tuple[str, str]:
    panels = [d for d in graph.graph["boxes"].values() if d["kind"] == "panel"]
    title = " / ".join(f"{d['label']}: {d['note']}" for d in panels)
    folds = [
        f"{d['label']} stands for {d['count']} equal blocks"
        for d in graph.graph["boxes"].values()
        if d["count"] > 1
    ]
    text = f"{graph.number_of_nodes()} nodes, from the inputs at the start to the outputs. "
    return title, text + "; ".join(dict.fromkeys(folds))


# ---- boxes -----------------------------------------------------------------------------------


def _box(box: str, data: dict[str, Any], at: tuple[float, float, float, float]) -> str:
    x0, y0, x1, y1 = at
    kind = data["kind"]
    radius = {"panel": 12, "fold": 12, "block": 12}.get(kind, 9)

    def card(offset: float, extra: str = "") -> str:
        return (
            f'<rect class="s{extra}" x="{_n(x0 + offset)}" y="{_n(y0 + offset)}" '
            f'width="{_n(x1 - x0)}" height="{_n(y1 - y0)}" rx="{radius}"/>'
        )

    behind = [card(theme.SHADOW * i, " c") for i in (2, 1)] if kind == "fold" else []
    return f'<g id="{box}" class="fx_box fx_{kind}">{"".join(behind)}{card(0)}</g>'


def _box_label(data: dict[str, Any], at: tuple[float, float, float, float]) -> str:
    kind, size = data["kind"], theme.LABELS[data["kind"]]
    x, top = at[0] + theme.INSETS[kind], at[1] + theme.TOPS[kind]
    count = f'<tspan class="n" dx="8">× {data["count"]}</tspan>' if data["count"] > 1 else ""
    wide = metrics.width(box_texts(data)[0], size, bold=True)
    text = _strip(x, top, wide, size) + _line("t", x, top, size, escape(data["label"]) + count)
    if data["note"]:
        note = theme.NOTES.get(kind, size)
        below = top + (20 if kind == "panel" else 13)
        wide = metrics.width(data["note"], note, bold=kind == "panel")
        spans = [
            f'<tspan class="{"h" if hot else "d"}">{escape(part)}</tspan>'
            for part, hot in data["parts"] or ((data["note"], False),)
        ]
        text += _strip(x, below, wide, note) + _line("d", x, below, note, "".join(spans))
    return f'<g class="fx_label fx_label_{kind}">{text}</g>'


def _strip(x: float, y: float, width: float, size: float) -> str:
    # Edges enter a box through its top: a strip of the box's own colour keeps its name readable.
    return (
        f'<rect x="{_n(x - 2)}" y="{_n(y - 0.8 * size)}" width="{_n(width + 4)}" '
        f'height="{_n(size)}"/>'
    )


def _line(style: str, x: float, y: float, size: float, inner: str) -> str:
    return (
        f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" font-size="{size:g}" '
        f'xml:space="preserve">{inner}</text>'
    )


# ---- nodes -----------------------------------------------------------------------------------


def _node(name: str, data: dict[str, Any], at: Point) -> str:
    x, y = at
    facts = {
        "data-path": data["path"][:300],
        "data-site": data["site"][:300],
        "data-role": data["role"],
        "data-state": data["state"],
        "data-verdict": data["verdict"],
        "data-params": str(data["params"]) if data["params"] else "",
        "data-grad": "" if data["requires_grad"] is None else str(data["requires_grad"]).lower(),
    }
    shown = "".join(f" {k}={quoteattr(_plain(v))}" for k, v in facts.items() if v)
    return (
        f'<g id="{name}" class="{classes(data)}"{shown}>'
        f"<title>{escape(data['tooltip'])}</title>"
        f"{shape_svg(data['shape_name'], x, y, data['width'], data['height'])}"
        f"{_text(data, x, y)}</g>"
    )


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def shape_svg(shape: str, x: float, y: float, width: float, height: float) -> str:
    """Returns the outline of a node around its centre."""
    if shape == "circle":
        return f'<circle class="s" cx="{_n(x)}" cy="{_n(y)}" r="{_n(width / 2)}"/>'
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    lean = theme.SLANT * width
    if shape == "invtrapezium":
        corners = ((left, top), (right, top), (right - lean, bottom), (left + lean, bottom))
    elif shape == "trapezium":
        corners = ((left + lean, top), (right - lean, top), (right, bottom), (left, bottom))
    else:
        return (
            f'<rect class="s" x="{_n(left)}" y="{_n(top)}" width="{_n(width)}" '
            f'height="{_n(height)}" rx="9"/>'
        )
    return f'<polygon class="s" points="{" ".join(f"{_n(a)},{_n(b)}" for a, b in corners)}"/>'


def _text(data: dict[str, Any], x: float, y: float) -> str:
    title, lines = escape(data["title"]), data["lines"]
    if data["shape_name"] == "circle":
        return _line("t m", x, y + 4.4, 13, title)
    step = 12.0 if data["shape_name"] != "box" else 13.5
    first = y - step * len(lines) / 2 + 4.2
    found = [_line("t m", x, first, theme.TITLE, title)]
    for i, line in enumerate(lines, start=1):
        style = "g m" if data["tagged"] and i == len(lines) else "d m"
        found.append(_line(style, x, first + step * i, theme.TEXT, escape(line)))
    return "".join(found)


# ---- edges -----------------------------------------------------------------------------------


def _edges(graph: nx.MultiDiGraph, layout: Layout, tail: str) -> list[str]:
    found = []
    for i, (u, v, data) in enumerate(graph.edges(data=True)):
        if i in layout.edges:
            found.append(_edge(f"e{i}{tail}", u + tail, v + tail, data, layout.edges[i]))
    return found


def _edge(name: str, u: str, v: str, data: dict[str, Any], route: Route) -> str:
    p = route.points
    curve = f"M{_n(p[0][0])},{_n(p[0][1])}C" + " ".join(f"{_n(x)},{_n(y)}" for x, y in p[1:])
    head = arrow_svg(p[-1], route.tip) if route.tip is not None else ""
    label = ""
    if data["label"] and route.label is not None:
        # A number of the model's own is quiet; the adapter's scaling and a cut are not.
        loud = data["style"] in ("added", "idle") or data["label"].startswith("✕")
        label = _line(
            "h m" if loud else "d m",
            route.label[0],
            route.label[1] + 3.5,
            10,
            escape(data["label"]),
        )
    return (
        f'<g id="{name}" class="{edge_classes(data)}" data-from="{u}" data-to="{v}">'
        f'<path d="{curve}"/>{head}{label}</g>'
    )


def arrow_svg(start: Point, tip: Point) -> str:
    """Returns an arrowhead from the end of a curve to the tip."""
    dx, dy = tip[0] - start[0], tip[1] - start[1]
    length = (dx * dx + dy * dy) ** 0.5 or 1.0
    nx_, ny = -dy / length * 2.3, dx / length * 2.3
    corners = (tip, (start[0] + nx_, start[1] + ny), (start[0] - nx_, start[1] - ny))
    return f'<polygon points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in corners)}"/>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.05 else "0"
