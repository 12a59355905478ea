"""Which nodes are one call of one repeated layer: an entry of an nn.ModuleList, by the module stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, Node

from fxlora.gradients import memory_root, target_name

_OPENS = {"enter_grad_mode": 1, "enter_autocast": 1, "leave_grad_mode": -1, "leave_autocast": -1}


@dataclass(frozen=True)
class Segment:
    """The nodes of one call of a layer, in order.

    Attributes:
        path: of the layer.
        call: which call of it.
        nodes: all of them, readings of parameters included.
    """

    path: str
    call: int
    nodes: tuple[Node, ...]

    def inputs(self) -> list[Node]:
        """Returns what the layer reads and does not compute, parameters of its own not included."""
        inside = set(self.nodes)
        found = [n for node in self.nodes for n in node.all_input_nodes if n not in inside]
        return list(dict.fromkeys(found))

    def outputs(self) -> list[Node]:
        """Returns what others read of the layer."""
        inside = set(self.nodes)
        return [n for n in self.nodes if any(u not in inside for u in n.users)]

    def why_whole(self, root: nn.Module) -> str:
        """Says why the layer cannot be run as one function, twice; "" when it can.

        Args:
            root: what the graph's paths lead into; read.
        """
        inside, open_ = set(self.nodes), 0
        at = self.nodes[0]
        while at is not self.nodes[-1]:
            if at not in inside:
                return f"{at.name} of another module runs between its nodes"
            at = at.next
        for node in self.nodes:
            written = [memory_root(n) for n in node.meta.get("mutates", ())]
            if any(n not in inside or n.op == "get_attr" for n in written):
                return f"{node.name} writes into a tensor from outside"
            if node.op == "call_module" and _has_state(root.get_submodule(str(node.target))):
                return f"{node.target} holds buffers, which a second run would update twice"
            open_ += _OPENS.get(target_name(node), 0)
        return "" if not open_ else "a no_grad or autocast region begins in it and ends elsewhere"


def _has_state(module: nn.Module) -> bool:
    # Running statistics, the vectors of a spectral norm: leaves of torch's hold no others.
    return next(module.buffers(), None) is not None


def segments(graph: Graph, types: Mapping[str, type]) -> list[Segment]:
    """Returns the calls of repeated layers, outermost lists only, in the order of the graph.

    Args:
        graph: a traced, rewritten or optimized graph; read.
        types: module path -> class, as `fxlora.facts.info(traced).module_types`.
    """
    found: dict[tuple[str, int], list[Node]] = {}
    for node in graph.nodes:
        key = layer_of(node, types)
        if key is not None:
            found.setdefault(key, []).append(node)
    return [Segment(path, call, tuple(nodes)) for (path, call), nodes in found.items()]


def layer_of(node: Node, types: Mapping[str, type]) -> tuple[str, int] | None:
    """Returns the path and the call of the outermost repeated layer a node runs in."""
    if node.op in ("placeholder", "output"):
        return None
    for frame in node.meta.get("module_stack", ()):
        owner, _, last = frame.path.rpartition(".")
        if last.isdigit() and issubclass(types.get(owner, object), nn.ModuleList):
            return frame.path, frame.call
    return None
