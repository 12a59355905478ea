"""Where a weight gets a low-rank product added before it is used.

W + s * (B @ A), in either order, as baddbmm or addmm too, and folded over a stack of experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from fxlora.recognise.found import LowRank
from fxlora.recognise.reading import ADDS, CASTS, TURNS, VIEWS, Chain, Reader, name_of
from fxlora.recognise.rows import INTO_ROWS, rows_added
from fxlora.recognise.rows import sides as row_sides

_PRODUCTS = frozenset("matmul mm bmm __matmul__ einsum".split())
_FUSED = frozenset("baddbmm addmm".split())


def delta(read: Reader, node: Node) -> list[LowRank]:
    """Returns the pairs whose product a node adds to a leaf weight."""
    name = name_of(node)
    if name in _FUSED and len(node.args) == 3 and node.kwargs.get("beta", 1) == 1:
        base, left, right = node.args
        alpha = node.kwargs.get("alpha", 1)
        weight = read.factor(base)
        if weight is None or weight[1].dim() < 2 or not isinstance(alpha, (int, float)):
            return []
        pair = _pair(read, node, weight, node, (left, right), Chain(node, float(alpha)), ())
        return [pair] if pair else []
    if name in INTO_ROWS:
        try:
            rows = rows_added(node, 0)
        except ValueError:
            return []
        to, more = row_sides(node)
        weight = _base(read, to)
        if weight is None:
            return []
        found = [_pair(read, node, weight, n, _sides(n), c, path)
                 for n, c, path in _products(read, more, 1.0)]  # fmt: skip
        return [replace(p, rows=rows) for p in found if p]
    if name not in ADDS or len(node.args) < 2:
        return []
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return []
    pairs = []
    for one, other, factor in ((0, 1, float(alpha)), (1, 0, 1.0)):
        weight = _base(read, node.args[one])
        if weight is None:
            continue
        for product, chain, path in _products(read, node.args[other], factor):
            pair = _pair(read, node, weight, product, _sides(product), chain, path)
            if pair:
                pairs.append(pair)
    return pairs


def _base(read: Reader, value: Any) -> tuple[str, Any, Chain] | None:
    """Returns the leaf weight a value is, or is with other pairs added to it already."""
    found = read.factor(value)
    while found is None and isinstance(value, Node) and name_of(value) in ADDS | CASTS | INTO_ROWS:
        value = value.args[0]
        found = read.factor(value)
    if found is None or found[1].dim() < 2 or found[2].scale != 1 or found[2].named:
        return None
    return found


def _sides(product: Node) -> tuple[Any, Any]:
    args: Any = product.args
    if name_of(product) == "einsum":
        args = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    return args[0], args[1]


def _products(
    read: Reader, value: Any, factor: float
) -> list[tuple[Node, Chain, tuple[Node, ...]]]:
    """Returns the products of two that a value is the sum of, scaled and reshaped."""
    if not isinstance(value, Node):
        return []
    chain = read.back(value, turns=True, free_views=True)
    chain.scale *= factor
    if name_of(chain.end) in _PRODUCTS:
        return [(chain.end, chain, tuple(chain.nodes))]
    if name_of(chain.end) not in ADDS or chain.turned or len(chain.end.args) < 2:
        return []
    both = [p for a in chain.end.args[:2] for p in _products(read, a, chain.scale)]
    return [(n, c, (*chain.nodes, chain.end, *path)) for n, c, path in both]


def _pair(
    read: Reader, out: Node, weight: tuple[str, Any, Chain], product: Node, sides: tuple[Any, Any],
    chain: Chain, path: tuple[Node, ...],
) -> LowRank | None:  # fmt: skip
    left, right = (read.factor(s, views=True) for s in sides)
    if left is None or right is None or chain.gains or chain.dropout:
        return None
    name, tensor, held = weight
    if tensor is left[1] or tensor is right[1]:
        return None  # W + W V is W (1 + V): W is no factor of itself
    shape = tuple(tensor.shape)
    use = _use(out)
    if len(shape) == 2 and name_of(product) != "einsum":
        # Rows of the product are rows of W, which a linear map may hold as (in, out).
        transposed = (use is not None and use[1]) != held.turned
        flipped = transposed != chain.turned
        up, down = (right, left) if flipped else (left, right)
        turned = (down[2].turned != flipped, up[2].turned != flipped)
        sizes = [tuple(p[1].shape) for p in (down, up)]
        if any(len(s) != 2 for s in sizes):
            return None
        (r, into), (o, inner) = (s[::-1] if t else s for s, t in zip(sizes, turned, strict=True))
        if r != inner:
            return None
    else:
        down, up, r, into, o = _stacked(left, right, shape)
        turned = (False, False)
        if down is None:
            return None
    scale = chain.scale * left[2].scale * right[2].scale
    named = (*chain.named, *left[2].named, *right[2].named)
    return LowRank(
        "delta", held.end, None, product, product, out, path, name, down[0], up[0], "", r, into, o,
        scale, named, 0.0, (), turned,
    )  # fmt: skip


def _stacked(left: Any, right: Any, shape: tuple[int, ...]) -> tuple[Any, Any, int, int, int]:
    """Tells A (experts * r, in) from B (out, r * experts) by their sizes."""
    experts = shape[0] if len(shape) == 3 else 1
    for down, up in ((right, left), (left, right)):
        a, b = tuple(down[1].shape), tuple(up[1].shape)
        if len(a) == 2 and len(b) == 2 and a[0] == b[1] and a[0] % experts == 0:
            if len(shape) == 3 and {a[1], b[0]} != set(shape[1:]):
                continue
            return down, up, a[0] // experts, a[1], b[0]
    return None, None, 0, 0, 0


def _use(out: Node) -> tuple[Node, bool] | None:
    """Returns the first map that reads the sum, and whether it reads it as (in, out)."""
    todo: list[tuple[Node, bool]] = [(out, False)]
    seen = {out}
    while todo:
        at, turned = todo.pop(0)
        for user in at.users:
            name = name_of(user)
            if name == "linear" and len(user.args) > 1 and user.args[1] is at:
                return user, turned
            if name in ("matmul", "mm", "addmm", "__matmul__") and user.args[-1] is at:
                return user, not turned
            through = name in CASTS | TURNS | ADDS | VIEWS | INTO_ROWS
            if through and user not in seen:
                seen.add(user)
                todo.append((user, turned != (name in TURNS)))
    return None
