"""Panels -> one networkx graph that holds all a renderer needs: sizes, classes, weights, boxes."""

from __future__ import annotations

from typing import Any

import networkx as nx

from fxlora_viz import metrics, theme
from fxlora_viz.headings import heading
from fxlora_viz.marks import IDLE
from fxlora_viz.names import clean, identifier, quantity, tensor
from fxlora_viz.picture import Arrow, Box, Item, Panel

_ADDED = ("lora_A", "diagonal", "lora_B", "delta", "magnitude", "rows")
_TOLD = {
    "base": "frozen base",
    "sum": "base(x) + scaling · B(A(x))",
    "delta": "the weight B A",
    "diagonal": "the diagonal between lora_A and lora_B",
    "magnitude": "DoRA: the sum is rescaled by m / |W + scaling · B A|",
    "rows": "trainable rows in place of those of W",
}


def view(panels: list[Panel]) -> nx.MultiDiGraph:
    """Returns the graph of a sheet.

    Node attributes: `key`, `panel`, `box`, `kind`, `title`, `lines`, `shape_name`, `width` and
    `height` in points, `state`, `matched`, `style`, `requires_grad`, `params`, `tooltip`, `verdict`.
    Edge attributes: `style`, `dashed`, `far` (a port names its source; no line), `grad`, `label`, `weight`, `minlen`.
    Graph attributes: `boxes` (id -> attributes, outermost first), `beside` (nodes for one row).
    """
    graph = nx.MultiDiGraph()
    graph.graph["boxes"] = {}
    graph.graph["beside"] = []
    taken: dict[str, str] = {}
    sites = _sites(panels)
    for index, panel in enumerate(panels):
        name = "ba"[index] if len(panels) == 2 else "g"
        _Sheet(graph, panel, name, taken, sites if index == 0 else {}).add(index, len(panels))
    return graph


def _sites(panels: list[Panel]) -> dict[str, None]:
    """Returns the modules that own a site of the last panel, to mark them in the first."""
    if len(panels) < 2:
        return {}
    panel = panels[-1]
    read = {a.target for a in panel.arrows}
    found = {i.site: None for i in panel.items.values() if i.site}
    for key, item in panel.items.items():
        weight = item.role == "base" or item.verdict == "bypassed"
        if weight and key not in read:  # a weight that is read, not a layer's call
            found.update((w.name, None) for w in item.weights)
    return found


