"""A pass: siblings that read the same x cast it once.

    q: cast(x, A_q)    k: cast(x, A_k)    v: cast(x, A_v)
    ->  c = cast(x, A_q);  k: cast_again(x, A_k, c);  v: cast_again(x, A_v, c)

Where adapters are wider than the base (bf16 under peft's fp32 adapters) peft makes and keeps one
float32 copy of x for each of q, k and v, gate and up. Here they share one. Bits stay, because every
sibling casts its gradient by itself, as peft does: adding up in float32 first would round
otherwise. It costs a small autograd node in place of the copy, so it is done from 32,768 numbers on.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from fxlora.optimize import functions
from fxlora.optimize.edit import Writes, weight_at
from fxlora.optimize.report import Refusal, Step, site_of
from fxlora.runtime import cast_like

_CASTS = (cast_like, functions.cast_for_product)


def shared_casts(graph: Graph, root: nn.Module) -> Step:
    """Lets every further cast of a tensor to a dtype take the first one's result."""
    first: dict[tuple[Node, object], Node] = {}
    changed, left = 0, []
    writes = Writes(graph)
    for node in graph.nodes:
        if node.target not in _CASTS:
            continue
        x, like = node.args[:2]
        weight = weight_at(root, like)
        if weight is None or not isinstance(x, Node):
            continue
        earlier = first.setdefault((x, weight.dtype), node)
        if writes.after(x, earlier):
            left.append(Refusal(site_of(node), "what it casts is written to in place"))
            continue
        if earlier is node:
            continue
        if node.target is cast_like or earlier.target is cast_like:
            left.append(Refusal(site_of(node), "a dropout reads the cast"))
            continue
        node.args = (x, like, earlier)
        node.target = functions.cast_again
        changed += 1
    return Step("shared_casts", changed, tuple(left))
