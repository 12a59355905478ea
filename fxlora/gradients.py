"""`requires_grad` of every node, computed from the graph: what autograd would say, without a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

# Results that hold no gradient whatever goes in.
_CUT = frozenset(
    "detach detach_ data zeros_like ones_like empty_like full_like rand_like randn_like "
    "randint_like new_zeros new_ones new_empty new_full new_tensor new_empty_strided size numel "
    "argmax argmin argsort nonzero isnan isinf isfinite eq ne lt le gt ge logical_not logical_and "
    "logical_or logical_xor bucketize searchsorted histc bincount multinomial one_hot "
    "enter_grad_mode leave_grad_mode enter_autocast leave_autocast item tolist heaviside all any signbit".split()
)
# Arguments that are read for their size, dtype or place only: position of the first such one.
_SHAPE_ONLY = {
    "view_as": 1,
    "reshape_as": 1,
    "expand_as": 1,
    "type_as": 1,
    "to": 1,
    "cast_like": 1,
}
_CASTS = frozenset("to cast_like type type_as float half bfloat16 double".split())
_INTEGER = frozenset("long int short char byte bool".split())


def requires_grad(graph_module: GraphModule) -> dict[Node, bool]:
    """Says for every node whether its tensor requires grad when the graph is run.

    The flags of parameters are read from the module as it stands; an input requires grad when
    the example it was traced with did. Nodes that hold no tensor are False.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.

    Returns:
        Node -> flag, in the order of the graph.

    >>> import torch, fxlora
    >>> g = fxlora.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    >>> [requires_grad(g)[n] for n in g.graph.nodes]
    [False, True, True, True]
    """
    flags: dict[Node, bool] = {}
    enabled = True
    switches: list[bool] = []
    for node in graph_module.graph.nodes:
        name = target_name(node)
        if name == "enter_grad_mode":
            switches.append(enabled)
            enabled = bool(node.args[0])
        elif name == "leave_grad_mode":
            enabled = switches.pop()
        flags[node] = _flag(graph_module, node, name, flags, enabled)
        if enabled and node.meta.get("mutates"):
            _spread(node, flags)
    return flags


def target_name(node: Node) -> str:
    """Returns the bare name of what a node calls."""
    if node.op == "call_module":
        return ""
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    return str(getattr(target, "__name__", target)).rpartition(".")[2]


def _flag(root: GraphModule, node: Node, name: str, flags: dict[Node, bool], enabled: bool) -> bool:
    if "requires_grad" in node.meta:  # an input, or a part of one
        return bool(node.meta["requires_grad"])
    if node.op == "placeholder":
        return False
    if node.op == "get_attr":
        return bool(getattr(attribute(root, str(node.target)), "requires_grad", False))
    if node.op == "output":
        return any(flags[n] for n in node.all_input_nodes)
    if name == "requires_grad_":
        return bool(node.args[1]) if len(node.args) > 1 else True
    if name in _CUT or name in _INTEGER or not _is_differentiable(node.meta.get("dtype")):
        return False
    if node.meta.get("mutates") and not enabled:
        return any(flags[n] for n in node.meta["mutates"])
    if not enabled:
        # Under no_grad a result holds no gradient, unless it is the very tensor that came in.
        source = _handed_on(root, node, name)
        return source is not None and flags[source]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if any(p.requires_grad for p in module._parameters.values() if p is not None):
            return True
    return any(flags[n] for n in _sources(node, name))


def _handed_on(root: GraphModule, node: Node, name: str) -> Node | None:
    """Returns the node whose tensor object this one returns unchanged, if it does."""
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is None:
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        idle = isinstance(module, nn.Dropout) and not (module.training and module.p > 0)
        return source if isinstance(module, nn.Identity) or idle else None
    same = source.meta.get("dtype") == node.meta.get("dtype")
    return source if name in _CASTS and same else None


def _sources(node: Node, name: str) -> list[Node]:
    stop = _SHAPE_ONLY.get(name)
    if stop is None:
        return list(node.all_input_nodes)
    return [n for n in node.args[:stop] if isinstance(n, Node)]


def _is_differentiable(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype.is_floating_point or dtype.is_complex


_VIEWS = frozenset(
    "view reshape transpose permute getitem unsqueeze squeeze expand t T mT chunk split unbind "
    "narrow select flatten alias view_as".split()
)


def _spread(node: Node, flags: dict[Node, bool]) -> None:
    """Lets what an in-place call wrote into require grad from here on, and what it views."""
    written = any(flags[n] for n in node.all_input_nodes if n not in node.meta["mutates"])
    if not written and not flags.get(node, False):
        return
    for changed in node.meta["mutates"]:
        base = changed
        flags[base] = True
        while target_name(base) in _VIEWS and base.args and isinstance(base.args[0], Node):
            base = base.args[0]
            flags[base] = True


def gradient_sources(graph_module: GraphModule) -> dict[Node, list[Node]]:
    """Returns, for every node, the nodes a gradient that arrives at it goes on to.

    Those are the tensors it computes with, and for a tensor that was written to in place before it
    was read, the call that wrote. Whether a source takes the gradient is its own flag's affair.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
    """
    sources: dict[Node, list[Node]] = {}
    writers: dict[Node, list[Node]] = {}
    for node in graph_module.graph.nodes:
        found = []
        for source in _sources(node, target_name(node)):
            found.append(source)
            found += [w for w in writers.get(_base_of(source), ()) if w is not source]
        sources[node] = found
        for changed in node.meta.get("mutates", ()):
            writers.setdefault(_base_of(changed), []).append(node)
    return sources


def _base_of(node: Node) -> Node:
    while target_name(node) in _VIEWS and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def attribute(root: nn.Module, path: str) -> Any:
    """Returns the parameter, buffer or constant a `get_attr` node reads."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