class _Sheet:
    """Adds one panel to the graph."""

    def __init__(
        self,
        graph: nx.MultiDiGraph,
        panel: Panel,
        name: str,
        taken: dict[str, str],
        sites: dict[str, None],
    ) -> None:
        self._graph = graph
        self._panel = panel
        self._name = name
        self._sites = sites
        self._ids = {k: identifier(f"{name}_{k}", taken) for k in (*panel.items, *panel.boxes)}
        self._root = identifier(f"{name}_panel", taken)

    def add(self, index: int, count: int) -> None:
        """Adds boxes, nodes and edges."""
        title, parts = heading(self._panel.facts, index, count)
        boxes = self._graph.graph["boxes"]
        boxes[self._root] = {
            "kind": "panel", "label": title, "note": "".join(t for t, _ in parts),
            "parts": parts, "count": 1, "parent": "", "panel": self._name, "verdict": "",
        }  # fmt: skip
        for key in _outermost_first(self._panel.boxes):
            boxes[self._ids[key]] = self._box(self._panel.boxes[key])
        for item in self._panel.items.values():
            self._graph.add_node(self._ids[item.key], **self._node(item))
            if item.beside in self._ids:
                self._graph.graph["beside"].append([self._ids[item.beside], self._ids[item.key]])
        self._edges()

    def _box(self, box: Box) -> dict[str, Any]:
        return {
            "kind": box.kind, "label": box.label, "note": box.note, "count": box.count,
            "parts": (), "parent": self._ids[box.parent] if box.parent else self._root,
            "panel": self._name, "verdict": box.verdict,
        }  # fmt: skip

    # ---- nodes -------------------------------------------------------------------------------

    def _node(self, item: Item) -> dict[str, Any]:
        home = self._panel.home.get(item.key, "")
        shape = _shape(item)
        title, lines = _words(item)
        width, height = _size(shape, title, lines)
        matched = bool(self._sites) and _matched(item, self._sites)
        return {
            "key": item.key, "panel": self._name, "kind": item.kind, "role": item.role,
            "site": item.site, "box": self._ids[home] if home else self._root,
            "title": title, "lines": lines, "tagged": bool(item.tags and item.kind != "circle"),
            "shape_name": shape, "width": width, "height": height,
            "state": item.state, "matched": matched, "style": _style(item),
            "requires_grad": item.grad, "params": item.params, "verdict": item.verdict,
            "tooltip": _tooltip(item, matched), "path": item.path,
        }  # fmt: skip

    # ---- edges -------------------------------------------------------------------------------

    def _edges(self) -> None:
        items, arrows = self._panel.items, self._panel.arrows
        plain = nx.DiGraph((a.source, a.target) for a in arrows)
        skips = _skips(plain, items)
        spine = nx.DiGraph(e for e in plain.edges if e not in skips)
        for a in arrows:
            source, target = items[a.source], items[a.target]
            added = source.role in _ADDED or target.role == "lora_A"
            idle = (source if source.role in _ADDED else target).verdict in IDLE
            style = (
                "idle"
                if added and idle
                else "added"
                if added
                else "quiet"
                if a.grad is False
                else "kept"
            )
            skip = (a.source, a.target) in skips
            alone = not skip and spine.out_degree(a.source) == 1 == spine.in_degree(a.target)
            self._graph.add_edge(
                self._ids[a.source], self._ids[a.target],
                style=style, dashed=skip, far=a.far, grad=a.grad, label=a.label,
                weight=0 if self._enters_fold(a) else _weight(source, target, alone, skip),
                minlen=2 if self._leaves_fold(a.source, a.target) else 1,
            )  # fmt: skip

    def _leaves_fold(self, source: str, target: str) -> bool:
        box = self._panel.boxes.get(self._panel.home.get(source, ""))
        inside = self._chain(target)
        return box is not None and box.kind in ("fold", "block") and box.key not in inside

    def _enters_fold(self, arrow: Arrow) -> bool:
        """Whether an arrow reaches into a block from outside, past its entry.

        Without weight, so that what it feeds stays beside its other readers instead of being
        pulled out to the far source.
        """
        if self._panel.items[arrow.target].kind == "entry":
            return False
        blocks = [b for b in self._chain(arrow.target) if self._is_block(b)]
        return bool(blocks) and not set(blocks) <= set(self._chain(arrow.source))

    def _is_block(self, box: str) -> bool:
        return self._panel.boxes[box].kind in ("fold", "block")

    def _chain(self, key: str) -> list[str]:
        found, at = [], self._panel.home.get(key, "")
        while at:
            found.append(at)
            at = self._panel.boxes[at].parent
        return found


def _skips(graph: nx.DiGraph, items: dict[str, Item]) -> set[tuple[str, str]]:
    """Returns the residual edges: into a sum, around something that also leads there."""
    found: set[tuple[str, str]] = set()
    for key, item in items.items():
        if item.kind != "circle" or item.role or key not in graph or graph.in_degree(key) < 2:
            continue
        above = {s: nx.ancestors(graph, s) for s in graph.predecessors(key)}
        for source in above:
            if any(source in others for s, others in above.items() if s != source):
                found.add((source, key))
    return found


def _weight(source: Item, target: Item, alone: bool, skip: bool) -> int:
    if skip:
        return 1
    if target.role == "delta":
        return 5  # between A and B
    if source.role in ("lora_A", "diagonal"):
        return 20
    if target.role == "sum":
        # W above the sum, the branch from the side.
        return 20 if source.role in ("base", "sum") else 3
    if source.role == "sum":
        return 4
    if alone or target.kind == "entry":
        return 50
    return 10 if target.kind == "circle" else 2


