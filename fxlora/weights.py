"""The nodes of what is added to a weight, put into one, or run in a module's place.

delta    W  ->  W + s * B A                             (peft.tuners.lora.ParamWrapper)
rows     W  ->  W.index_copy(0, indices, rows)          (peft.tuners.trainable_tokens)
whole    X  ->  X.modules_to_save.<adapter>             (peft.utils.ModulesToSaveWrapper)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.branches import LOOKUP, scaled_rows
from fxlora.nodes import Entry, Inserter, attribute, input_of, redirect, wide
from fxlora.plan import PlannedSite
from fxlora.runtime import add_rows, baddbmm, cast_like
from fxlora.slices import blocks


def insert_delta(
    graph: Graph, root: nn.Module, node: Node, entries: Sequence[Entry], quirks: frozenset[str],
    users: Sequence[Node] | None = None,
) -> None:  # fmt: skip
    """Adds the adapters of a weight where it is read.

    Args:
        graph: changed.
        root: its module tree.
        node: reads the weight.
        entries: the active adapters.
        quirks: named mistakes of PEFT's to reproduce.
        users: the nodes that shall read the sum; those inside the calls of the module whose
            wrapper has the adapters where None.
    """
    planned = entries[0][1]
    if users is None:
        users = [u for u in node.users if inside(u, planned.scopes) or _adds_part(u, planned)]
    if not users:
        return
    node.meta.update(role="base", site=planned.site.owner, adapter=entries[0][0])
    new = Inserter(graph, planned.name, node, planned.site.owner)
    if planned.kind == "Parameter" and len(entries) == 1 and planned.experts > 1:
        new.adapter = entries[0][0]
        redirect(users, node, _folded(new, root, planned, entries[0][0], node))
        return
    out, dtype, shape = node, node.meta.get("dtype"), tuple(planned.site.shape)
    shape = shape if planned.kind == "Parameter" else node.meta.get("shape", shape)
    together: Node | None = None
    for adapter, p in entries:
        new.adapter = adapter
        for again in range(2 if _doubled(p, quirks) else 1):
            delta = _delta(new, root, p, adapter, node if not again else None)
            if again:
                out = _again(new, out, delta, shape, dtype)
                continue
            if p.kind == "Parameter":
                # Several adapters of a parameter are added up before they meet the weight.
                together = (
                    delta
                    if together is None
                    else new.method("sum", "add", (together, delta), delta)
                )
            elif p.site.rows:
                where = {"blocks": blocks(p.site.rows), "dim": 0}
                out = new.add("sum", "call_function", add_rows, (out, delta), shape, dtype, where)
            else:
                out = new.add("sum", "call_method", "add", (out, delta), shape, dtype)
    if together is not None:
        out = new.add("sum", "call_method", "add", (out, together), shape, dtype)
    redirect(users, node, out)


def inside(user: Node, scopes: tuple[str, ...]) -> bool:
    """Says whether a node belongs to a call of a module, by one of its names."""
    return any(f.path in scopes for f in user.meta.get("module_stack", ()))


def _adds_part(user: Node, planned: PlannedSite) -> bool:
    """Says whether a node adds another part's adapter to the same weight."""
    return bool(planned.site.rows) and user.meta.get("role") == "sum"


def _again(new: Inserter, out: Node, delta: Node, shape: Any, dtype: Any) -> Node:
    """Adds peft's second delta, which goes into `.data`: without a gradient, rounded after the sum."""
    delta = new.method("delta", "detach", (delta,), delta)
    total = new.add(
        "sum", "call_method", "add", (out, delta), shape, wide(dtype, delta.meta.get("dtype"))
    )
    return new.add("cast_back", "call_function", cast_like, (total, out), shape, dtype)


def _doubled(planned: PlannedSite, quirks: frozenset[str]) -> bool:
    return planned.rule == "attention" and "attention_out_proj_doubled" in quirks


def _factors(new: Inserter, root: nn.Module, p: PlannedSite, adapter: str) -> tuple[Node, Node]:
    if p.form == "rows":
        names = [f"lora_embedding_{which}.{adapter}" for which in "AB"]
    else:
        names = [f"lora_{which}.{adapter}.weight" for which in "AB"]
    paths = [f"{p.prefix}.{name}" for name in names]
    a, b = (
        new.parameter(role, path, attribute(root, path))
        for role, path in zip(("lora_A", "lora_B"), paths, strict=True)
    )
    return a, b


def _delta(new: Inserter, root: nn.Module, p: PlannedSite, adapter: str, base: Node | None) -> Node:
    """Adds s * B A, in the dtype of the weight where one is given."""
    a, b = _factors(new, root, p, adapter)
    to = a.meta["dtype"]
    if p.experts > 1:
        e, r, i, o = p.experts, p.r, p.site.in_features, p.site.out_features
        shape = tuple(p.site.shape)
        a3 = new.add("delta", "call_method", "reshape", (a, e, -1, i), (e, r, i), to)
        b3 = new.add("delta", "call_method", "reshape", (b, o, -1, e), (o, r, e), to)
        rule = f"o r e, e r i -> e {'i o' if p.site.transposed else 'o i'}"
        product = new.add("delta", "call_function", torch.einsum, (rule, b3, a3), shape, to)
    else:
        shape = (b.meta["shape"][0], a.meta["shape"][1])
        product = new.add("delta", "call_method", "matmul", (b, a), shape, to)
        if p.kind in ("Conv1D", "Embedding"):  # their weights are stored turned round
            shape = shape[::-1]
            product = new.add("delta", "call_method", "t", (product,), shape, to)
    scaled = new.add("scale", "call_method", "mul", (product, p.scaling), shape, to)
    if base is None:
        return scaled
    dtype = base.meta.get("dtype")
    return new.add("cast_back", "call_function", cast_like, (scaled, base), shape, dtype)


