"""The nodes of an adapter where a weight is read past the module that owns it.

With D = s * B A, the map from in to out features that the adapter adds to a layer:

    x W^T   ->  x W^T + s * B(A(dropout(x)))                  the layer's own map, by a function
    x W     ->  x W + s * (dropout(x) B) A                    the same weight turned round
    W[i]    ->  W[i] + s * A^T[i] B^T                         an embedding's rows
    any     ->  f(W + D)                                      a function that takes the weight whole

The first three never hold W + D. Which one a node is follows from its operation and from the
transposes between it and the weight.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.branches import insert_branches
from fxlora.nodes import Entry, Inserter, attribute, redirect, wide
from fxlora.plan import PlannedSite
from fxlora.reach import weight_names
from fxlora.runtime import cast_like
from fxlora.weights import insert_delta

_NO_QUIRKS: frozenset[str] = frozenset()
_TURNS = frozenset(("t", "T", "mT"))
_CASTS = frozenset(("to", "float", "half", "bfloat16", "type_as", "contiguous"))
_PRODUCTS = frozenset(("matmul", "mm", "__matmul__"))


def insert_uses(graph: Graph, root: nn.Module, entries: Sequence[Entry]) -> None:
    """Adapts every node that reads a site's weight without calling its module.

    Args:
        graph: of the rewritten graph; changed.
        root: its module tree, with the adapters in it.
        entries: the active adapters of the site that reach its every use.
    """
    done: set[Node] = set()
    planned = entries[0][1]
    names = weight_names(planned.site, root)
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target in names]
    alone = planned.site.of and not planned.site.rows
    only = {c.node.name for c in planned.site.calls} if alone else None
    for read in reads:
        if read.meta.get("role", "base") != "base":
            continue  # read by an adapter's own nodes
        whole: list[Node] = []
        for user in list(read.users):
            if _asks(user, read):
                continue
            ends = list(_ends(user, read, 0, planned))
            if only is not None and not any(e.name in only for e, _ in ends):
                continue
            if not ends or any(form == "whole" for _, form in ends):
                whole.append(user)
                continue
            for end, form in ends:
                if end in done:
                    continue
                done.add(end)
                if form == "turned":
                    _insert_turned(graph, root, end, entries)
                else:
                    insert_branches(graph, root, end, entries, _NO_QUIRKS)
        if whole:
            insert_delta(graph, root, read, entries, _NO_QUIRKS, whole)


def _ends(user: Node, at: Node, turns: int, planned: PlannedSite) -> Iterator[tuple[Node, str]]:
    """Yields the nodes that compute with the weight, and in which form; "whole" for the last."""
    todo = deque([(user, at, turns)])
    while todo:
        node, source, turned = todo.popleft()
        word = _word(node)
        first = bool(node.args) and node.args[0] is source
        if first and (word in _CASTS or word in _TURNS or _is_turn(node)):
            more = turned + (word in _TURNS or _is_turn(node))
            todo.extend((u, node, more) for u in node.users)
            continue
        yield node, _form(node, source, turned % 2 == 1, planned)


def _form(node: Node, weight: Node, turned: bool, planned: PlannedSite) -> str:
    """Says how a node computes with the weight W, or with its transpose where `turned`."""
    stored_turned = planned.kind in ("Conv1D", "Embedding")  # W is (in, out) there
    if planned.form not in ("branch", "rows") or not node.args or node.args[0] is weight:
        return "whole"
    if node.target is F.embedding:
        own = planned.kind == "Embedding" and not turned and node.args[1:2] == (weight,)
        return "own" if own else "whole"
    if node.target is F.linear and (node.args[1:2] == (weight,)):
        by_rows = not turned
    elif _word(node) in _PRODUCTS and len(node.args) == 2 and node.args[1] is weight:
        by_rows = turned
    else:
        return "whole"
    if planned.site.rows:
        return "whole"
    # x @ D^T is the layer's own map; F.linear(x, M) is x @ M^T.
    own = by_rows != stored_turned
    return "own" if own and planned.kind != "Embedding" else "turned" if not own else "whole"


def _asks(user: Node, weight: Node) -> bool:
    """Says whether a node reads the weight's dtype, device or shape only."""
    if user.target is getattr:
        return user.args[1] not in (*_TURNS, "data")
    if _word(user) in ("size", "dim", "numel", "is_floating_point", "new_empty", "new_zeros"):
        return True
    return _word(user) in ("to", "type_as", "cast_like") and user.args[0] is not weight


def _insert_turned(graph: Graph, root: nn.Module, node: Node, entries: Sequence[Entry]) -> None:
    """Adds s * (dropout(x) B) A behind a product with the weight turned round."""
    users = list(node.users)
    planned = entries[0][1]
    node.meta.update(role="base", site=planned.site.owner, adapter=entries[0][0], use=node.name)
    new = Inserter(graph, planned.name, node, planned.site.owner)
    shape, result = node.meta.get("shape"), node
    x: Any = node.args[0]
    for adapter, planned in entries:
        new.adapter = adapter
        rows = planned.form == "rows"
        names = ("lora_embedding_A", "lora_embedding_B") if rows else ("lora_A", "lora_B")
        paths = [f"{planned.prefix}.{n}.{adapter}" for n in names]
        parts = [p if rows else f"{p}.weight" for p in paths]
        a, b = (
            new.parameter(role, p, attribute(root, p))
            for role, p in zip(("lora_A", "lora_B"), parts, strict=True)
        )
        to = a.meta["dtype"]
        given = x.meta.get("shape")
        x = new.add("cast", "call_function", cast_like, (x, a), given, to)
        dropped = x
        if not rows:
            path = f"{planned.prefix}.lora_dropout.{adapter}"
            dropped = new.add("dropout", "call_module", path, (x,), given, to)
        inner = None if given is None else (*given[:-1], planned.r)
        first = new.add("lora_B", "call_function", torch.matmul, (dropped, b), inner, to)
        second = new.add("lora_A", "call_function", torch.matmul, (first, a), shape, to)
        scaled = new.method("scale", "mul", (second, planned.scaling), second)
        dtype = wide(result.meta.get("dtype"), to)
        result = new.add("sum", "call_method", "add", (result, scaled), shape, dtype)
    out = new.add(
        "cast_back", "call_function", cast_like, (result, node), shape, node.meta.get("dtype")
    )
    redirect(users, node, out)


def _is_turn(node: Node) -> bool:
    """Says whether a node transposes a matrix by its two dimensions."""
    if node.target is getattr:
        return node.args[1] in _TURNS
    if _word(node) not in ("transpose", "swapaxes", "permute"):
        return False
    dims = [d for d in node.args[1:] if isinstance(d, int)]
    if not dims and len(node.args) == 2 and isinstance(node.args[1], (tuple, list)):
        dims = list(node.args[1])
    if _word(node) == "permute":
        return dims in ([1, 0], [-1, -2], [-1, 0], [1, -2])
    return sorted(d % 2 for d in dims) == [0, 1]


def _word(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is operator.matmul:
        return "matmul"
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
