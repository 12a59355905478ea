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
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.gradients import target_name
from fxlora.optimize import functions
from fxlora.optimize.edit import Writes, drop, only_user, prune, weight_at
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
    together: dict[tuple[Any, ...], list[list[Found]]] = {}
    left = []
    writes = Writes(graph)
    draws = [n for n in graph.nodes if _draws(root, n)]
    for node in [n for n in graph.nodes if n.meta.get("role") == "base"]:
        found = match(root, node, writes)
        if isinstance(found, str):
            left.append(Refusal(site_of(node), found))
            continue
        regime = (node.meta.get("grad_enabled", True), node.meta.get("autocast"))
        parent = site_of(node).rpartition(".")[0]
        groups = together.setdefault((found.x, parent, *regime), [[]])
        if groups[-1] and _apart(groups[-1], found, draws):
            groups.append([])
        groups[-1].append(found)
    taken = [members for groups in together.values() for members in groups]
    now: dict[Node, Node] = {}
    for members in taken:
        _replace(graph, members, now)
    return Step("groups", sum(map(len, taken)), tuple(left))


# What draws numbers, by its name; a function or module that is not torch's own may.
_DRAWN = re.compile(
    r"drop|rand|bernoulli|multinomial|normal_?$|poisson|rrelu|gumbel|exponential_|uniform_|cauchy_|"
    r"geometric_|binomial|gamma|dirichlet|attention|^(rnn|gru|lstm)",
    re.IGNORECASE,
)
_PURE = ("torch", "_operator", "builtins", "math", "fxlora")


def _draws(root: nn.Module, node: Node) -> bool:
    """Whether a node may draw random numbers: then a dropout does not move past it."""
    if node.op == "call_module":
        made = type(root.get_submodule(str(node.target)))
        return made.__module__.partition(".")[0] not in _PURE or bool(_DRAWN.search(made.__name__))
    if node.op not in ("call_function", "call_method"):
        return False
    owner = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return owner not in _PURE or bool(_DRAWN.search(target_name(node)))


def _apart(members: list[Found], further: Found, draws: list[Node]) -> bool:
    """Whether a site that moved to its siblings would draw its dropout's numbers earlier than before."""
    every = [*members, further]
    if all(m.parts[-1] is None for m in every):
        return False
    own = {n for m in every for n in m.inner}
    first, last = members[0].base, further.base
    return any(first < n < last and n not in own for n in draws)


def match(root: nn.Module, base: Node, writes: Writes | None = None) -> Found | str:
    """Returns the nodes of an adapted call, or why it is not one of plain LoRA.

    Args:
        root: what the graph's paths lead into; read.
        base: the call of the layer itself.
        writes: of the graph, where the call is going to move to another place.
    """
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
    if writes is not None and writes.after(x, base):
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


def _replace(graph: Graph, members: list[Found], now: dict[Node, Node]) -> None:
    """Puts one group in the place of its members.

    Args:
        graph: changed.
        members: the sites, in order.
        now: what stands for the result of a site that was replaced before; extended.
    """
    first = members[0].base
    x = now.get(members[0].x, members[0].x)
    for member in members:
        for part in member.parts:
            if isinstance(part, Node):
                first.prepend(part)
    with graph.inserting_before(first):
        group = graph.call_function(lora_group, (x, tuple(member.parts for member in members)))
    group.meta = {k: first.meta[k] for k in ("module_stack", "source") if k in first.meta}
    group.meta["role"] = "group"
    for i, member in enumerate(members):
        with graph.inserting_before(first):
            y = graph.call_function(operator.getitem, (group, i))
        y.meta = dict(member.out.meta)
        now[member.out] = y
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
    writes = Writes(graph)
    acts = [n for n in graph.nodes if n.target is F.silu and n.kwargs in ({}, {"inplace": False})]
    written = {n for n in acts if isinstance(n.args[0], Node) and writes.after(n.args[0], n)}
    for act in acts:
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
        if act in written:
            left.append(Refusal(site_of(act), "the gate is written to in place"))
            continue
        with graph.inserting_before(user):
            made = graph.call_function(swiglu, (act.args[0], other[0]))
        made.meta = dict(user.meta)
        drop(graph, user, made)
        graph.erase_node(act)
        changed += 1
    return Step("swiglus", changed, tuple(left))
