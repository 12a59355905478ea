"""A view in the formats of other tools: GraphML (networkx, Gephi, yEd), Mermaid, Model Explorer."""

from __future__ import annotations

import io
import json
from typing import Any

import networkx as nx

from fxlora_viz.names import clean

# Node attributes worth reading elsewhere; widths and styles are ours alone.
_FACTS = (
    "kind", "role", "site", "path", "state", "verdict", "requires_grad", "params", "matched",
)  # fmt: skip
_SHAPES = {
    "invtrapezium": ("[\\", "/]"), "trapezium": ("[/", "\\]"), "circle": ("((", "))"),
}  # fmt: skip


def graphml(graph: nx.MultiDiGraph) -> bytes:
    """Returns a view as GraphML; every attribute is text, and `box` names the boxes around."""
    plain = nx.MultiDiGraph()
    for node, data in graph.nodes(data=True):
        facts = {k: _said(data[k]) for k in _FACTS}
        label = "\n".join((data["title"], *data["lines"]))
        plain.add_node(node, label=label, box="/".join(_boxes(graph, node)), **facts)
    for i, (u, v, data) in enumerate(graph.edges(data=True)):
        plain.add_edge(
            u,
            v,
            f"e{i}",
            label=data["label"],
            style=data["style"],
            requires_grad=_said(data["grad"]),
        )
    text = io.BytesIO()
    nx.write_graphml(plain, text)
    return text.getvalue()


def mermaid(graph: nx.MultiDiGraph, direction: str = "TB") -> str:
    """Returns a view as a Mermaid flowchart.

    Args:
        graph: what `fxlora_viz.view.view` made.
        direction: "TB" or "LR".
    """
    boxes = graph.graph["boxes"]
    children: dict[str, list[str]] = {b: [] for b in boxes}
    for box, data in boxes.items():
        if data["parent"]:
            children[data["parent"]].append(box)
    inside: dict[str, list[str]] = {b: [] for b in boxes}
    for node, data in graph.nodes(data=True):
        inside[data["box"]].append(node)
    lines = [f"flowchart {direction}"]
    todo = [(b, True) for b in reversed(boxes) if not boxes[b]["parent"]]
    while todo:  # a stack of boxes to open and to close: nesting may be deep
        box, opening = todo.pop()
        if not opening:
            lines.append("end")
            continue
        lines.append(f'subgraph x_{box}["{_box_label(boxes[box])}"]')
        lines += [_mermaid_node(n, graph.nodes[n]) for n in inside[box]]
        todo.append((box, False))
        todo += [(b, True) for b in reversed(children[box])]
    for u, v, data in graph.edges(data=True):
        arrow = "-.->" if data["dashed"] or data["style"] == "idle" else "-->"
        label = f'|"{_entities(data["label"])}"|' if data["label"] else ""
        lines.append(f"n_{u} {arrow}{label} n_{v}")
    lines += [
        "classDef frozen fill:#EDF1F6,stroke:#8492A6,color:#1B2430",
        "classDef trainable fill:#FFE3C7,stroke:#B04A00,stroke-width:3px,color:#1B2430",
        "classDef idle fill:#FFFFFF,stroke:#B04A00,stroke-dasharray:2 3,color:#1B2430",
    ]
    for name in ("frozen", "trainable", "idle"):
        found = [f"n_{n}" for n, d in graph.nodes(data=True) if d["style"] == name]
        if found:
            lines.append(f"class {','.join(found)} {name}")
    return "\n".join(lines) + "\n"


def model_explorer(graph: nx.MultiDiGraph, title: str) -> dict[str, Any]:
    """Returns a view as the graph JSON that Model Explorer opens.

    Args:
        graph: what `fxlora_viz.view.view` made.
        title: names the collection.
    """
    graphs = []
    for panel in dict.fromkeys(d["panel"] for _, d in graph.nodes(data=True)):
        mine = [n for n, d in graph.nodes(data=True) if d["panel"] == panel]
        (root,) = [
            d for d in graph.graph["boxes"].values() if d["panel"] == panel and not d["parent"]
        ]
        nodes = [_explorer_node(graph, n) for n in mine]
        graphs.append({"id": f"{root['label']}: {root['note']}", "nodes": nodes})
    return {"label": title, "graphs": graphs}


def model_explorer_text(graph: nx.MultiDiGraph, title: str) -> str:
    """Returns `model_explorer` as text."""
    return json.dumps(model_explorer(graph, title), indent=1, ensure_ascii=False) + "\n"


def _explorer_node(graph: nx.MultiDiGraph, node: str) -> dict[str, Any]:
    data = graph.nodes[node]
    facts = {k: _said(data[k]) for k in _FACTS}
    facts["shape"] = ", ".join(data["lines"])
    facts["about"] = data["tooltip"]
    incoming = [
        {
            "sourceNodeId": u, "sourceNodeOutputId": "0", "targetNodeInputId": str(i),
            "metadata": _pairs({"label": e["label"], "requires_grad": _said(e["grad"])}),
        }
        for i, (u, _, e) in enumerate(graph.in_edges(node, data=True))
    ]  # fmt: skip
    # A slash in a name would be one level more of the hierarchy.
    around = (name.replace("/", "∕") for name in _boxes(graph, node)[1:])
    return {
        "id": node, "label": data["title"], "namespace": "/".join(around),
        "attrs": _pairs(facts), "incomingEdges": incoming,
    }  # fmt: skip


def _pairs(facts: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": k, "value": v} for k, v in facts.items() if v]


def _boxes(graph: nx.MultiDiGraph, node: str) -> list[str]:
    """Returns the names of the boxes around a node, outermost first."""
    boxes, found, at = graph.graph["boxes"], [], graph.nodes[node]["box"]
    while at:
        data = boxes[at]
        found.append(data["label"] + (f" × {data['count']}" if data["count"] > 1 else ""))
        at = data["parent"]
    return found[::-1]


def _said(value: Any) -> str:
    """Returns a fact as text; "" for one that is not known."""
    if isinstance(value, bool):
        return str(value).lower()
    # A path is the model's own word: it may hold what neither XML nor UTF-8 can.
    return "" if value is None or value == 0 else clean(value, 1000)


def _box_label(data: dict[str, Any]) -> str:
    count = f" × {data['count']}" if data["count"] > 1 else ""
    return "<br/>".join(_entities(t) for t in (data["label"] + count, data["note"]) if t)


def _mermaid_node(node: str, data: dict[str, Any]) -> str:
    left, right = _SHAPES.get(data["shape_name"], ("(", ")"))
    text = "<br/>".join(_entities(t) for t in (data["title"], *data["lines"]))
    return f'n_{node}{left}"{text}"{right}'


def _entities(text: str) -> str:
    """Returns a text as Mermaid takes it in quotes: what is no letter or digit as a number.

    A label that begins like a list ("1. x") or holds backticks is read as Markdown, so even
    harmless signs are escaped.
    """
    return "".join(c if c.isalnum() or c in " ,:·×" else f"#{ord(c)};" for c in text)
