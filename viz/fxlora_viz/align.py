"""Which nodes share a row: W beside A, one site beside the next, before beside after."""

from __future__ import annotations

import networkx as nx

_LARGE = 400  # beyond this a sheet is not read row by row, and the checks below cost time


def rows(graph: nx.MultiDiGraph) -> list[list[str]]:
    """Returns groups of nodes to put on one rank, none of which contradicts an edge."""
    wanted = [*graph.graph.get("beside", ()), *_beside_w(graph)]
    if graph.number_of_nodes() <= _LARGE:
        wanted += _siblings(graph) + _across(graph)
    merged = _Merged(graph)
    for group in wanted:
        merged.join(group)
    return merged.groups()


def order(graph: nx.MultiDiGraph, row: list[str]) -> list[list[str]]:
    """Returns the parts of a row that must stand from left to right: m, W, A, B of one site.

    A site of one W and one A needs no such rule, and its layout is the engine's.
    """
    by_site: dict[str, list[str]] = {}
    for node in row:
        data = graph.nodes[node]
        if data["role"] in _PLACES:
            by_site.setdefault(data["box"], []).append(node)
    found = []
    for nodes in by_site.values():
        if len(nodes) > 2:
            # Equal places keep the order of the graph: adapter by adapter, A before B.
            inside = [n for n in graph if n in nodes]
            found.append(sorted(inside, key=lambda n: _PLACES[graph.nodes[n]["role"]]))
    return found


_PLACES = {"magnitude": 0, "base": 1, "lora_A": 2, "lora_B": 2}


def _beside_w(graph: nx.MultiDiGraph) -> list[list[str]]:
    """W and what stands beside it: A, DoRA's m, trainable rows, and B where it reads nothing."""
    by_site: dict[str, list[str]] = {}
    for node, data in graph.nodes(data=True):
        role = data["role"]
        beside = role in ("base", "lora_A", "magnitude", "rows")
        if beside or (role == "lora_B" and not graph.in_degree(node)):
            by_site.setdefault(data["box"], []).append(node)
    return [group for group in by_site.values() if len(group) > 1]


def _siblings(graph: nx.MultiDiGraph) -> list[list[str]]:
    """Modules of one box that read the same value and nothing else: q, k and v."""
    found: dict[tuple[str, str], list[str]] = {}
    boxes = graph.graph["boxes"]
    for node, data in graph.nodes(data=True):
        sources = list(dict.fromkeys(graph.predecessors(node)))
        if len(sources) != 1 or not data["params"] or data["role"] == "lora_A":
            continue
        box = data["box"]
        if boxes[box]["kind"] == "site":
            box = boxes[box]["parent"]
        found.setdefault((box, sources[0]), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _across(graph: nx.MultiDiGraph) -> list[list[str]]:
    by_key: dict[str, list[str]] = {}
    for node, data in graph.nodes(data=True):
        by_key.setdefault(data["key"], []).append(node)
    return [group for group in by_key.values() if len(group) > 1]


class _Merged:
    """A graph whose rows are merged one by one, as long as no edge runs within or upwards."""

    def __init__(self, graph: nx.MultiDiGraph) -> None:
        self._row = {n: n for n in graph}
        self._members = {n: [n] for n in graph}
        # Trainable rows enter their W from the side, on its own row.
        level = {n for n, d in graph.nodes(data=True) if d["role"] == "rows"}
        self._graph = nx.DiGraph((u, v) for u, v in graph.edges() if u != v and u not in level)
        self._graph.add_nodes_from(graph)

    def join(self, group: list[str]) -> None:
        """Puts the group on one row, leaving out whoever would turn an edge around."""
        first = self._row[group[0]]
        for node in group[1:]:
            other = self._row[node]
            if other != first and not self._apart(first, other):
                self._merge(first, other)

    def _apart(self, a: str, b: str) -> bool:
        return bool(nx.has_path(self._graph, a, b) or nx.has_path(self._graph, b, a))

    def _merge(self, into: str, row: str) -> None:
        for u in list(self._graph.predecessors(row)):
            self._graph.add_edge(u, into)
        for v in list(self._graph.successors(row)):
            self._graph.add_edge(into, v)
        self._graph.remove_node(row)
        for node in self._members[row]:
            self._row[node] = into
        self._members[into] += self._members.pop(row)

    def groups(self) -> list[list[str]]:
        """Returns the rows with more than one node."""
        return [group for group in self._members.values() if len(group) > 1]
