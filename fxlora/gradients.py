"""`requires_grad` of every node, computed from the graph: what autograd would say, without a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxlora.trace.guards import ByMode

# Results that hold no gradient whatever goes in.
_CUT = frozenset(
    "detach detach_ data zeros_like ones_like empty_like full_like rand_like randn_like "
    "randint_like new_zeros new_ones new_empty new_full new_tensor new_empty_strided size numel "
    "argmax argmin argsort nonzero isnan isinf isfinite eq ne lt le gt ge logical_not logical_and "
    "logical_or logical_xor bucketize searchsorted histc bincount multinomial one_hot "
    "enter_grad_mode leave_grad_mode enter_autocast leave_autocast item tolist all any signbit "
    "device dtype shape ndim layout tensor".split()
)
# Calls that write into some of their arguments aside, without a gradient: running statistics, rows
# that are renormed.
_ASIDE = frozenset("batch_norm instance_norm embedding embedding_bag".split())
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
# Where the order of a norm is given, by position. The norm of order zero is a count.
_NORMS = dict.fromkeys("norm norm_except_dim linalg_norm linalg_vector_norm vector_norm".split(), 1)
_NORMS |= {"dist": 2, "pairwise_distance": 2}
# Functions autograd hands only zeros through: of all their arguments ...
_FLAT = frozenset(
    "round round_ floor floor_ ceil ceil_ trunc trunc_ fix fix_ sign sign_ sgn sgn_ angle "
    "special_round eq_ ne_ not_equal_ lt_ less_ le_ less_equal_ gt_ greater_ ge_ greater_equal_ "
    "logical_not_ logical_and_ logical_or_ logical_xor_ bernoulli poisson normal".split()
)
_DIVISIONS = frozenset("div divide div_ divide_".split())
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
    return _flags(graph_module)[1]


def first_flags(graph_module: GraphModule) -> dict[Node, bool]:
    """Says for every node whether its tensor requires grad when the node is run.

    A write in place may change that later: `requires_grad` tells what it is in the end.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
    """
    return _flags(graph_module)[0]


def _flags(graph_module: GraphModule) -> tuple[dict[Node, bool], dict[Node, bool]]:
    """Returns the flags when the nodes are run, and in the end."""
    first: dict[Node, bool] = {}
    flags: dict[Node, bool] = {}
    kin: dict[Node, list[Node]] = {}  # the nodes that share a history of gradients
    same: dict[Node, list[Node]] = {}  # those that stand for one tensor object
    on = enabled(graph_module)
    for node in graph_module.graph.nodes:
        name = target_name(node)
        first[node] = flags[node] = _flag(graph_module, node, name, flags, on[node])
        itself, shared = _itself(node), _shared(node)
        same[node] = same[itself] if itself is not None else []
        kin[node] = kin[shared] if shared is not None else []
        same[node].append(node)
        kin[node].append(node)
        if name in ("detach_", "requires_grad_"):
            flags.update(dict.fromkeys(same[node], flags[node]))
        changed = node.meta.get("mutates", ()) if on[node] and name not in _ASIDE else ()
        for n in (node,) if name == "requires_grad_" else changed:
            if flags[node]:
                # A view requires grad when its base does, whichever of its views was written into.
                flags.update((k, True) for k in kin[n] if _is_differentiable(k))
    return first, flags


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
        return _argument(node, 1, "requires_grad") is not False
    if _cuts(name) or not _is_differentiable(node):
        return node.kwargs.get("requires_grad") is True  # torch.zeros_like(x, requires_grad=True)
    if node.meta.get("mutates") and not on:
        return any(flags[n] for n in node.meta["mutates"])
    if not on:
        # Under no_grad a result requires no grad, unless it is what came in, or a view of it.
        source = _shared(node)
        return source is not None and flags[source]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if any(p.requires_grad for p in module._parameters.values() if p is not None):
            return True
    return any(flags[n] for n in _halves(node, _sources(node, name)))


def _cuts(name: str) -> bool:
    """Whether a call's result holds no gradient whatever goes in."""
    return name in _CUT or name in _INTEGER or _SPECIAL.match(name) is not None