def _outermost_first(boxes: dict[str, Box]) -> list[str]:
    found: dict[str, None] = {}
    for key in boxes:
        chain, at = [], key
        while at and at not in found:
            chain.append(at)
            at = boxes[at].parent
        found.update(dict.fromkeys(reversed(chain)))
    return list(found)


def _matched(item: Item, sites: dict[str, None]) -> bool:
    if item.kind == "parameter":
        return any(w.name in sites for w in item.weights)
    return item.kind == "module" and (
        item.path in sites or any(w.name in sites for w in item.weights)
    )


def _shape(item: Item) -> str:
    if item.kind == "circle":
        return "circle"
    return {"lora_A": "invtrapezium", "lora_B": "trapezium"}.get(item.role, "box")


def _style(item: Item) -> str:
    if item.kind in ("input", "output"):
        return "io"
    if item.verdict in IDLE and item.role in ("lora_A", "lora_B", "diagonal", "sum", "delta"):
        return "idle"
    if item.verdict == "inert":
        return "unused"
    if item.role in ("sum", "delta"):
        return "trainable"
    if item.kind == "circle":
        return "sum"
    if item.kind == "again":
        return "again"
    return {"": "op", "frozen": "frozen"}.get(item.state, "trainable")


def _words(item: Item) -> tuple[str, tuple[str, ...]]:
    lines = list(item.lines)
    if item.tags and item.kind != "circle":
        lines.append("with " + ", ".join(item.tags))
    title = metrics.fit(item.title, theme.MAX_TEXT, theme.TITLE, bold=True)
    return title, tuple(metrics.fit(t, theme.MAX_TEXT, theme.TEXT) for t in lines)


def _size(shape: str, title: str, lines: tuple[str, ...]) -> tuple[float, float]:
    if shape == "circle":
        return theme.CIRCLE, theme.CIRCLE
    wide = max(
        metrics.width(title, theme.TITLE, bold=True),
        *(metrics.width(t, theme.TEXT) for t in lines),
        0.0,
    )
    if shape != "box":
        # The middle of a trapezium holds the shape, below it or above it the short side; a title
        # longer than one letter reaches into the corners there.
        low = max((metrics.width(t, theme.TEXT) for t in lines), default=0.0)
        short = metrics.width(title, theme.TITLE, bold=True)
        width = max(
            theme.TRAPEZIUM[0],
            (wide + 10) / (1 - theme.SLANT),
            (low + 8) / (1 - 1.5 * theme.SLANT),
            (short + 6) / (1 - 1.7 * theme.SLANT) if len(title) > 1 else 0.0,
        )
        return round(width, 2), theme.TRAPEZIUM[1]
    height = 26.5 + 13.5 * len(lines) + (2.0 if lines else 0.0)
    return round(wide + theme.PAD, 2), height


def _tooltip(item: Item, matched: bool) -> str:
    weights = [
        f"{clean(w.name, 120)} {list(w.shape)} requires_grad={w.trainable}"
        for w in item.weights[:6]
    ]
    if len(item.weights) > 6:
        weights.append(f"… and {len(item.weights) - 6} more parameters")
    head = clean(item.site or item.path or item.title, 160)
    role = _TOLD.get(item.role, item.role)
    if item.role and " · " in item.title:  # one of several adapters
        role += f", adapter {clean(item.adapter, 80)}"
    rows = [
        f"{head}: {clean(item.type, 80)}" + (f" ({role})" if role else ""),
        f"{quantity(item.params)} params" if item.weights else "",
        *weights,
        f"output {tensor(item.shape, item.dtype)}" if item.shape is not None else "",
        "" if item.grad is None else f"output requires_grad={item.grad}",
        item.note,
        f"{item.verdict}: {item.reason}" if item.verdict else "",
        "matched by the LoRA config" if matched else "",
        f"reads {', '.join(item.tags)}" if item.tags else "",
        item.source,
        f"fx: {', '.join(clean(m, 80) for m in item.members[:4])}"
        + (f" … {len(item.members)} nodes" if len(item.members) > 4 else "")
        if item.members
        else "",
    ]
    return "\n".join(r for r in rows if r)
