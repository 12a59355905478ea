"""A pass: the scaling goes into the addition that follows it.

    y.add(z.mul(s))  ->  torch.add(y, z, alpha=s)

For a scaling that is a power of two bits stay, forward and backward, as long as s z neither
overflows nor goes below the smallest normal number. For another one the product is not rounded
before it is added: y is within one unit in the last place, and the gradients are the same bits.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Graph, Node

from fxlora.optimize.edit import only_user, replaced
from fxlora.optimize.report import Refusal, Step, site_of


def scalings(graph: Graph, root: nn.Module) -> Step:
    """Folds every scaling into its addition."""
    del root
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.meta.get("role") == "sum"]:
        scaled = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        if node.op != "call_method" or node.target != "add" or not _is_scaling(scaled):
            left.append(Refusal(site_of(node), "its sum is not base.add(scaled)"))
            continue
        assert isinstance(scaled, Node)
        if not only_user(scaled, node):
            left.append(Refusal(site_of(node), "the scaled branch has another reader"))
            continue
        product, s = scaled.args
        replaced(graph, node, torch.add, (node.args[0], product), alpha=s)
        graph.erase_node(scaled)
        changed += 1
    return Step("scalings", changed, tuple(left))


def _is_scaling(node: object) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "call_method"
        and node.target == "mul"
        and node.meta.get("role") == "scale"
        and len(node.args) == 2
        and isinstance(node.args[1], float)
    )
