"""Which nodes share a row: W beside A, one site beside the next, before beside after."""

from __future__ import annotations

import networkx as nx

_LARGE = 400  # beyond this a sheet is not read row by row, and the checks below cost time


def rows(graph: nx.MultiDiGraph) -> list[list[str]]:
    """Returns groups of nodes to put on one rank, none of which contradicts an edge."""
    wanted = _beside_a(graph)
    if graph.number_of_nodes() <= _LARGE:
        wanted += _siblings(graph) + _across(graph)
    merged = _Merged(graph)
    for group in wanted:
        merged.join(group)
    return merged.groups()


def _beside_a(graph: nx.MultiDiGraph) -> list[list[str]]:
    by_site: dict[str, list[str]] = {}
    for node, data in graph.nodes(data=True):
        if data["role"] in ("base", "lora_A"):
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
        self._graph = nx.DiGraph((u, v) for u, v in graph.edges() if u != v)
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