def _stops(node: Node, name: str) -> bool:
    """Whether no gradient passes a call, though autograd says that its result requires grad."""
    if name in _NORMS:
        return bool(_argument(node, _NORMS[name], "p", "ord", "pow") == 0)
    return name == "heaviside"


def _argument(node: Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[n] for n in names if n in node.kwargs), None)


def _sources(node: Node, name: str) -> list[Node]:
    stop = _SHAPE_ONLY.get(name, _NO_DERIVATIVE.get(name))
    if stop is None:
        if isinstance(_module(node), nn.Embedding):
            return []  # looked up by it, or, where a class counts positions, by its size
        call = _call(node)
        part = _aliased(node) if call is not node and len(call.all_input_nodes) > 1 else None
        return list(node.all_input_nodes) if part is None else [part]
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
    if name in ("angle", "sgn", "sgn_") and _is_complex(node):
        return []
    if name in _FLAT or (name in _DIVISIONS and node.kwargs.get("rounding_mode")):
        return list(node.all_input_nodes)
    if name == "cdist" and _argument(node, 2, "p") == 0:
        return list(node.all_input_nodes)
    if name in _OVERWRITES or (name == "setitem" and _is_everything(node.args[1])):
        return first
    if name in ("copysign", "copysign_"):
        return [n for n in node.args[1:] if isinstance(n, Node)]
    return []


def _is_differentiable(node: Node) -> bool:
    written = node.args[0] if target_name(node) == "setitem" else node
    dtype = written.meta.get("dtype") if isinstance(written, Node) else None
    return dtype is None or bool(dtype.is_floating_point or dtype.is_complex)


def _is_complex(node: Node) -> bool:
    given = _given(node)
    dtype = None if given is None else given.meta.get("dtype")
    return dtype is not None and bool(dtype.is_complex)


def _is_everything(key: Any) -> bool:
    """Whether an index picks all of a tensor."""
    keys = key if isinstance(key, tuple) else (key,)
    return all(k is None or k is ... or (isinstance(k, slice) and k == slice(None)) for k in keys)


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
        if _cuts(name) or _stops(node, name):
            return []
        if not on[node]:
            # Written to without a gradient, a tensor keeps the one it had; a view has none.
            source = _itself(node)
            return [] if source is None else [source]
        flat = [] if zeros else _flat_sources(node, name)
        return _halves(node, [n for n in _sources(node, name) if n not in flat])

    return _followed(graph_module, direct, _shared)


def value_sources(graph_module: GraphModule) -> dict[Node, list[Node]]:
    """Returns, for every node, the nodes its value is computed from, whatever a gradient does.

    Args:
        graph_module: a traced or rewritten graph; not run and not changed.
    """
    return _followed(graph_module, lambda n, _: _halves(n, list(n.all_input_nodes)), _base)


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
    base: Callable[[Node], Node | None],
) -> dict[Node, list[Node]]:
    """Returns every node's sources, those that write into what it reads included.

    Args:
        graph_module: the graph.
        direct: the sources of a node with this name, had nothing been written to in place.
        base: the node through whose tensor a write to this one's is seen, if there is one.
    """
    sources: dict[Node, list[Node]] = {}
    writes: dict[Node, list[tuple[Node, Node | None]]] = {}
    aside: Collection[str] = _ASIDE if base is _shared else ()
    root = cache(lambda node: _root(node, base))
    for node in graph_module.graph.nodes:
        name = target_name(node)
        found = direct(node, name)
        if writes:
            since = [(s, writes.get(root(s))) for s in found]
            found = [n for s, w in since for n in (_now(s, w) if w else (s,))]
        sources[node] = list(dict.fromkeys(found))
        for changed in () if name in aside else _written(node):
            whole = None if _covers(changed, base) else _whole(changed)
            writes.setdefault(root(changed), []).append((node, whole))
    return sources


