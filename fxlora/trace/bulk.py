"""Adds many nodes to a graph without looking at each argument: copies, and nodes of our own.

`Graph.create_node` looks through every argument for raw symbolic numbers, in three times what
making a node takes. A node that is copied was looked at when it was made.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

_set = object.__setattr__  # a node looks at every name that is set, for `target` and the like


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Puts off looking for garbage: a graph is kept, and the search goes through all of torch.

    Python looks again whenever a quarter has been added to what there is.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def create_after(
    last: Node, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    """Makes a node behind another one, and returns it: `create_node` of plain arguments."""
    graph = last.graph
    name = graph._graph_namespace.create_name(graph._target_to_str(target), None)
    node = Node(graph, name, op, target, args, kwargs)
    graph._graph_namespace._obj_to_name[node] = name
    last.append(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1
    return node


def copy_graph(old: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Copies a graph node for node, keeping names and meta."""
    writer = Writer()
    new: dict[Node, Node] = {}
    for node in old.nodes:
        args, kwargs = map_arg(node.args, new.__getitem__), map_arg(node.kwargs, new.__getitem__)
        meta = dict(node.meta)
        if "mutates" in meta:
            meta["mutates"] = tuple(new[n] for n in meta["mutates"])
        name = writer.keep(node.name)
        new[node] = writer.add(name, node.op, node.target, args, kwargs, meta, node.type)
    return writer.graph, new


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
        """Takes the name a node has in the graph it is copied from."""
        return self._names.create_name(name, None)

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
        _set(node, "meta", meta)
        return node
