"""Which multiplication by a leaf weight a node is: dense, convolution or lookup, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxlora.recognise.reading import VIEWS, Reader, name_of, shape_of
from fxlora.sites import kind_of

_PRODUCTS = frozenset("matmul mm bmm __matmul__ __rmatmul__".split())
_CONVS = frozenset("conv1d conv2d conv3d convolution".split())
_DENSE = frozenset(("Linear", "Conv1D"))


@dataclass
class Map:
    """One multiplication by a leaf weight: the weight's size as (out, in) beside its rank."""

    node: Node
    kind: str  # "linear", "left" (the weight stands left of x), "conv" or "embedding"
    x: Node
    weight: str
    tensor: torch.Tensor
    out_features: int
    in_features: int
    turned: bool
    bias: str | None = None  # "" when there is one that is no leaf
    scale: float = 1.0
    named: tuple[str, ...] = ()
    pointwise: bool = True


class Maps(Reader):
    """Reads the maps of one graph; never writes."""

    def map(self, node: Node) -> Map | None:
        """Returns the multiplication by one leaf weight that a node is; None for anything else."""
        if node.op == "call_module":
            return self._module_map(node)
        name, args = name_of(node), _arguments(node)
        if name == "linear":
            return self._dense(node, args("input", 0), args("weight", 1), True, args("bias", 2))
        if name == "addmm" and not _weighted(node):
            return self._dense(node, args("mat1", 1), args("mat2", 2), False, args("input", 0))
        if name in _PRODUCTS or name == "mv":
            left, right = (args("input", 0), args("other", 1))
            if name == "__rmatmul__":
                left, right = right, left
            if name == "bmm":
                right = _unexpanded(right)
            found = self._dense(node, left, right, False, None) if name != "mv" else None
            return found or self._dense(node, right, left, True, None, "left")
        if name == "einsum":
            return self._einsum(node)
        if name in _CONVS:
            return self._conv(node, args("input", 0), args("weight", 1), args("bias", 2))
        if name == "embedding":
            ids, table = args("input", 0), args("weight", 1)
            if isinstance(node.target, torch._ops.OpOverload):  # ATen has the table first
                ids, table = table, ids
            found = self._dense(node, ids, table, False, None, "embedding")
            return None if node.kwargs.get("max_norm") is not None else found
        return None

    def _dense(
        self, node: Node, x: Any, weight: Any, out_first: bool, bias: Any, kind: str = "linear"
    ) -> Map | None:
        found = self.factor(weight)
        if found is None or not isinstance(x, Node) or found[1].dim() != 2:
            return None
        name, tensor, chain = found
        turned = chain.turned == out_first
        sizes = tuple(tensor.shape)
        out, into = (sizes[1], sizes[0]) if turned else sizes
        return Map(
            node, kind, x, name, tensor, out, into, turned, self._bias(bias), chain.scale,
            tuple(chain.named),
        )  # fmt: skip

    def _bias(self, bias: Any) -> str | None:
        if bias is None:
            return None
        found = self.leaf(bias)
        return found[0] if found is not None else ""

    def _conv(self, node: Node, x: Any, weight: Any, bias: Any) -> Map | None:
        found = self.factor(weight)
        if found is None or not isinstance(x, Node) or found[2].turned or found[1].dim() < 3:
            return None
        name, tensor, chain = found
        if node.kwargs.get("transposed") or (len(node.args) > 6 and node.args[6] is True):
            return None
        last = node.args[8:9] or node.args[6:7]
        groups = node.kwargs.get("groups") or (last[0] if last else 1)
        into = tensor.shape[1] * (groups if isinstance(groups, int) else 1)
        return Map(
            node, "conv", x, name, tensor, tensor.shape[0], into, False, self._bias(bias),
            chain.scale, tuple(chain.named), all(k == 1 for k in tensor.shape[2:]),
        )  # fmt: skip

    def _einsum(self, node: Node) -> Map | None:
        if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)):
            rule, operands = node.args[0], list(node.args[1])
        else:
            rule, operands = node.args[0], list(node.args[1:])
        parts = str(rule).replace(" ", "").replace("...", "").split("->")
        if len(parts) != 2 or len(operands) != 2:
            return None
        terms = parts[0].split(",")
        for at in (1, 0):
            w, x, out = terms[at], terms[1 - at], parts[1]
            if len(w) != 2 or not x or not out or x[-1] not in w:
                continue
            to = w[1] if w[0] == x[-1] else w[0]
            if out == x[:-1] + to and to not in x:
                return self._dense(node, operands[1 - at], operands[at], w[0] == to, None)
        return None

    def _module_map(self, node: Node) -> Map | None:
        module: Any = self.module(node)
        kind = kind_of(type(module))
        if type(module).__name__ == "BlockDiagonalLinear":
            kind = "Linear"
        weight = getattr(module, "weight", None)
        x = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if kind in (None, "MultiheadAttention") or not isinstance(x, Node):
            return None
        if not isinstance(weight, torch.Tensor):
            return None
        bias = f"{node.target}.bias" if getattr(module, "bias", None) is not None else None
        name, sizes = f"{node.target}.weight", tuple(weight.shape)
        if kind in _DENSE:
            turned = kind == "Conv1D"
            out, into = (sizes[1], sizes[0]) if turned else _features(module, sizes)
            return Map(node, "linear", x, name, weight, out, into, turned, bias)
        if kind == "Embedding":
            found = Map(node, "embedding", x, name, weight, sizes[1], sizes[0], True)
            return self._unscaled(found, str(node.target), module)
        pointwise = all(k == 1 for k in sizes[2:])
        into = sizes[1] * module.groups
        return Map(node, "conv", x, name, weight, sizes[0], into, False, bias, pointwise=pointwise)

    def _unscaled(self, found: Map, path: str, module: Any) -> Map:
        """An embedding that scales what it looks up (Gemma's): the factor belongs to the map."""
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, (int, float)):
            weight = module.weight
            found.scale = float(torch.tensor(scale, dtype=weight.dtype))
        elif isinstance(scale, torch.Tensor):
            found.named = (f"{path}.embed_scale",)
        return found


def _unexpanded(node: Any) -> Any:
    """Returns the matrix a decomposed matmul repeats for every entry of a batch."""
    at, shape = node, shape_of(node)
    while shape and isinstance(at, Node) and name_of(at) in VIEWS | {"expand"}:
        at = at.args[0]
        before = shape_of(at)
        if before is None or before[-2:] != shape[-2:]:
            return node
        if len(before) == 2:
            return at
    return node


def _features(module: Any, sizes: tuple[int, ...]) -> tuple[int, int]:
    if hasattr(module, "in_features"):  # a packed weight has another shape
        return module.out_features, module.in_features
    return sizes[0], sizes[1]


def _weighted(node: Node) -> bool:
    return any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta"))


def _arguments(node: Node) -> Any:
    def get(name: str, position: int) -> Any:
        if len(node.args) > position:
            return node.args[position]
        return node.kwargs.get(name)

    return get
