"""The networkx view -> DOT text, the same in every process."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx

from fxlora_viz import metrics, theme
from fxlora_viz.align import order, rows

_OVER = {"trapezium": "invtrapezium", "invtrapezium": "trapezium"}


def dot_text(graph: nx.MultiDiGraph, direction: str = "TB", bare: bool = False) -> str:
    """Returns the DOT text of a view.

    Args:
        graph: what `fxlora_viz.view.view` made.
        direction: "TB" or "LR".
        bare: True for the text an engine lays out: labels only reserve their room, by the
            metrics table rather than by the engine's own idea of a font.
    """
    writer = Writer(graph, bare, mirrored=bare and direction == "LR")
    return "\n".join([*head(direction), *writer.body(), "}", ""])


def head(direction: str) -> list[str]:
    """Returns the lines before the first box: what holds for every graph, node and edge."""
    return [
        "digraph fxlora {",
        f"graph [rankdir={direction} newrank=true compound=true splines=spline nodesep=0.24 "
        f'ranksep=0.34 fontname="{theme.FONT}" fontcolor="{theme.INK}" bgcolor="transparent" '
        "pad=0.3 outputorder=edgesfirst];",
        f'node [fontname="{theme.FONT}" fontsize=10 fontcolor="{theme.INK}" margin=0 '
        "fixedsize=true];",
        f'edge [fontname="{theme.FONT}" fontsize=10 arrowsize=0.62];',
    ]


class Writer:
    """Writes boxes with their nodes inside, then edges, then rows."""

    def __init__(self, graph: nx.MultiDiGraph, bare: bool, mirrored: bool) -> None:
        self._graph = graph
        self._bare = bare
        self._mirrored = mirrored  # see `fxlora_viz.layout.read_layout`
        self._boxes: dict[str, dict[str, Any]] = graph.graph["boxes"]
        self._rows = rows(graph)
        self._children: dict[str, list[str]] = {b: [] for b in self._boxes}
        self._nodes: dict[str, list[str]] = {b: [] for b in self._boxes}
        for box, data in self._boxes.items():
            if data["parent"]:
                self._children[data["parent"]].append(box)
        for node, data in graph.nodes(data=True):
            self._nodes[data["box"]].append(node)

    def body(self) -> list[str]:
        """Returns the lines of the graph."""
        lines: list[str] = []
        todo: list[tuple[str, bool]] = [
            (b, True) for b, d in reversed(self._boxes.items()) if not d["parent"]
        ]
        while todo:  # a stack of boxes to open and to close: nesting may be deep
            box, opening = todo.pop()
            if not opening:
                lines.append("}")
                continue
            if self._boxes[box]["kind"] == "panel":
                lines += self._orders(self._boxes[box]["panel"])
            lines.append(f'subgraph "cluster_{box}" {{')
            lines.append(self.box(box))
            lines += [f'"{n}" [{self.node(n)}];' for n in self._nodes[box]]
            todo.append((box, False))
            todo += [(b, True) for b in reversed(self._children[box])]
        lines += self._edges()
        for row in self._rows:
            lines.append("{rank=same; " + "; ".join(f'"{n}"' for n in row) + "}")
        return lines

    def box(self, box: str) -> str:
        """Returns the attributes of a box, as statements of its subgraph."""
        return _attributes(self._box(box), ";")

    def node(self, node: str) -> str:
        """Returns the attributes of a node."""
        return _attributes(self._node(node))

    def _orders(self, panel: str) -> list[str]:
        """Returns invisible edges from left to right.

        They stand before the panel: an engine may forget the ones it reads after the clusters.
        """
        return [
            " -> ".join(f'"{n}"' for n in nodes) + ' [style="invis"];'
            for row in self._rows
            for nodes in order(self._graph, row)
            if self._graph.nodes[nodes[0]]["panel"] == panel
        ]

    def _box(self, box: str) -> dict[str, Any]:
        data = self._boxes[box]
        kind = data["kind"]
        fill, line, width = theme.BOXES[kind]
        # Every attribute on every box: DOT hands the ones left out down to nested clusters.
        return {
            "id": box,
            "class": f"fx_{kind}",
            **(_reserve(data) if self._bare else {"label": _lines(box_texts(data), r"\l")}),
            "labeljust": "l",
            "labelloc": "b" if self._mirrored else "t",
            "fontcolor": theme.HOT if kind == "site" else theme.INK,
            "style": "rounded,filled,dashed" if kind == "site" else "rounded,filled",
            "fillcolor": fill,
            "color": line,
            "penwidth": width,
            "margin": theme.MARGINS[kind],
            **({} if self._bare else {"fontsize": 15 if kind == "panel" else theme.LABELS[kind]}),
        }

    def _node(self, node: str) -> dict[str, Any]:
        data = self._graph.nodes[node]
        shape = data["shape_name"]
        size = {
            "shape": _OVER.get(shape, shape) if self._mirrored else shape,
            "width": f"{data['width'] / 72:.4f}",
            "height": f"{data['height'] / 72:.4f}",
        }
        if self._bare:
            return {"label": "", **size}
        fill, line, width = theme.NODES[data["style"]]
        style = "filled,rounded" if data["shape_name"] == "box" else "filled"
        if data["style"] in ("idle", "unused"):
            style += ",dotted"
        if data["matched"]:
            style, line, width = style + ",dashed", theme.HOT, 1.8
        return {
            "id": node,
            "label": _lines((data["title"], *data["lines"]), r"\n"),
            "class": classes(data),
            "tooltip": _lines(data["tooltip"].split("\n"), r"\n"),
            **size,
            "style": style,
            "fillcolor": fill,
            "color": line,
            "penwidth": width,
        }

    def _edges(self) -> list[str]:
        lines = []
        for i, (u, v, data) in enumerate(self._graph.edges(data=True)):
            if self._bare and data["far"]:
                continue  # the port it ends at names its source
            color, width = theme.EDGES[data["style"]]
            hot = data["style"] in ("added", "idle") or data["label"].startswith("✕")
            shown = {
                "id": f"e{i}",
                "weight": data["weight"],
                **({"constraint": "false"} if data["far"] else {}),
                **({"minlen": data["minlen"]} if data["minlen"] > 1 else {}),
                **({"label": _quote_text(f" {data['label']}")} if data["label"] else {}),
            }
            if not self._bare:
                shown |= {
                    "class": edge_classes(data),
                    "color": color,
                    "penwidth": width,
                    **({"style": "dashed"} if data["dashed"] else {}),
                    **({"style": "dotted"} if data["style"] == "idle" else {}),
                    **({"fontcolor": theme.HOT} if data["label"] and hot else {}),
                }
            lines.append(f'"{u}" -> "{v}" [{_attributes(shown)}];')
        return lines


def classes(data: dict[str, Any]) -> str:
    """Returns the CSS classes of a node."""
    found = ["fx", f"fx_{data['style']}"]
    if data["role"]:
        found.append(f"fx_role_{data['role'].lower()}")
    if data["matched"]:
        found.append("fx_matched")
    if data["requires_grad"]:
        found.append("fx_grad")
    return " ".join(found)


def edge_classes(data: dict[str, Any]) -> str:
    """Returns the CSS classes of an edge."""
    found = ["fx_edge", f"fx_{data['style']}"]
    if data["dashed"]:
        found.append("fx_skip")
    if data["grad"]:
        found.append("fx_grad")
    return " ".join(found)


def box_texts(data: dict[str, Any]) -> tuple[str, ...]:
    """Returns the lines of a box's label."""
    label = data["label"] + (f"   × {data['count']}" if data["count"] > 1 else "")
    return (label, data["note"]) if data["note"] else (label,)