def _written(node: Node) -> tuple[Node, ...]:
    """Returns the nodes of whose tensor there is another one after a call."""
    if target_name(node) == "detach_" and isinstance(node.args[0], Node):
        return (node.args[0],)
    return tuple(node.meta.get("mutates", ()))


def _now(source: Node, writes: Sequence[tuple[Node, Node | None]]) -> list[Node]:
    """Returns what a tensor is made of when it is read: itself and the writes since.

    A write to all of it stands in its place; a write through a view, beside it. Of a write to all of
    the memory it is not said through which tensor.
    """
    since = [(w, changed) for w, changed in writes if source < w]
    whole = [i for i, (_, changed) in enumerate(since) if changed in (None, _whole(source))]
    if not whole:
        return [source, *(w for w, _ in since)]
    return [w for w, _ in since[whole[-1] :]]


# ---- one tensor, several nodes -------------------------------------------------------------------

_CALLS = ("call_function", "call_method", "call_module")
# What the tracer saw of memory is in `node.meta["alias"]`. Where it saw nothing, names tell.
_VIEWS = frozenset(
    "view reshape transpose permute getitem unsqueeze squeeze expand t T mT H mH chunk split unbind "
    "narrow select flatten alias view_as movedim moveaxis swapaxes swapdims unflatten diagonal "
    "expand_as unfold as_strided tensor_split hsplit vsplit dsplit contiguous real imag "
    "view_as_real view_as_complex ravel adjoint broadcast_to conj positive detach data".split()
)
# Of these the ones that show all of a tensor.
_FULL = frozenset(
    "view reshape transpose permute unsqueeze squeeze t T mT H mH flatten alias view_as movedim "
    "moveaxis swapaxes swapdims unflatten contiguous view_as_real view_as_complex ravel adjoint conj "
    "positive detach data reshape_as".split()
)
_DROPOUTS = frozenset(
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout".split()
)
_OVERLAP = ("as_strided", "unfold", "expand", "expand_as", "broadcast_to")


def memory_root(node: Node) -> Node:
    """Returns the node whose memory a node's tensor lies in: a view's base, what a call wrote into.

    Args:
        node: a node of a traced or rewritten graph; its own root when it views nothing.
    """
    return _root(node, _base)


def _root(node: Node, base: Callable[[Node], Node | None]) -> Node:
    while (before := base(node)) is not None:
        node = before
    return node


def _base(node: Node) -> Node | None:
    """Returns the node whose tensor this one's is, or views."""
    return _itself(node) or _viewed(node)


def _shared(node: Node) -> Node | None:
    """Returns the node whose gradients this one shares: as `_base`, but a detached view has its own."""
    itself = _itself(node)
    if itself is not None or _cuts(target_name(node)) or not _is_differentiable(node):
        return itself
    return _viewed(node)


def _whole(node: Node) -> Node:
    return _root(node, _itself)


def _covers(node: Node, base: Callable[[Node], Node | None]) -> bool:
    """Whether a view shows all of the memory it lies in."""
    while (before := base(node)) is not None:
        if _itself(node) is None and not _is_full(node, before):
            return False
        node = before
    return True


def _is_full(view: Node, base: Node) -> bool:
    """Whether a view shows all of a tensor."""
    name = target_name(view)
    if name in _FULL or isinstance(_module(view), (nn.Flatten, nn.Unflatten)):
        return True
    if name == "getitem" and _call(view) is view and _is_everything(view.args[1]):
        return True
    sizes = [_bytes(view), _bytes(base)]
    return name not in _OVERLAP and sizes[0] is not None and sizes[0] == sizes[1]


