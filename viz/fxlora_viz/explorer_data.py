"""A sheet -> the plain data the explorer's page works with: boxes, nodes, edges, rows, parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch.fx import GraphModule

from fxlora_viz import metrics, theme
from fxlora_viz.align import order, rows
from fxlora_viz.dot import Writer, box_texts, head
from fxlora_viz.legend import legend
from fxlora_viz.names import clean, quantity, tensor
from fxlora_viz.parameters import Instances, Parameters, Row
from fxlora_viz.picture import Item, Panel
from fxlora_viz.style import style_sheet
from fxlora_viz.verdicts import Effects, Verdicts

_NAME = 2000  # letters of a name the page keeps


@dataclass(frozen=True)
class Sheet:
    """What a drawing was made of.

    Attributes:
        graphs: the fx graphs, one for each panel.
        whole: their panels before folding.
        panels: their panels as drawn.
        effects: what `fxlora.effects` said of the last graph; None where nobody asked yet.
    """

    graphs: tuple[GraphModule, ...]
    whole: tuple[Panel, ...]
    panels: tuple[Panel, ...]
    effects: Effects | None = None


def explorer_data(
    graph: nx.MultiDiGraph, sheet: Sheet, direction: str, mode: str
) -> dict[str, Any]:
    """Returns the data of a page, ready for JSON, in the same order in every process.

    Args:
        graph: the view of the sheet.
        sheet: what it was made of.
        direction: "TB" or "LR".
        mode: the theme: "auto", "light" or "dark".
    """
    return _Data(graph, sheet, direction).all(mode)


class _Data:
    """Gathers the data of one page."""

    def __init__(self, graph: nx.MultiDiGraph, sheet: Sheet, direction: str) -> None:
        self._graph = graph
        self._sheet = sheet
        self._direction = direction
        self._names = list(dict.fromkeys(d["panel"] for d in graph.graph["boxes"].values()))
        self._panels = dict(zip(self._names, sheet.panels, strict=True))
        self._instances = {
            n: Instances(w, p)
            for n, w, p in zip(self._names, sheet.whole, sheet.panels, strict=True)
        }
        self._last = self._instances[self._names[-1]]
        self._parameters = Parameters(sheet.graphs, [self._instances[n] for n in self._names])
        self._verdicts = Verdicts(sheet.graphs[-1], self._last, sheet.effects)
        self._writer = Writer(graph, bare=True, mirrored=direction == "LR")

    def all(self, mode: str) -> dict[str, Any]:
        """Returns everything."""
        nodes = [self._node(n, d) for n, d in self._graph.nodes(data=True)]
        _mark_changes(nodes, self._names)
        return {
            "theme": mode,
            "direction": self._direction,
            "measures": _measures(),
            "css": {m: style_sheet(m) for m in ("light", "dark")},
            "head": "\n".join(head(self._direction)),
            "legend": _legend(self._graph),
            "panels": self._names,
            "boxes": [self._box(b, d) for b, d in self._graph.graph["boxes"].items()],
            "nodes": nodes,
            "edges": [_edge(u, v, d) for u, v, d in self._graph.edges(data=True)],
            "rows": rows(self._graph),
            "orders": [o for row in rows(self._graph) for o in order(self._graph, row)],
            "parameters": [self._parameter(r) for r in self._parameters.rows],
            "sites": self._verdicts.sites,
            "trouble": self._verdicts.trouble,
        }

    # ---- boxes -------------------------------------------------------------------------------

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Identifier of a box -> its key, which both panels share."""
        found = {}
        for name in self._names:
            ids = [b for b, d in self._graph.graph["boxes"].items() if d["panel"] == name]
            found[ids[0]] = "panel"  # the frame of a panel comes first
            panel = self._panels[name]
            homes = {i: d["box"] for i, d in self._graph.nodes(data=True) if d["panel"] == name}
            found.update(_box_keys(self._graph, panel, ids[1:], homes))
        return found

    def _box(self, box: str, data: dict[str, Any]) -> dict[str, Any]:
        panel, key = data["panel"], self._keys[box]
        rows_ = [self._parameters.rows[i] for i in self._inside(box)]
        index = self._names.index(panel)
        total = sum(r.total(index) for r in rows_)
        trains = sum(r.total(index) for r in rows_ if r.flags[index] != {False})
        found = {
            "id": box, "key": key, "kind": data["kind"], "panel": panel, "parent": data["parent"],
            "label": data["label"], "note": data["note"], "parts": data["parts"],
            "count": data["count"], "params": total, "trains": trains, "dot": self._writer.box(box),
        }  # fmt: skip
        path = key.partition(":")[2]
        if data["kind"] != "panel":
            found["path"] = path[:_NAME]
        if data["kind"] == "fold":
            found["members"] = [m[:_NAME] for m in self._instances[panel].members.get(key, ())]
        if data["kind"] != "panel":
            found["closed"] = self._closed(data, total, trains)
        return found

    def _closed(self, data: dict[str, Any], total: int, trains: int) -> dict[str, Any]:
        """Returns the node a closed box is drawn as."""
        title = metrics.fit(box_texts(data)[0], theme.MAX_TEXT, theme.TITLE, bold=True)
        kinds = data["note"] if data["kind"] != "site" else ""
        texts = [kinds, f"{quantity(total)} params" if total else ""]
        if trains and total:
            texts.append("all train" if trains == total else f"{quantity(trains)} train")
        lines = [metrics.fit(t, theme.MAX_TEXT, theme.TEXT) for t in texts if t]
        wide = max(
            metrics.width(title, theme.TITLE, bold=True) + 14,
            *(metrics.width(t, theme.TEXT) for t in lines),
            0.0,
        )
        width, height = round(wide + theme.PAD + 12, 2), 30.5 + 13.5 * len(lines)
        return {
            "title": title, "lines": lines, "w": width, "h": height, "hot": bool(trains and total),
            "dot": f'label="" shape="box" width="{width / 72:.4f}" height="{height / 72:.4f}"',
        }  # fmt: skip

    def _inside(self, box: str) -> list[int]:
        """Returns the parameters read inside a box, each once."""
        boxes = self._graph.graph["boxes"]
        found: dict[int, None] = {}
        for _, data in self._graph.nodes(data=True):
            at = data["box"]
            while at and at != box:
                at = boxes[at]["parent"]
            if at == box:
                item = self._panels[data["panel"]].items[data["key"]]
                found.update(dict.fromkeys(self._parameters.of(item)))
        return list(found)

    # ---- nodes -------------------------------------------------------------------------------

    def _node(self, node: str, data: dict[str, Any]) -> dict[str, Any]:
        item = self._panels[data["panel"]].items[data["key"]]
        site = self._verdicts.site_of(item)
        found = {
            "id": node, "key": data["key"][:_NAME], "panel": data["panel"], "box": data["box"],
            "kind": data["kind"], "role": data["role"], "title": data["title"],
            "lines": data["lines"], "tagged": data["tagged"], "form": data["shape_name"],
            "w": data["width"], "h": data["height"], "style": data["style"],
            "state": data["state"], "matched": data["matched"], "grad": data["requires_grad"],
            "params": data["params"], "path": _path(item), "type": item.type[:_NAME],
            "out": tensor(item.shape, item.dtype), "weights": self._parameters.of(item),
            "site": site, "adapter": clean(item.adapter, 200), "source": item.source,
            "members": [clean(m, 120) for m in item.members[:12]], "fx": len(item.members),
            "tags": list(item.tags), "note": item.note, "tooltip": data["tooltip"],
            "dot": self._writer.node(node),
        }  # fmt: skip
        # What is not there is not written: the page reads a missing value as empty.
        return {k: v for k, v in found.items() if v not in ("", [], (), None, False, 0)}

    def _parameter(self, row: Row) -> dict[str, Any]:
        site = self._parameters.site(row, self._verdicts)
        found = {
            "name": row.name[:_NAME], "shape": row.shape, "each": row.each, "count": row.count,
            "dtype": row.dtype, "flags": row.said(), "site": site, "tied": row.tied[:_NAME],
        }  # fmt: skip
        return {k: v for k, v in found.items() if v != ""}


