"""Small tools every pass uses: what a module is, and one node in another's place."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from fxlora.gradients import memory_root
from fxlora.nodes import attribute

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_plain(module: nn.Module) -> str:
    """Says why a module's call is more than its class's forward; "" when it is not."""
    if any(getattr(module, name) for name in _HOOKS):
        return "it has hooks, which only a call of the module runs"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
        return "its parameters are no plain ones (quantized)"
    return ""


def replaced(graph: Graph, node: Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> Node:
    """Puts a function call in a node's place, with its meta and everything that reads it."""
    with graph.inserting_before(node):
        made = graph.call_function(target, args, kwargs)
    take_over(graph, node, made)
    return made


def take_over(graph: Graph, old: Node, new: Node) -> None:
    """Lets a new node take the meta, the users and the place in `mutates` of an old one."""
    new.meta = dict(old.meta)
    drop(graph, old, new)


def drop(graph: Graph, old: Node, new: Node) -> None:
    """Lets every user of a node read another, and removes the node."""
    for user in list(old.users):
        if old in user.meta.get("mutates", ()):
            user.meta["mutates"] = tuple(new if n is old else n for n in user.meta["mutates"])
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def read(graph: Graph, before: Node, root: nn.Module, path: str) -> Node:
    """Reads a parameter, a buffer or a module in front of a node."""
    value = attribute(root, path)
    with graph.inserting_before(before):
        node = graph.create_node("get_attr", path)
    for key in ("module_stack", "source", "grad_enabled"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    if not isinstance(value, nn.Module) and value is not None:
        node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
    return node


class Writes:
    """Which calls of a graph write into which memory, in place or through a view.

    Args:
        graph: read once; ask before changing it.
    """

    def __init__(self, graph: Graph) -> None:
        self._last: dict[Node, Node] = {}
        for node in graph.nodes:
            for changed in node.meta.get("mutates", ()):
                self._last[memory_root(changed)] = node

    def after(self, tensor: Node, reader: Node) -> bool:
        """Whether something writes into a tensor's memory after a node has read it."""
        last = self._last.get(memory_root(tensor)) if self._last else None
        return last is not None and reader < last


def prune(graph: Graph, node: Any) -> None:
    """Removes a reading nobody needs any more."""
    if isinstance(node, Node) and node.op == "get_attr" and not node.users:
        graph.erase_node(node)


def only_user(node: Any, user: Node) -> bool:
    """Whether a node is read by one other node only."""
    return isinstance(node, Node) and list(node.users) == [user]


def weight_at(root: nn.Module, node: Any) -> Any:
    """Returns the tensor a `get_attr` node reads; None for any other node."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return attribute(root, str(node.target))