def _bytes(node: Node) -> tuple[Any, ...] | None:
    """Returns a node's bytes, and the sizes that follow the input they are multiplied by."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None or dtype is None:
        return None
    fixed = math.prod(d for d in shape if isinstance(d, int))
    return fixed * dtype.itemsize, sorted(d for d in shape if not isinstance(d, int))


def _same(node: Node) -> Node | None:
    """Returns the node whose tensor object a call in place hands back."""
    written = node.meta.get("mutates", ())
    given = node.kwargs.get("out", _given(node)) if written else None
    return given if isinstance(given, Node) and given in written else None


def _itself(node: Node) -> Node | None:
    """Returns the node whose tensor object a call hands back, written to or not."""
    if node.op not in _CALLS:
        return None
    if node.meta.get("mutates"):
        return _same(node)
    name = target_name(node)
    idle = _is_idle(node, name)
    if idle is not None:
        return _given(node) if idle else None
    if "alias" in node.meta:
        return _aliased(node) if node.meta.get("handed_on") else None
    given = _given(node)
    if given is None or isinstance(_module(node), nn.Identity):
        return given
    alike = name in _CASTS and given.meta.get("dtype") == node.meta.get("dtype")
    return given if alike or name in ("detach_", "requires_grad_") else None


def _viewed(node: Node) -> Node | None:
    """Returns the node whose memory a view shows."""
    if node.op not in _CALLS:
        return None
    name = target_name(node)
    if _is_idle(node, name) is not None:
        return None
    if "alias" in node.meta:
        return _aliased(node)
    base = _given(node)
    if base is None or node.op == "call_module":
        return base if isinstance(_module(node), (nn.Flatten, nn.Unflatten)) else None
    if name not in _VIEWS:
        return None
    if _call(node) is not node:
        # One of several results: no view of the others, unless they are views of one tensor.
        return base if "dtype" in node.meta and target_name(base) in _VIEWS else None
    # What is picked by a tensor or a list of positions is a copy.
    keys = node.args[1] if name == "getitem" else ()
    keys = keys if isinstance(keys, tuple) else (keys,)
    picked = any(isinstance(k, list) or (isinstance(k, Node) and "dtype" in k.meta) for k in keys)
    return None if picked else base


def _aliased(node: Node) -> Node | None:
    """Returns the argument in whose memory the tracer saw a result lie."""
    path = node.meta.get("alias")
    if path is None:
        return None
    call = _call(node)
    at: Any = call.kwargs if isinstance(path[0], str) else call.args
    try:
        for key in path:
            at = at[key]
    except LookupError:
        return None  # a call of another function was put in the place of the one that was seen
    return at if isinstance(at, Node) else None


def _call(node: Node) -> Node:
    """Returns the call a node is one of several results of; the node itself as a rule."""
    while target_name(node) == "getitem" and isinstance(node.args[0], Node):
        if "dtype" in node.args[0].meta or node.args[0].op not in _CALLS:
            break
        node = node.args[0]
    return node


def _given(node: Node) -> Node | None:
    """Returns the first argument of a call."""
    found = node.args[0] if node.args else node.kwargs.get("input")
    return found if isinstance(found, Node) else None


def _is_idle(node: Node, name: str) -> bool | None:
    """Whether a dropout hands on what it is given; None for any other call.

    That follows from the mode the graph is in, not from that of the trace.
    """
    if node.op == "call_module":
        module: Any = _module(node)
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        return not (module.training and module.p > 0) if dropout else None
    if name not in _DROPOUTS:
        return None
    p, training = (_argument(node, 1, "p"), _argument(node, 2, "training", "train"))
    if training is None:
        training = "alpha" not in name
    return _now_is(p) == 0 or not _now_is(training)


def _now_is(value: Any) -> Any:
    """Returns a constant, as it is in the mode the graph is in."""
    module = _module(value) if isinstance(value, Node) else None
    return module() if isinstance(module, ByMode) else value


def _module(node: Node) -> nn.Module | None:
    """Returns the module a node calls."""
    root = node.graph.owning_module
    if node.op != "call_module" or root is None:
        return None
    return root.get_submodule(str(node.target))


def attribute(root: nn.Module, path: str) -> Any:
    """Returns the parameter, buffer or constant a `get_attr` node reads."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)
