"""The nodes of an adapter beside a call.

    branch   y = W x + b      ->  y + s * B(A(dropout(x)))       (Hu et al. 2021, arXiv 2106.09685)
    rows     y = W[i]         ->  y + s * A^T[i] B^T
    dora     y = W x + b      ->  (g - 1) * W x + g * s * B(A(x)) + y,  g = m / |W + s B A|
                                                                 (Liu et al. 2024, arXiv 2402.09353)

Several active adapters follow one another, and the result is cast back once, as in peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.layers import is_conv
from fxlora.nodes import Entry, Inserter, attribute, input_of, redirect, wide
from fxlora.plan import PlannedSite
from fxlora.runtime import DoraBase, add_rows, cast_like
from fxlora.slices import blocks
from fxlora.tree import hang


def insert_branches(
    graph: Graph, root: nn.Module, base: Node, entries: Sequence[Entry], quirks: frozenset[str]
) -> None:
    """Adds the adapters of one layer behind one of its calls."""
    # Snapshot the users first: the sum below becomes a user of `base` too, and must keep reading
    # the base output rather than itself.
    users = list(base.users)
    planned = entries[0][1]
    base.meta.update(role="base", site=planned.site.owner, adapter=entries[0][0])
    if base.op != "call_module":
        base.meta["use"] = base.name
    new = Inserter(graph, planned.name, base, planned.site.owner)
    x, result = input_of(base), base
    for adapter, planned in entries:
        new.adapter = adapter
        one = _Branch(new, root, planned, adapter, base, quirks)
        x, result = one.insert(x, result)
    out = new.add(
        "cast_back", "call_function", cast_like, (result, base),
        base.meta.get("shape"), base.meta.get("dtype"),
    )  # fmt: skip
    redirect(users, base, out)


class _Branch:
    """One adapter's nodes behind one call."""

    def __init__(
        self, new: Inserter, root: nn.Module, planned: PlannedSite, adapter: str, base: Node,
        quirks: frozenset[str],
    ) -> None:  # fmt: skip
        self._new, self._root, self._planned, self._base = new, root, planned, base
        self._adapter, self._quirks = adapter, quirks
        self._shape, self._dtype = base.meta.get("shape"), base.meta.get("dtype")
        self._mode = self._module("lora_dropout") if planned.form != "rows" else None

    def _path(self, name: str) -> str:
        return f"{self._planned.prefix}.{name}.{self._adapter}"

    def _module(self, name: str) -> Any:
        return attribute(self._root, self._path(name))

    def insert(self, x: Any, result: Node) -> tuple[Any, Node]:
        """Adds the nodes; returns the input as the next adapter reads it, and the new result."""
        if self._planned.form == "rows":
            return x, self._rows(x, result)
        weight = self._module("lora_A").weight
        a_weight = self._new.parameter("cast", self._path("lora_A") + ".weight", weight)
        x_shape = x.meta.get("shape") if isinstance(x, Node) else None
        to = weight.dtype if self._dtype is not None else None
        x = self._new.add("cast", "call_function", cast_like, (x, a_weight), x_shape, to)
        dropped = self._new.add(
            "dropout", "call_module", self._path("lora_dropout"), (x,), x_shape, to
        )
        if self._planned.variant == "dora":
            return x, self._dora(x, dropped, result)
        scaled = self._scaled(self._low_rank(dropped))
        if self._planned.site.rows:
            return x, self._spread(result, scaled)
        if self._planned.variant.startswith("bdlora"):
            return x, self._in_place(result, scaled)
        if self._planned.casts_branch:
            scaled = self._new.add(
                "cast_back", "call_function", cast_like, (scaled, result), self._shape, self._dtype
            )
        return x, self._sum(result, scaled)

    # ---- pieces

    def _inner(self) -> Any:
        shape = self._shape
        if shape is None:
            return None
        r = self._planned.r * self._planned.experts
        if is_conv(self._planned.kind):
            channel = len(shape) - (len(self._planned.site.shape) - 1)
            return (*shape[:channel], r, *shape[channel + 1 :])
        return (*shape[:-1], r)

    def _low_rank(self, x: Node) -> Node:
        to = x.meta.get("dtype")
        a = self._new.add("lora_A", "call_module", self._path("lora_A"), (x,), self._inner(), to)
        if self._planned.variant == "kasa":
            diagonal = self._new.parameter(
                "lora_A", self._path("lora_diag"), self._module("lora_diag")
            )
            a = self._new.method("lora_A", "mul", (a, diagonal), a)
        return self._new.add("lora_B", "call_module", self._path("lora_B"), (a,), self._outer(), to)

    def _outer(self) -> Any:
        """Returns the shape of the branch's result: of a part's rows only."""
        if self._shape is None or not self._planned.site.rows:
            return self._shape
        return (*self._shape[:-1], self._planned.site.out_features)

    def _scaled(self, b: Node) -> Node:
        return self._new.method("scale", "mul", (b, self._planned.scaling), b)

    def _sum(self, result: Node, more: Node) -> Node:
        dtype = wide(result.meta.get("dtype"), more.meta.get("dtype"))
        return self._new.add("sum", "call_method", "add", (result, more), self._shape, dtype)

    def _spread(self, result: Node, more: Node) -> Node:
        """Adds a part's branch to its rows of the fused layer's output."""
        dtype = wide(result.meta.get("dtype"), more.meta.get("dtype"))
        where = {"blocks": blocks(self._planned.site.rows), "dim": -1}
        return self._new.add(
            "sum", "call_function", add_rows, (result, more), self._shape, dtype, where
        )

    def _in_place(self, result: Node, more: Node) -> Node:
        """Adds in place, as peft's BD-LoRA does, so the sum is rounded to the base's dtype."""
        node = self._new.add("sum", "call_method", "add_", (result, more), self._shape, self._dtype)
        node.meta["mutates"] = (result,)
        return node

    # ---- embeddings

    def _rows(self, x: Any, result: Node) -> Node:
        """Looks the indices up in lora_embedding_A.T; no casts and no dropout, as in peft."""
        new, planned = self._new, self._planned
        a, b = self._module("lora_embedding_A"), self._module("lora_embedding_B")
        layer = self._root.get_submodule(planned.site.owner)
        a_t = self._turned("lora_A", "lora_embedding_A", a)
        after_a = new.add(
            "lora_A", "call_function", F.embedding, (x, a_t), self._inner(), a.dtype,
            self._lookup(layer),
        )  # fmt: skip
        if after_a.kwargs["max_norm"] is not None:
            after_a.meta["mutates"] = (a_t,)
        b_t = self._turned("lora_B", "lora_embedding_B", b)
        if planned.variant == "dora":
            return self._dora_rows(result, after_a, a_t, b_t)
        out = new.add("lora_B", "call_method", "matmul", (after_a, b_t), self._shape, b.dtype)
        scaled = self._scaled(out)
        if self._base.op == "call_module":  # a lookup past the module is not scaled by its forward
            scaled = scaled_rows(self._new, self._root, planned.site.owner, scaled)
        return self._sum(result, scaled)

    def _turned(self, role: str, name: str, value: torch.Tensor) -> Node:
        p = self._new.parameter(role, self._path(name), value)
        shape = tuple(reversed(value.shape))
        return self._new.add(role, "call_function", getattr, (p, "T"), shape, value.dtype)

    def _lookup(self, layer: Any) -> dict[str, Any]:
        # PEFT hands max_norm on, and F.embedding then renormalises lora_embedding_A in place.
        limit = layer.max_norm if "embedding_max_norm" in self._quirks else None
        return {k: getattr(layer, k) for k in LOOKUP} | {"max_norm": limit}

    # ---- DoRA

    def _norm(self, weight: Node, delta: Node) -> Node:
        """Adds |W + s * delta| by rows, outside the gradient (DoRA, section 4.3)."""
        new = self._new
        delta = new.method("magnitude", "detach", (delta,), delta)
        scaled = new.method("magnitude", "mul", (delta, self._planned.scaling), delta)
        total = new.method("magnitude", "add", (weight, scaled), weight)
        rows: Any = weight.meta.get("shape")
        dtype = total.meta.get(
            "dtype"
        )  # of the sum: a bf16 weight and a float32 adapter give float32
        if is_conv(self._planned.kind):
            dims = tuple(range(1, len(self._planned.site.shape)))
            kept = (rows[0], *(1,) * len(dims))
            norm = new.add(
                "magnitude", "call_method", "norm", (total,), kept, dtype,
                {"p": 2, "dim": dims, "keepdim": True, "dtype": None},
            )  # fmt: skip
            turned = (1, rows[0], *(1,) * (len(dims) - 1))
            norm = new.add("magnitude", "call_method", "transpose", (norm, 1, 0), turned, dtype)
        else:
            norm = new.add(
                "magnitude", "call_function", torch.linalg.norm, (total,), (rows[0],), dtype,
                {"dim": 1},
            )  # fmt: skip
            norm = new.add(
                "magnitude", "call_function", cast_like, (norm, total), (rows[0],), dtype
            )
        return new.method("magnitude", "detach", (norm,), norm)

    def _gain(self, weight: Node, delta: Node) -> Node:
        """Adds g = m / |W + s B A|."""
        magnitude = self._new.parameter(
            "magnitude", self._path("lora_magnitude_vector") + ".weight",
            self._module("lora_magnitude_vector").weight,
        )  # fmt: skip
        norm = self._norm(weight, delta)
        return self._new.method("magnitude", "div", (magnitude, norm), magnitude)

    def _dora(self, x: Node, dropped: Node, result: Node) -> Node:
        new, planned = self._new, self._planned
        path, layer = str(self._base.target), self._root.get_submodule(str(self._base.target))
        delta = self._dense(x)
        weight = new.parameter("magnitude", f"{path}.weight", layer.weight)  # type: ignore[arg-type]
        if not is_conv(planned.kind):
            to = x.meta.get("dtype")
            weight = new.method("magnitude", "to", (weight, to), weight)
            weight.meta["dtype"] = to
        turned = weight
        if planned.kind == "Conv1D":
            shape = tuple(reversed(weight.meta["shape"]))
            turned = new.add(
                "magnitude", "call_function", getattr, (weight, "T"), shape, weight.meta["dtype"]
            )
        gain = self._gain(turned, delta)
        if not is_conv(planned.kind):
            gain = new.method("magnitude", "view", (gain, 1, -1), gain)
            gain.meta["shape"] = (1, planned.site.out_features)
        b = self._low_rank(dropped)
        base = self._dora_base(result, dropped, turned, path, layer)
        less = new.method("magnitude", "sub", (gain, 1), gain)
        first = new.method("magnitude", "mul", (less, base), base)
        second = new.method("magnitude", "mul", (gain, b), b)
        scaled = self._scaled(second)
        return self._sum(result, self._sum(first, scaled))

    def _dense(self, x: Node) -> Node:
        """Adds B A as a dense matrix, the way peft computes it."""
        new, planned = self._new, self._planned
        a, b = self._module("lora_A").weight, self._module("lora_B").weight
        to = a.dtype
        shape = tuple(planned.site.shape)
        if is_conv(planned.kind):
            r = a.shape[0]
            b_node = new.parameter("magnitude", self._path("lora_B") + ".weight", b)
            flat_b = new.add("magnitude", "call_method", "view", (b_node, [-1, r]),
                             (b.numel() // r, r), to)  # fmt: skip
            a_node = new.parameter("magnitude", self._path("lora_A") + ".weight", a)
            flat_a = new.add("magnitude", "call_method", "view", (a_node, [r, -1]),
                             (r, a.numel() // r), to)  # fmt: skip
            product = new.add("magnitude", "call_function", torch.mm, (flat_b, flat_a),
                              (b.numel() // r, a.numel() // r), to)  # fmt: skip
            return new.add("magnitude", "call_method", "reshape", (product, shape), shape, to)
        n, m = planned.site.in_features, planned.site.out_features
        device = new.add("magnitude", "call_function", getattr, (x, "device"), None, None)
        eye = new.add(
            "magnitude", "call_function", torch.eye, (n,), (n, n), to,
            {"device": device, "dtype": to},
        )  # fmt: skip
        left = new.add(
            "magnitude", "call_module", self._path("lora_A"), (eye,), (n, a.shape[0]), to
        )
        right = new.add("magnitude", "call_module", self._path("lora_B"), (left,), (n, m), to)
        turned = new.add("magnitude", "call_function", getattr, (right, "T"), (m, n), to)
        dtype = x.meta.get("dtype")
        return new.add("magnitude", "call_method", "to", (turned, dtype), (m, n), dtype)

    def _dora_base(self, result: Node, dropped: Node, weight: Node, path: str, layer: Any) -> Node:
        """Adds the base output without its bias; in train mode with dropout it is computed again."""
        new = self._new
        bias = None
        if layer.bias is not None:
            bias = new.parameter("magnitude", f"{path}.bias", layer.bias)
            if is_conv(self._planned.kind) and self._shape is not None:
                flat = (1, -1, *(1,) * (len(self._shape) - 2))
                bias = new.add("magnitude", "call_method", "view", (bias, *flat),
                               (1, layer.bias.shape[0], *flat[2:]), layer.bias.dtype)  # fmt: skip
        if not isinstance(self._mode, nn.Dropout):
            return (
                result if bias is None else new.method("magnitude", "sub", (result, bias), result)
            )
        name = self._path("lora_dora_base")
        hang(
            self._root,
            name,
            DoraBase(
                layer if is_conv(self._planned.kind) else None,
                "conv_padding_mode" not in self._quirks,
            ),
        )
        # In train mode; in eval mode, where it is the base output it was given, it is not cast after.
        return new.add(
            "magnitude", "call_module", name, (result, bias, dropped, weight), self._shape,
            dropped.meta.get("dtype"),
        )  # fmt: skip

    def _dora_rows(self, result: Node, after_a: Node, a_t: Node, b_t: Node) -> Node:
        new, planned, path = self._new, self._planned, str(self._base.target)
        layer: Any = self._root.get_submodule(path)
        shape = (planned.site.out_features, planned.site.in_features)
        dtype = a_t.meta["dtype"]
        product = new.add("magnitude", "call_method", "matmul", (a_t, b_t), shape[::-1], dtype)
        delta = new.add("magnitude", "call_function", getattr, (product, "T"), shape, dtype)
        weight = new.parameter("magnitude", f"{path}.weight", layer.weight)
        turned = new.add(
            "magnitude", "call_function", getattr, (weight, "T"), shape, layer.weight.dtype
        )
        turned = new.method("magnitude", "detach", (turned,), turned)
        gain = self._gain(turned, delta)
        out = new.add("lora_B", "call_method", "matmul", (after_a, b_t), self._shape, dtype)
        out = new.method("magnitude", "mul", (gain, out), out)
        scaled = scaled_rows(self._new, self._root, str(self._base.target), self._scaled(out))
        first = new.method("magnitude", "mul", (gain, result), result)
        return self._sum(first, scaled)


LOOKUP = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def scaled_rows(new: Inserter, root: nn.Module, name: str, rows: Node) -> Node:
    """Adds the factor of a scaled embedding (Gemma's), which its own forward applies."""
    layer: Any = root.get_submodule(name)
    scale = embed_scale(layer)
    if scale is None:
        return rows
    if isinstance(layer.embed_scale, torch.Tensor):
        node = new.parameter("scale", f"{name}.embed_scale", scale)
    else:
        device = new.add("scale", "call_function", getattr, (rows, "device"), None, None)
        node = new.add(
            "scale", "call_function", torch.tensor, (layer.embed_scale,), (), scale.dtype,
            {"device": device, "dtype": scale.dtype},
        )  # fmt: skip
    node = new.add(
        "scale", "call_function", cast_like, (node, rows), tuple(scale.shape),
        rows.meta.get("dtype"),
    )  # fmt: skip
    return new.method("scale", "mul", (rows, node), rows)


def embed_scale(layer: Any) -> torch.Tensor | None:
    """Returns the scalar a scaled embedding multiplies by (BaseTunerLayer._get_embed_scale)."""
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, (int, float)):
        weight = layer.weight
        return torch.tensor(scale, device=weight.device, dtype=weight.dtype)
    if isinstance(scale, torch.Tensor) and scale.numel() == 1:
        return scale
    return None