def _reserve(data: dict[str, Any]) -> dict[str, Any]:
    """Returns a label as wide and high as the text we draw there ourselves.

    Engines disagree about how wide Helvetica is (259 to 326 points for the same label); all of
    them agree that a fixed-width letter is 0.6 of its size.
    """
    kind = data["kind"]
    size, letter = theme.LABELS[kind], 13 if kind == "panel" else 10.5
    texts = box_texts(data)
    wide = metrics.width(texts[0], size, bold=True)
    if len(texts) > 1:
        wide = max(wide, metrics.width(texts[1], theme.NOTES.get(kind, size), bold=True))
    wide += 2 * theme.INSETS[kind] - 16  # Graphviz itself leaves eight points on either side
    lines = ["0" * math.ceil(wide / (0.6 * letter)), *("0" for _ in texts[1:])]
    if kind == "panel":
        lines.append("0")  # a title of twenty points takes more than a line of thirteen
    label = "".join(f"{line}{chr(92)}l" for line in lines)
    return {"label": label, "fontname": "Courier", "fontsize": letter}


def _attributes(values: dict[str, Any], between: str = "") -> str:
    sep = f"{between} " if between else " "
    return sep.join(f'{k}="{v}"' for k, v in values.items()) + between


def _lines(texts: tuple[str, ...] | list[str], end: str) -> str:
    quoted = [_quote_text(t) for t in texts]
    return end.join(quoted) + (end if end == r"\l" else "")


def _quote_text(text: str) -> str:
    # Graphviz reads HTML entities in plain labels as well, so & needs escaping even there.
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
