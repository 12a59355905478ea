"""`requires_grad` of every node, computed from the graph: what autograd would say, without a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
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
# Arguments without a derivative, though the first one has one: the position of the first of them.
_NO_DERIVATIVE = {
    "hinge_embedding_loss": 1,
    "resize_as": 1,
    "logical_and_": 1,
    "logical_or_": 1,
    "logical_xor_": 1,
}
# torch.special's functions without a backward.
_SPECIAL = re.compile(r"special_.*(bessel|airy|polynomial)")
_NORMS = frozenset("norm norm_except_dim linalg_norm linalg_vector_norm vector_norm".split())
# Functions autograd hands only zeros through: of all their arguments ...
_FLAT = frozenset(
    "round round_ floor floor_ ceil ceil_ trunc trunc_ fix fix_ sign sign_ sgn sgn_ angle "
    "special_round eq_ ne_ not_equal_ lt_ less_ le_ less_equal_ gt_ greater_ ge_ greater_equal_ "
    "logical_not_ logical_and_ logical_or_ logical_xor_ bernoulli".split()
)
# ... or of the tensor they write over.
_OVERWRITES = frozenset(
    "zero_ fill_ copy_ normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ geometric_ "
    "log_normal_".split()
)
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
    on = enabled(graph_module)
    for node in graph_module.graph.nodes:
        flags[node] = _flag(graph_module, node, target_name(node), flags, on[node])
        if on[node] and node.meta.get("mutates"):
            _spread(node, flags)
    return flags


def target_name(node: Node) -> str:
    """Returns the bare name of what a node calls."""
    if node.op == "call_module":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    return _bare(node.target)


@lru_cache(maxsize=1024)
def _bare(target: Any) -> str:
    return str(getattr(target, "__name__", target)).rpartition(".")[2]


def _flag(root: GraphModule, node: Node, name: str, flags: dict[Node, bool], on: bool) -> bool:
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
    if _cuts(node, name) or not _is_differentiable(node.meta.get("dtype")):
        return False
    if node.meta.get("mutates") and not on:
        return any(flags[n] for n in node.meta["mutates"])
    if not on:
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


def _cuts(node: Node, name: str) -> bool:
    """Whether a call's result holds no gradient whatever goes in."""
    if name in _NORMS and _argument(node, 1, "p", "ord", "pow") == 0:
        return True  # the zero norm is a count
    return name in _CUT or name in _INTEGER or _SPECIAL.match(name) is not None


