"""A pass: casts that change nothing go, and those autocast would undo are not made.

    cast_like(x, A)        ->  x                       x meets a weight of A's dtype beside it
    cast_like(x, A)        ->  cast_for_product(x, A)  x, where autocast casts it down again
    cast_like(y + s z, y)  ->  y + s z                 both are products with weights of one dtype

Bits stay. The first holds in any regime: outside autocast the base's own product needs x in that
dtype, and inside, both products are cast alike. Behind a dropout that is drawn in the wider dtype
the cast stays. Moving only a part of the optimized graph to another dtype makes torch refuse the
product; optimize again then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.optimize import functions
from fxlora.optimize.edit import drop, prune, weight_at
from fxlora.optimize.report import Refusal, Step, site_of
from fxlora.runtime import cast_like

# Functions autocast runs in its own dtype, and where their weight stands.
PRODUCTS: dict[Any, int] = {F.linear: 1, functions.conv1d: 1}


def casts(graph: Graph, root: nn.Module) -> Step:
    """Removes the casts of an adapter that are the identity."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.target is cast_like]:
        given, like = node.args
        if not isinstance(given, Node) or not isinstance(like, Node):
            continue
        if _changes_nothing(root, given, like, node):
            drop(graph, node, given)
            prune(graph, like)
        elif _only_multiplied(root, node, like):
            node.target = functions.cast_for_product
            node.name = graph._graph_namespace.create_name("cast_for_product", None)
        else:
            left.append(Refusal(site_of(node), _why(root, given, like)))
            continue
        changed += 1
    return Step("casts", changed, tuple(left))


def product_dtype(root: nn.Module, node: Any) -> torch.dtype | None:
    """Returns the dtype of the weight a node multiplies by; None when it is no such product."""
    if not isinstance(node, Node) or node.target not in PRODUCTS:
        return None
    weight = weight_at(root, node.args[PRODUCTS[node.target]])
    return None if weight is None or not _casts_alike(node, root) else weight.dtype


def _casts_alike(node: Node, root: nn.Module) -> bool:
    """Whether a product's bias has its weight's dtype, so that torch takes no third dtype."""
    at = PRODUCTS[node.target]
    weight, bias = weight_at(root, node.args[at]), node.args[at + 1 : at + 2]
    if not bias or bias[0] is None:
        return True
    other = weight_at(root, bias[0])
    return other is not None and other.dtype == weight.dtype


def _changes_nothing(root: nn.Module, given: Node, like: Node, cast: Node) -> bool:
    weight = weight_at(root, like)
    if weight is None:
        dtype = _family(root, given)
        return dtype is not None and dtype == _family(root, like)
    beside = [
        u for u in given.users if u is not cast and u.args[:1] == (given,) and u.target in PRODUCTS
    ]
    alike = any(product_dtype(root, u) == weight.dtype for u in beside)
    return alike and all(u.target in PRODUCTS for u in cast.users)


def _family(root: nn.Module, node: Any) -> torch.dtype | None:
    """Returns the dtype of the weights whose products a sum is made of; None for anything else."""
    if not isinstance(node, Node):
        return None
    word = node.target if node.op == "call_method" else None
    if word == "mul" and isinstance(node.args[1], float):
        return _family(root, node.args[0])
    if word == "add" and len(node.args) == 2 and not node.kwargs:
        one, other = (_family(root, a) for a in node.args)
        return one if one == other else None
    return product_dtype(root, node)


def _only_multiplied(root: nn.Module, node: Node, like: Node) -> bool:
    """Whether a cast's result only goes into products with weights of the dtype it is cast to."""
    weight = weight_at(root, like)
    if weight is None or not node.users:
        return False
    return all(u.args[:1] == (node,) and product_dtype(root, u) == weight.dtype for u in node.users)


def _why(root: nn.Module, given: Node, like: Node) -> str:
    if weight_at(root, like) is not None:
        return "what reads the cast is no plain product (a dropout, another adapter's cast)"
    one, other = _family(root, given), _family(root, like)
    if one is not None and other is not None:
        return f"the base is in {other} and its sum with the adapter in {one}"
    return "the adapter and the base have two dtypes, or the base is no plain product"
