"""A pass: the second product of an adapter and its addition become one addmm.

    torch.add(y, F.linear(h, B), alpha=s)  ->  add_product(y, h, B, s) = addmm(y, h, B^T, alpha=s)

Bits stay where it is one: where the adapter computes in float32, outside autocast, for ranks up to
128 (a longer sum is split by the BLAS and added in pieces) and scalings that are a power of two
(addmm's backward pass scales behind its products, where the tensors are thin). A narrower base is cast
up first, which the sum of two dtypes would do as well, only slower. Elsewhere the function makes the
two steps it stands for. It saves a pass over the output forward, one backward, and two launches a site.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.optimize import functions
from fxlora.optimize.edit import only_user, replaced, weight_at
from fxlora.optimize.functions import MOST, is_power_of_two
from fxlora.optimize.report import Refusal, Step, site_of


def products(graph: Graph, root: nn.Module) -> Step:
    """Joins the last product of every adapter with the addition behind it."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.target is torch.add and "alpha" in n.kwargs]:
        y, product = node.args
        why = _why_not(root, node, product)
        if why:
            left.append(Refusal(site_of(node), why))
            continue
        assert isinstance(product, Node)
        h, weight = product.args[0], product.args[1]
        replaced(graph, node, functions.add_product, (y, h, weight, node.kwargs["alpha"]))
        graph.erase_node(product)
        changed += 1
    return Step("products", changed, tuple(left))


def _why_not(root: nn.Module, node: Node, product: object) -> str:
    if not isinstance(product, Node) or product.target is not F.linear or len(product.args) != 2:
        return "its last map is no product without a bias"
    alpha = node.kwargs["alpha"]
    if not isinstance(alpha, float) or not is_power_of_two(alpha):
        return "its scaling is no power of two, and addmm scales after the backward products"
    weight = weight_at(root, product.args[1])
    if weight is None or not only_user(product, node):
        return "its last product has another reader"
    if weight.dtype is not torch.float32:
        return f"in {weight.dtype} one step rounds less often than two"
    if weight.shape[1] > MOST:
        return f"its rank is above {MOST}, where the BLAS adds in pieces"
    return ""