def _argument(node: Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _sources(node: Node, name: str) -> list[Node]:
    stop = _SHAPE_ONLY.get(name, _NO_DERIVATIVE.get(name))
    if stop is None:
        return list(node.all_input_nodes)
    return [n for n in node.args[:stop] if isinstance(n, Node)]


def _halves(node: Node, sources: list[Node]) -> list[Node]:
    """Returns a node's sources where attention is one call with two results.

    Its second result, the attention weights, does not come from out_proj.
    """
    call: Any = node.args[0] if target_name(node) == "getitem" and node.args[1] == 0 else node
    if not isinstance(call, Node) or target_name(call) != "multi_head_attention_forward":
        return sources
    if any(target_name(u) != "getitem" for u in call.users):
        return sources
    out_proj = [n for n in call.args[11:13] if isinstance(n, Node)]
    if call is node:
        return [n for n in sources if n not in out_proj]
    return [*sources, *out_proj]


def _flat_sources(node: Node, name: str) -> list[Node]:
    """Returns the inputs whose derivative is zero everywhere: their gradient arrives as zeros."""
    first = [n for n in node.args[:1] if isinstance(n, Node)]
    if name in _FLAT or (name in ("div", "divide") and node.kwargs.get("rounding_mode")):
        return list(node.all_input_nodes)
    if name in _OVERWRITES or (name == "setitem" and node.args[1] in (slice(None), ...)):
        return first
    if name in ("copysign", "copysign_"):
        return [n for n in node.args[1:] if isinstance(n, Node)]
    return []


def _is_differentiable(dtype: torch.dtype | None) -> bool:
    return dtype is None or dtype.is_floating_point or dtype.is_complex


_VIEWS = frozenset(
    "view reshape transpose permute getitem unsqueeze squeeze expand t T mT H mH chunk split unbind "
    "narrow select flatten alias view_as movedim moveaxis swapaxes swapdims unflatten diagonal "
    "expand_as unfold as_strided tensor_split hsplit vsplit dsplit contiguous real imag "
    "view_as_real".split()
)


def _spread(node: Node, flags: dict[Node, bool]) -> None:
    """Lets what an in-place call wrote into require grad from here on, and what it views."""
    written = any(flags[n] for n in node.all_input_nodes if n not in node.meta["mutates"])
    if not written and not flags.get(node, False):
        return
    for changed in node.meta["mutates"]:
        base: Node | None = changed
        while base is not None:
            flags[base] = True
            base = _same(base) or _viewed(base)


def gradient_sources(graph_module: GraphModule, zeros: bool = True) -> dict[Node, list[Node]]:
    """Returns, for every node, the nodes a gradient that arrives at it goes on to.

    Those are the tensors it computes with, and for a tensor that was written to in place before it
    was read, the call that wrote. Whether a source takes the gradient is its own flag's affair.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
        zeros: whether to follow, as autograd does, what can only be handed zeros: the argument of
            `round`, a tensor that is written over.
    """
    on = enabled(graph_module)

    def direct(node: Node, name: str) -> list[Node]:
        if not on[node]:
            # Written to without a gradient, a tensor keeps the one it had.
            source = _same(node) or _handed_on(graph_module, node, name)
            return [] if source is None else [source]
        if _cuts(node, name):
            return []
        flat = [] if zeros else _flat_sources(node, name)
        return _halves(node, [n for n in _sources(node, name) if n not in flat])

    return _followed(graph_module, direct)


def value_sources(graph_module: GraphModule) -> dict[Node, list[Node]]:
    """Returns, for every node, the nodes its value is computed from, whatever a gradient does.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
    """
    return _followed(graph_module, lambda n, _: _halves(n, list(n.all_input_nodes)))


def enabled(graph_module: GraphModule) -> dict[Node, bool]:
    """Says for every node whether gradients are switched on where it runs.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
    """
    found: dict[Node, bool] = {}
    on = True
    before: list[bool] = []
    for node in graph_module.graph.nodes:
        name = target_name(node)
        if name == "enter_grad_mode":
            before.append(on)
            on = bool(node.args[0])
        elif name == "leave_grad_mode":
            on = before.pop()
        found[node] = on
    return found


def _followed(
    graph_module: GraphModule,
    direct: Callable[[Node, str], list[Node]],
) -> dict[Node, list[Node]]:
    """Returns every node's sources, those that write into what it reads included."""
    sources: dict[Node, list[Node]] = {}
    writes: dict[Node, list[tuple[Node, Node]]] = {}
    memory = cache(memory_root)
    for node in graph_module.graph.nodes:
        found = direct(node, target_name(node))
        if writes:
            since = [(s, writes.get(memory(s))) for s in found]
            found = [n for s, w in since for n in (_now(s, w) if w else (s,))]
        sources[node] = list(dict.fromkeys(found))
        for changed in _written(node):
            writes.setdefault(memory(changed), []).append((node, _whole(changed)))
    return sources


def _written(node: Node) -> tuple[Node, ...]:
    """Returns the nodes of whose tensor there is another one after a call."""
    if target_name(node) == "detach_" and isinstance(node.args[0], Node):
        return (node.args[0],)
    return tuple(node.meta.get("mutates", ()))


def _now(source: Node, writes: Sequence[tuple[Node, Node]]) -> list[Node]:
    """Returns what a tensor is made of when it is read: itself and the writes since.

    A write to all of it stands in its place; a write through a view, beside it.
    """
    since = [(w, changed) for w, changed in writes if source < w]
    whole = [i for i, (_, changed) in enumerate(since) if changed is _whole(source)]
    if not whole:
        return [source, *(w for w, _ in since)]
    return [w for w, _ in since[whole[-1] :]]


def _same(node: Node) -> Node | None:
    """Returns the node whose tensor object a call in place hands back."""
    written = node.meta.get("mutates", ())
    given = node.kwargs.get("out", node.args[0] if node.args else None)
    return given if isinstance(given, Node) and given in written else None


def _viewed(node: Node) -> Node | None:
    """Returns the node whose memory a view shows."""
    base = node.args[0] if node.args else None
    name = target_name(node)
    if node.op == "call_module" or name not in _VIEWS or not isinstance(base, Node):
        return None
    if name == "getitem" and "dtype" in node.meta and "dtype" not in base.meta:
        # One of several results: no view of the others, unless they are views of one tensor.
        return base if target_name(base) in _VIEWS else None
    # What is picked by a tensor or a list of positions is a copy.
    keys = node.args[1] if name == "getitem" else ()
    keys = keys if isinstance(keys, tuple) else (keys,)
    picked = any(isinstance(k, list) or (isinstance(k, Node) and "dtype" in k.meta) for k in keys)
    return None if picked else base


def _whole(node: Node) -> Node:
    while (before := _same(node)) is not None:
        node = before
    return node


def memory_root(node: Node) -> Node:
    """Returns the node whose memory a node's tensor lies in: a view's base, what a call wrote into.

    Args:
        node: a node of a traced or rewritten graph; its own root when it views nothing.
    """
    while (before := _same(node) or _viewed(node)) is not None:
        node = before
    return node


def attribute(root: nn.Module, path: str) -> Any:
    """Returns the parameter, buffer or constant a `get_attr` node reads."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