def _folded(new: Inserter, root: nn.Module, p: PlannedSite, adapter: str, base: Node) -> Node:
    """Adds W + s * B A for a stack of expert weights, without a second stack in memory."""
    a, b = _factors(new, root, p, adapter)
    to, dtype = a.meta["dtype"], base.meta.get("dtype")
    # A is (experts * r, in), expert-major; B is (out, r * experts), rank-major.
    e, r, i, o = p.experts, p.r, p.site.in_features, p.site.out_features
    shape = tuple(p.site.shape)
    a3 = new.add("delta", "call_method", "reshape", (a, e, -1, i), (e, r, i), to)
    b3 = new.add("delta", "call_method", "reshape", (b, o, -1, e), (o, r, e), to)
    b3 = new.add("delta", "call_method", "permute", (b3, 2, 0, 1), (e, o, r), to)
    left, right = b3, a3
    if p.site.transposed:
        left = new.add("delta", "call_method", "transpose", (a3, -2, -1), (e, i, r), to)
        right = new.add("delta", "call_method", "transpose", (b3, -2, -1), (e, r, o), to)
    left = new.add("cast", "call_function", cast_like, (left, base), left.meta["shape"], dtype)
    right = new.add("cast", "call_function", cast_like, (right, base), right.meta["shape"], dtype)
    return new.add(
        "sum", "call_function", baddbmm, (base, left, right), shape, dtype,
        {"alpha": p.scaling},
    )  # fmt: skip


def open_layer(graph: Graph, call: Node, root: nn.Module) -> Node:
    """Replaces the call of a Linear by F.linear, so that its weight can be another tensor.

    Returns:
        The new call.
    """
    path = str(call.target)
    layer = root.get_submodule(path)
    x = input_of(call)
    held: list[Node | None] = []
    for name in ("weight", "bias"):
        p = getattr(layer, name)
        held.append(None if p is None else _read(graph, call, f"{path}.{name}", p))
    with graph.inserting_before(call):
        made = graph.call_function(F.linear, (x, *held))
    made.meta = dict(call.meta)
    call.replace_all_uses_with(made)
    graph.erase_node(call)
    return made


def _read(graph: Graph, call: Node, path: str, value: torch.Tensor) -> Node:
    with graph.inserting_before(call):
        node = graph.get_attr(path)
    node.meta.update({k: v for k, v in call.meta.items() if k not in ("shape", "dtype")})
    node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
    return node


# ---- whole modules and rows ---------------------------------------------------------------------


def retarget(graph: Graph, name: str, copy: str) -> None:
    """Lets every node that runs or reads `name` run or read its copy."""
    for node in graph.nodes:
        target = str(node.target)
        if node.op in ("call_module", "get_attr") and (target + ".").startswith(f"{name}."):
            if target.startswith(f"{name}.modules_to_save."):
                continue
            node.target = copy + target[len(name) :]
            node.meta.update(role="saved", site=name, adapter=copy.rpartition(".")[2])


def insert_rows(
    graph: Graph, root: nn.Module, name: str, delta: str, indices: tuple[int, ...]
) -> None:
    """Puts trainable rows into an embedding's weight wherever it is read.

    W  ->  W.index_copy(0, indices, rows)          (peft.tuners.trainable_tokens.TrainableTokensLayer)
    """
    adapter = delta.rpartition(".")[2]
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == name:
            _open_rows(graph, root, node, (name, delta, indices))
        elif node.op == "get_attr" and node.target == f"{name}.weight" and "role" not in node.meta:
            users = list(node.users)
            new = Inserter(graph, name, node)
            new.adapter = adapter
            redirect(users, node, _merged(new, root, (name, delta, indices), node))


_Rows = tuple[str, str, tuple[int, ...]]  # the layer, the path of its rows, which rows


def _merged(new: Inserter, root: nn.Module, rows: _Rows, weight: Node) -> Node:
    _, path, indices = rows
    dtype = weight.meta.get("dtype")
    index = new.add(
        "cast", "call_function", torch.tensor, (list(indices),), (len(indices),), torch.int64
    )
    device = new.add("cast", "call_function", getattr, (weight, "device"), None, None)
    moved = new.method("cast", "to", (index, device), index)
    values = new.parameter("rows", path, attribute(root, path))
    cast = new.method("cast", "to", (values, weight), values)
    cast.meta["dtype"] = dtype
    return new.method("rows", "index_copy", (weight,), weight, dim=0, index=moved, source=cast)


def _open_rows(graph: Graph, root: nn.Module, call: Node, rows: _Rows) -> None:
    name = rows[0]
    layer: Any = root.get_submodule(name)
    weight = _read(graph, call, f"{name}.weight", layer.weight)
    new = Inserter(graph, name, weight)
    new.adapter = rows[1].rpartition(".")[2]
    merged = _merged(new, root, rows, weight)
    shape, dtype = call.meta.get("shape"), call.meta.get("dtype")
    x = input_of(call)
    if isinstance(layer, nn.Linear):
        # As peft, which reads no bias here: an output layer tied to an embedding has none.
        named = {"input": x, "weight": merged}
        out = new.add("sum", "call_function", F.linear, (), shape, dtype, named)
    else:
        lookup = {k: getattr(layer, k) for k in LOOKUP}
        out = new.add("sum", "call_function", F.embedding, (x, merged), shape, dtype, lookup)
        out = scaled_rows(new, root, name, out)
    call.replace_all_uses_with(out)
    graph.erase_node(call)
