"""A pass for inference: the order of multiplication is picked by what it costs.

    two thin products   x W^T + s (x A^T) B^T       T (m + n) r more multiplications for T tokens
    one merged          x (W + s B A)^T             m n r more, for W + s B A

(RunLoRA, arXiv 2312.03415.) The merged weight is made at every call, so nothing has to be kept or kept
in step with training; it pays from about m n / (m + n) tokens on. Bits do not stay: W + s B A is rounded
once more. Where a gradient is wanted, where the adapter is wider than the base, or a dropout is drawn, the
thin products are taken: autograd through W + s B A would hold a dense gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from fxlora.optimize import groups
from fxlora.optimize.edit import drop, prune
from fxlora.optimize.grouping import plain_site
from fxlora.optimize.report import Refusal, Step, site_of
from fxlora.runtime import cast_like


def merges(tokens: int, in_features: int, out_features: int, r: int) -> bool:
    """Says whether W + s B A is cheaper than two thin products.

    Args:
        tokens: how many rows x has.
        in_features, out_features: of the layer.
        r: the rank.

    >>> merges(16, 768, 768, 16), merges(4096, 768, 768, 16)
    (False, True)
    """
    # Making the weight also writes it, and the sum reads it: as much as two ranks' worth of products.
    merged = in_features * out_features * (r + 2)
    thin = tokens * (r * (in_features + out_features) + 2 * out_features)
    return merged < thin


def ordered(
    x: torch.Tensor, weight: Any, bias: Any, a: Any, b: Any, scaling: float, drop_module: Any
) -> torch.Tensor:
    """Returns the output of an adapted layer, by the cheaper order where no gradient is wanted."""
    drawn = drop_module is not None and drop_module.training
    if torch.is_grad_enabled() or drawn or a.dtype != weight.dtype or b.dtype != weight.dtype:
        return plain_site(x, weight, bias, a, b, scaling, drop_module)
    n, m = weight.shape
    if not merges(x.numel() // max(m, 1), m, n, a.shape[0]):
        return plain_site(x, weight, bias, a, b, scaling, drop_module)
    return torch._C._nn.linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)


torch.fx.wrap("ordered")


def orders(graph: Graph, root: nn.Module) -> Step:
    """Lets every call of plain LoRA pick its order when it runs."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.meta.get("role") == "base"]:
        found = groups.match(root, node)
        if isinstance(found, str):
            left.append(Refusal(site_of(node), found))
            continue
        with graph.inserting_before(found.out):
            y = graph.call_function(ordered, (found.x, *found.parts))
        y.meta = dict(found.out.meta)
        drop(graph, found.out, y)
        likes = [n.args[1] for n in found.inner if n.target is cast_like]
        for inner in [*found.inner, node]:
            graph.erase_node(inner)
        for like in likes:
            prune(graph, like)
        changed += 1
    return Step("orders", changed, tuple(left))
