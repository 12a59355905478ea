"""Adds many nodes to a graph at once: copies of nodes that were checked when they were made.

`Graph.create_node` looks through every argument for raw symbolic numbers and makes a name out of
every target. Of a node that is copied both are known, and a graph of many layers has little else.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node


class Writer:
    """Fills a new graph, node after node.

    Attributes:
        graph: the graph; sound after every call of `add`.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self._insert = self.graph._insert
        self._table = self.graph._find_nodes_lookup_table.insert
        self._names = self.graph._graph_namespace

    def name(self, target: Any) -> str:
        """Takes the next free name for a node with this target, as create_node would."""
        return self._names.create_name(self.graph._target_to_str(target), None)

    def keep(self, name: str) -> str:
        """Takes a name that is free, for a node that has it already."""
        self._names._used_names.add(name)
        return name

    def add(
        self, name: str, op: str, target: Any, args: Any, kwargs: Any, meta: dict[str, Any],
        type_expr: Any = None,
    ) -> Node:  # fmt: skip
        """Adds a node with a name that was taken before, and with this very dict as its meta."""
        graph = self.graph
        node = Node(graph, name, op, target, args, kwargs, type_expr)
        self._names._obj_to_name[node] = name
        self._insert(node)
        self._table(node)
        graph._len += 1
        node.meta = meta
        return node
