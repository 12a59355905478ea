"""A pass: the rounding behind a sum goes into it.

    cast_like(add_product(y, h, B, s), y)  ->  add_rounded(y, h, B, s)

Where adapters are wider than the base (bf16 under peft's fp32 adapters) the sum is rounded to the
base's dtype. Autograd casts the gradient up behind the rounding, and down again for the base: the same
numbers, by a pass over the output that add_rounded leaves out. Bits stay. It costs an autograd
function of Python's, so it is done from 262,144 outputs on.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph

from fxlora.optimize import functions
from fxlora.optimize.edit import only_user, replaced
from fxlora.optimize.report import Refusal, Step, site_of
from fxlora.runtime import cast_like


def roundings(graph: Graph, _root: nn.Module) -> Step:
    """Joins the last sum of every site with the cast behind it."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.target is cast_like]:
        total, y = node.args
        if getattr(total, "target", None) is not functions.add_product:
            continue
        if total.args[0] is not y or not only_user(total, node):
            left.append(
                Refusal(site_of(node), "the sum is read unrounded too, or is one of several")
            )
            continue
        replaced(graph, node, functions.add_rounded, total.args)
        graph.erase_node(total)
        changed += 1
    return Step("roundings", changed, tuple(left))