def _path(item: Item) -> str:
    return (item.site or item.path)[:_NAME]


def _box_keys(
    graph: nx.MultiDiGraph, panel: Panel, ids: list[str], homes: dict[str, str]
) -> dict[str, str]:
    """Returns identifier -> key of the boxes of a panel.

    The view writes boxes outermost first and keeps only those that hold something; nodes and
    boxes know their parents on both sides, so every one is found from a node inside it.
    """
    found: dict[str, str] = {}
    boxes = graph.graph["boxes"]
    for node, box in homes.items():
        key = panel.home.get(graph.nodes[node]["key"], "")
        while key and box in boxes and boxes[box]["parent"]:
            found[box] = key
            box, key = boxes[box]["parent"], panel.boxes[key].parent
    return {b: found.get(b, b) for b in ids}


def _mark_changes(nodes: list[dict[str, Any]], names: list[str]) -> None:
    """Says of every node of a before/after sheet what the rewrite did to it, and names its twin."""
    if len(names) < 2:
        return
    sides = [{n["key"]: n for n in nodes if n["panel"] == name} for name in names]
    for node in sides[0].values():
        if node["key"] not in sides[1]:
            node["change"] = "removed"
    for key, node in sides[1].items():
        twin = sides[0].get(key)
        if twin is None:
            node["change"] = "added"
            continue
        node["twin"], twin["twin"] = twin["id"], node["id"]
        if node.get("state") != twin.get("state"):
            for side in (node, twin):
                side["change"] = node.get("state", "") or "changed"
        elif node.get("title") != twin.get("title") and node.get("role") != "base":
            node["change"] = twin["change"] = "changed"


def _edge(u: str, v: str, data: dict[str, Any]) -> list[Any]:
    return [
        u, v, data["style"], int(data["dashed"]), int(bool(data["grad"])), data["label"],
        data["weight"], data["minlen"], int(data["far"]),
    ]  # fmt: skip


def _measures() -> dict[str, Any]:
    return {
        "font": theme.FONT, "title": theme.TITLE, "text": theme.TEXT, "slant": theme.SLANT,
        "shadow": theme.SHADOW, "labels": theme.LABELS, "insets": theme.INSETS, "tops": theme.TOPS,
        "notes": theme.NOTES,
    }  # fmt: skip


def _legend(graph: nx.MultiDiGraph) -> dict[str, Any]:
    found = legend(graph, 620.0)
    return {"svg": found.svg, "width": round(found.width, 1), "height": round(found.height, 1)}
