"""Passes of memory mode: siblings under one autograd function, and SwiGLU under another.

    q, k, v of one x       ->  q, k, v = lora_group(x, (q's weights), (k's), (v's))
    silu(gate).mul(up)     ->  swiglu(gate, up)

What peft keeps for the backward pass of a site is x in the adapter's dtype, once for each sibling,
and h; the group keeps x once, in its own dtype. Outputs keep their bits (for a scaling that is a power
of two); gradients are added up in peft's order, but the products of the backward pass may round in
another order. It costs the products that are made again, about a third more work in the adapter.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.optimize import functions
from fxlora.optimize.edit import drop, only_user, prune, weight_at
from fxlora.optimize.grouping import lora_group, swiglu
from fxlora.optimize.report import Refusal, Step, site_of
from fxlora.runtime import cast_like


@dataclass
class Found:
    """The nodes of one adapted call."""

    x: Node
    base: Node
    inner: list[Node]
    out: Node
    parts: tuple[Any, ...]


def groups(graph: Graph, root: nn.Module) -> Step:
    """Puts plain adapters of the same tensor into one function."""
    together: dict[tuple[Any, ...], list[Found]] = {}
    left = []
    for node in [n for n in graph.nodes if n.meta.get("role") == "base"]:
        found = match(root, node)
        if isinstance(found, str):
            left.append(Refusal(site_of(node), found))
            continue
        regime = (node.meta.get("grad_enabled", True), node.meta.get("autocast"))
        together.setdefault((found.x, *regime), []).append(found)
    for members in together.values():
        _replace(graph, members)
    return Step("groups", sum(map(len, together.values())), tuple(left))


def match(root: nn.Module, base: Node) -> Found | str:
    """Returns the nodes of an adapted call, or why it is not one of plain LoRA."""
    if base.target is not F.linear or len(base.args) not in (2, 3):
        return "its base is no plain call of a Linear (hooks, another layer, a part of one)"
    x = base.args[0]
    out = next((u for u in base.users if u.target is cast_like and u.args[1] is base), None)
    if not isinstance(x, Node) or out is None:
        return "its base is read by others than its adapter"
    total = out.args[0]
    if not isinstance(total, Node) or total.target != "add" or total.args[:1] != (base,):
        return "several adapters are active, or its sum is not plain LoRA's"
    if set(base.users) != {total, out} or not only_user(total, out):
        return "its base is read by others than its adapter"
    chain = _branch(root, x, total)
    if isinstance(chain, str):
        return chain
    inner, a, b, scaling, module = chain
    if any(x in u.meta.get("mutates", ()) for u in x.users):
        return "its input is written to in place"
    bias = base.args[2] if len(base.args) == 3 else None
    return Found(x, base, [total, *inner], out, (base.args[1], bias, a, b, scaling, module))


def _branch(root: nn.Module, x: Node, total: Node) -> tuple[list[Node], Any, Any, float, Any] | str:
    """Returns the nodes between x and the sum, last first, and what they are made of."""
    not_plain = "its adapter is not plain LoRA (DoRA, a bias, another variant)"
    nodes: list[Node] = []
    at: Any = total.args[1]
    reader = total

    def step(target: Any, length: int) -> bool:
        nonlocal at, reader
        if not isinstance(at, Node) or at.target != target or len(at.args) != length:
            return False
        if not only_user(at, reader):
            return False
        nodes.append(at)
        at, reader = at.args[0], at
        return True

    if not step("mul", 2) or not isinstance(nodes[-1].args[1], float):
        return not_plain
    if not step(F.linear, 2):
        return not_plain
    b = nodes[-1].args[1]
    if not step(F.linear, 2):
        return not_plain
    a = nodes[-1].args[1]
    module = None
    if step(functions.dropout, 2):
        module = nodes[-1].args[1]
    if not step(cast_like, 2) or at is not x:
        return "its input is not the base's (another adapter's cast, a dropout of its own kind)"
    if weight_at(root, a) is None or weight_at(root, b) is None:
        return not_plain
    scaling = nodes[0].args[1]
    assert isinstance(scaling, float)
    return nodes, a, b, scaling, module


def _replace(graph: Graph, members: list[Found]) -> None:
    first = members[0].base
    for member in members:
        for part in member.parts:
            if isinstance(part, Node):
                first.prepend(part)
    with graph.inserting_before(first):
        group = graph.call_function(
            lora_group, (members[0].x, tuple(member.parts for member in members))
        )
    group.meta = {k: first.meta[k] for k in ("module_stack", "source") if k in first.meta}
    group.meta["role"] = "group"
    for i, member in enumerate(members):
        with graph.inserting_before(first):
            y = graph.call_function(operator.getitem, (group, i))
        y.meta = dict(member.out.meta)
        drop(graph, member.out, y)
        likes = [n.args[1] for n in member.inner if n.target is cast_like]
        for node in member.inner:
            graph.erase_node(node)
        for like in likes:
            prune(graph, like)
    for member in members:
        graph.erase_node(member.base)


def swiglus(graph: Graph, root: nn.Module) -> Step:
    """Joins silu(gate) and its product with up, where nothing else reads silu(gate)."""
    del root
    changed, left = 0, []
    for act in [
        n for n in graph.nodes if n.target is F.silu and n.kwargs in ({}, {"inplace": False})
    ]:
        user = next(iter(act.users), None)
        if user is None or not only_user(act, user):
            left.append(Refusal(site_of(act), "silu's result has another reader"))
            continue
        other = [a for a in user.args if a is not act]
        is_product = user.target in ("mul", operator.mul, torch.mul) and len(user.args) == 2
        if not is_product or len(other) != 1 or not isinstance(other[0], Node):
            left.append(Refusal(site_of(act), "silu's result is not multiplied by a tensor"))
            continue
        if user.args[0] is not act:
            left.append(Refusal(site_of(act), "silu's result is the second factor"))
            continue
        with graph.inserting_before(user):
            made = graph.call_function(swiglu, (act.args[0], other[0]))
        made.meta = dict(user.meta)
        drop(graph, user, made)
        graph.erase_node(act)
        changed += 1
    return Step("swiglus", changed, tuple(left))
