"""A fused linear layer's parts: which rows of qkv_proj are q, k and v, read off the dataflow.

The output of a fused layer is only viewed, split and sliced before anything computes with it. So
its row numbers are sent through those operations in its place, and what arrives at the first
computing node says which rows that node reads. A part's role is where it ends: the query, key or
value of an attention, or the gate or the other factor of a gated activation.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxlora.facts import info
from fxlora.sites import Site, sites

# What only moves, splits or repeats elements.
_MOVES = frozenset(
    "view reshape transpose permute chunk split split_with_sizes tensor_split unbind unsqueeze "
    "squeeze flatten unflatten movedim moveaxis swapaxes swapdims narrow select contiguous clone "
    "getitem rearrange".split()
)
# What keeps every element where it is: casts, and clipping (DBRX and OLMo clip q, k and v).
_KEEPS = frozenset(
    "to float half bfloat16 double type type_as detach clamp clamp_ cast_like".split()
)
_SPLITS = frozenset(
    "chunk split split_with_sizes tensor_split unbind getitem narrow select".split()
)
_ACTIVATIONS = frozenset("silu gelu relu sigmoid tanh quick_gelu hardswish mish elu".split())
_FACTORS = frozenset("mul mul_ __mul__ __rmul__ imul".split())
_SOFTMAX = frozenset("softmax log_softmax _softmax".split())
_PRODUCTS = frozenset("matmul bmm baddbmm einsum __matmul__".split())
# What reads no element.
_ASKS = frozenset(
    "size dim numel new_empty new_zeros new_ones new_full empty_like zeros_like ones_like".split()
)
_FORMULA = {"q": 0, "k": 1, "v": 2}
_SYMBOL = 2  # the size given to every dimension that follows the input


@dataclass(frozen=True)
class Slice:
    """Some of a fused layer's output features, and what they are.

    Attributes:
        site: the fused site's name.
        part: "q", "k", "v", "gate" or "up"; "0", "1", ... in the order of the rows where the
            dataflow shows no such role.
        rows: the output features, in order; several ranges where they are interleaved by head.
    """

    site: str
    part: str
    rows: tuple[range, ...]

    @property
    def name(self) -> str:
        """The name it is addressed by: `model.layers.0.self_attn.qkv_proj.q`."""
        return f"{self.site}.{self.part}"

    @property
    def out_features(self) -> int:
        """How many rows it has."""
        return sum(map(len, self.rows))

    @property
    def where(self) -> str:
        """The rows as text: `0:3072`, or `0:64, 192:256, ...` where they are interleaved."""
        shown = [f"{r.start}:{r.stop}" for r in self.rows[:2]]
        return ", ".join(shown + (["..."] if len(self.rows) > 2 else []))


def slices(traced: GraphModule) -> tuple[Slice, ...]:
    """Finds the parts of every fused Linear, Conv1D and nn.MultiheadAttention of a traced graph.

    Args:
        traced: what `fxlora.trace` returned; read.

    Returns:
        The parts, site after site; nothing for a layer that is computed with as a whole.

    >>> import torch, fxlora
    >>> class Gated(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_up_proj = torch.nn.Linear(4, 12)
    ...     def forward(self, x):
    ...         gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    ...         return torch.nn.functional.silu(gate) * up
    >>> [(s.name, s.where) for s in slices(fxlora.trace(Gated(), (torch.randn(2, 4),)))]
    [('gate_up_proj.gate', '0:6'), ('gate_up_proj.up', '6:12')]
    """
    found: list[Slice] = []
    for site in sites(traced):
        found += slices_of(site, traced)
    return tuple(found)


def slices_of(site: Site, traced: GraphModule) -> tuple[Slice, ...]:
    """Returns the parts of one site; empty when it is not fused."""
    if site.kind == "MultiheadAttention":
        return _attention(site, traced)
    if site.kind not in ("Linear", "Conv1D"):
        return ()
    calls = [c.node for c in site.calls if c.node.op == "call_module"]
    if not calls or len(calls) < len(site.calls):
        return ()
    each = [_parts(node, site.out_features) for node in calls]
    if not each[0] or any(e != each[0] for e in each):
        return ()  # calls that split it differently have no common parts
    return tuple(Slice(site.name, part, rows) for part, rows in each[0])


def _attention(site: Site, traced: GraphModule) -> tuple[Slice, ...]:
    """Returns the three parts torch.nn.MultiheadAttention documents for its in_proj_weight."""
    module = info(traced).model.get_submodule(site.name)
    if not isinstance(module, nn.MultiheadAttention) or not module._qkv_same_embed_dim:
        return ()
    e = module.embed_dim
    return tuple(Slice(site.name, p, (range(i * e, (i + 1) * e),)) for p, i in _FORMULA.items())


def blocks(rows: tuple[range, ...]) -> tuple[tuple[int, int, int, int], ...]:
    """Returns ranges as (start, width, period, count), equal ones at equal distances together.

    >>> blocks((range(0, 2), range(6, 8), range(12, 14))), blocks((range(3, 9),))
    (((0, 2, 6, 3),), ((3, 6, 6, 1),))
    """
    out: list[list[int]] = []
    for r in rows:
        last = out[-1] if out else None
        if last is not None and len(r) == last[1]:
            apart = r.start - (last[0] + (last[3] - 1) * last[2])
            if last[3] == 1 or apart == last[2]:
                last[2], last[3] = apart, last[3] + 1
                continue
        out.append([r.start, len(r), len(r), 1])
    return tuple((a, b, c, d) for a, b, c, d in out)


# ---- which rows --------------------------------------------------------------------------------


_Rows = tuple[range, ...]


def _parts(call: Node, features: int) -> list[tuple[str, _Rows]]:
    if not _is_split(call):
        return []
    shape = _concrete(call.meta.get("shape"))
    if shape is None or not shape or shape[-1] != features:
        return []
    start = torch.arange(features).expand(shape)
    read = _consumed(call, start)
    if read is None:
        return []
    roles: dict[str, set[int]] = {}
    for number, (rows, users) in enumerate(_largest(read)):
        roles.setdefault(_role(users) or f"?{number}", set()).update(rows)
    _name_gated(roles, read)
    if len(roles) < 2 or sum(map(len, roles.values())) > features:
        return []  # one role, or rows with two: not parts of a whole
    ordered = sorted(roles.items(), key=lambda item: min(item[1]))
    return [
        (str(i) if role.startswith("?") else role, _ranges(rows))
        for i, (role, rows) in enumerate(ordered)
    ]


def _is_split(call: Node) -> bool:
    """Says whether any operation that takes a part is near, without following the rows."""
    todo, seen = deque([call]), {call}
    while todo:
        for user in todo.popleft().users:
            if user in seen:
                continue
            seen.add(user)
            if _word(user) in _SPLITS:
                return True
            if _word(user) in _MOVES or _word(user) in _KEEPS:
                todo.append(user)
    return False


_Read = list[tuple[frozenset[int], list[tuple[Node, Node]]]]  # rows -> (node that has them, user)


def _consumed(call: Node, start: torch.Tensor) -> _Read | None:
    """Returns the row sets that computing nodes read; None when one reads all rows at once."""
    values: dict[Node, Any] = {call: start}
    read: dict[frozenset[int], list[tuple[Node, Node]]] = {}
    todo = deque([call])
    while todo:
        at = todo.popleft()
        for user in at.users:
            if user in values or user.op == "output":
                if user.op == "output":
                    return None
                continue
            word = _word(user)
            if word in _ASKS or user.target is getattr:
                continue
            moved = _moved(user, at, values) if word in _MOVES | _KEEPS else None
            if moved is not None:
                values[user] = moved
                todo.append(user)
                continue
            if not isinstance(values[at], torch.Tensor):
                return None
            rows = frozenset(values[at].unique().tolist())
            if len(rows) == start.shape[-1]:
                return None
            if not rows:
                continue  # the empty rest of a rotation over the whole head
            read.setdefault(rows, []).append((at, user))
    return list(read.items())


def _moved(user: Node, at: Node, values: dict[Node, Any]) -> Any:
    """Applies an operation that moves elements to the row numbers; None when it is not one."""
    if not user.args or user.args[0] is not at:
        return None
    if _word(user) in _KEEPS:
        return values[at]

    def known(a: Any) -> Any:
        return values[a] if a in values else _number(a)

    try:
        args = torch.fx.map_arg(user.args, known)
        kwargs = torch.fx.map_arg(user.kwargs, known)
        if user.op == "call_method":
            return getattr(args[0], str(user.target))(*args[1:], **kwargs)
        target: Any = user.target
        return target(*args, **kwargs)
    except (_UnknownNumber, RuntimeError, TypeError, IndexError, ValueError, AttributeError):
        return None


class _UnknownNumber(Exception):
    """A size that does not follow from the shapes the trace knows."""


def _number(node: Any) -> Any:
    """Returns the value of a node that computes a size, with every symbol at the same size."""
    if node.op == "call_method" and node.target == "size":
        shape = _concrete(node.args[0].meta.get("shape"))
        if shape is None:
            raise _UnknownNumber
        return shape[node.args[1]] if len(node.args) > 1 else torch.Size(shape)
    if node.op != "call_function":
        raise _UnknownNumber
    if node.target is getattr and node.args[1] == "shape":
        shape = _concrete(node.args[0].meta.get("shape"))
        if shape is None:
            raise _UnknownNumber
        return torch.Size(shape)
    if getattr(node.target, "__module__", "") in ("_operator", "operator", "builtins", "math"):
        args = torch.fx.map_arg(node.args, _number)
        return node.target(*args)
    raise _UnknownNumber


def _concrete(shape: Any) -> tuple[int, ...] | None:
    """Returns a shape with every symbol replaced by one size; None where it cannot be told."""
    if shape is None:
        return None
    out = []
    for d in shape:
        if isinstance(d, int):
            out.append(d)
            continue
        try:
            names = dict.fromkeys(compile(str(d), "", "eval").co_names, _SYMBOL)
            out.append(int(eval(str(d), {"__builtins__": {}}, names)))
        except (SyntaxError, NameError, TypeError, ValueError):
            return None
    return tuple(out)


def _largest(read: _Read) -> Iterator[tuple[frozenset[int], list[tuple[Node, Node]]]]:
    """Yields the row sets no other contains: a rotated half of q belongs to q."""
    for rows, _ in read:
        if not any(rows < other for other, _ in read):
            inside = [u for other, users in read for u in users if other <= rows]
            yield rows, inside


def _ranges(rows: Iterable[int]) -> _Rows:
    out: list[list[int]] = []
    for i in sorted(rows):
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return tuple(range(a, b) for a, b in out)


# ---- which role --------------------------------------------------------------------------------


def _role(uses: list[tuple[Node, Node]]) -> str:
    """Returns "q", "k" or "v" when every way on leads to that argument of an attention."""
    found = {r for at, user in uses if (r := _attends(at, user))}
    return found.pop() if len(found) == 1 else ""


def _attends(start: Node, first: Node) -> str:
    """Follows a value to the first attention it enters, past norms, rotations and caches."""
    todo, seen = deque([(start, first)]), {first}
    while todo:
        at, user = todo.popleft()
        word = _word(user)
        if word in ("scaled_dot_product_attention", "flash_attn_func", "flex_attention"):
            return next((r for r, i in _FORMULA.items() if _argument(user, i) is at), "")
        if word in _PRODUCTS:
            role = _of_product(user, at)
            if role:
                return role
        if _stops(user):
            continue
        for here in (user, *_written(user)):
            for onward in here.users:
                if onward not in seen and _word(onward) not in _ASKS:
                    seen.add(onward)
                    todo.append((here, onward))
    return ""


def _written(user: Node) -> Iterator[Node]:
    """Yields the tensors a node writes into, and those they are views of."""
    for node in user.meta.get("mutates", ()):
        at = node
        yield at
        while _word(at) in _MOVES and at.args and isinstance(at.args[0], Node):
            at = at.args[0]
            yield at


def _argument(user: Node, i: int) -> Any:
    named = ("query", "key", "value")[i]
    return user.args[i] if i < len(user.args) else user.kwargs.get(named)


def _of_product(product: Node, at: Node) -> str:
    """Returns the role in softmax(q k^T) v of one operand of a product."""
    named = [
        product.kwargs[k] for k in ("batch1", "batch2", "mat2", "other") if k in product.kwargs
    ]
    operands = [a for a in (*product.args, *named) if isinstance(a, Node)][-2:]
    if len(operands) < 2 or at not in operands:
        return ""
    other = operands[1 - operands.index(at)]
    if _near(other, lambda n: n.all_input_nodes, 6):
        return "v"
    if _near(product, lambda n: list(n.users), 8):
        return "q" if operands[0] is at else "k"
    return ""


def _near(start: Node, onward: Callable[[Node], list[Node]], steps: int) -> bool:
    """Says whether a softmax is near, along single operations that are no products."""
    todo, seen = deque([(start, 0)]), {start}
    while todo:
        at, far = todo.popleft()
        if _word(at) in _SOFTMAX:
            return True
        if far == steps or (at is not start and (_word(at) in _PRODUCTS or _is_layer(at))):
            continue
        for n in onward(at):
            if n not in seen:
                seen.add(n)
                todo.append((n, far + 1))
    return False


def _stops(user: Node) -> bool:
    return user.op == "output" or _word(user) in _SOFTMAX | _PRODUCTS or _is_layer(user)


def _is_layer(node: Node) -> bool:
    if node.op == "call_function":
        return node.target in (F.linear, F.embedding)
    if node.op != "call_module":
        return False
    root: Any = node.graph.owning_module
    return isinstance(root.get_submodule(str(node.target)), (nn.Linear, nn.Embedding))


def _name_gated(roles: dict[str, set[int]], read: _Read) -> None:
    """Names the two parts of `act(gate) * up`."""
    open_ = [r for r in roles if r.startswith("?")]
    if len(roles) != 2 or len(open_) != 2:
        return
    nodes = {r: {at for rows, uses in read if rows <= roles[r] for at, _ in uses} for r in open_}
    for gate, up in (open_, open_[::-1]):
        active = {u for at in nodes[gate] for u in _activated(at)}
        for act in active:
            for product in act.users:
                factors = set(product.all_input_nodes)
                if _word(product) in _FACTORS and factors & nodes[up]:
                    roles["gate"], roles["up"] = roles.pop(gate), roles.pop(up)
                    return


def _activated(at: Node) -> Iterator[Node]:
    for user in at.users:
        if _word(user) in _ACTIVATIONS or _is_activation(user):
            yield user
        elif _word(user) in _KEEPS:
            yield from _activated(user)


def _is_activation(node: Node) -> bool:
    """Says whether a called module maps every element by itself: no parameters, the same shape."""
    if node.op != "call_module":
        return False
    root: Any = node.graph.owning_module
    module = root.get_submodule(str(node.target))
    same = node.meta.get("shape") == node.all_input_nodes[0].meta.get("shape")
    kept = isinstance(module, (nn.Dropout, nn.Identity))
    return same and not kept and not any(True for _ in module.parameters())


def _word(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if node.target is operator.getitem:
            return "getitem"
        return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    return ""
