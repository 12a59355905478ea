"""The words on an item: its title, its lines, and the facts in its tooltip."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxlora_viz import ops
from fxlora_viz.grouping import Group
from fxlora_viz.names import clean, number, quantity, tensor, times
from fxlora_viz.parts import part_name, plain_name
from fxlora_viz.picture import Item, Weight
from fxlora_viz.reading import Reading

_ROLES = {
    "base": "W",
    "lora_A": "A",
    "diagonal": "d",
    "lora_B": "B",
    "magnitude": "m",
    "rows": "rows",
}
_SIGNS = {"sum": "+", "delta": "@"}
_ADAPTER = 24  # letters of an adapter's name on a node; the tooltip has all of it
_PLAIN = ("Linear", "Embedding")  # classes whose shape already says what they are


def describe(group: Group, reading: Reading, inputs: int) -> Item:
    """Returns the item of a group.

    Args:
        group: what is drawn.
        reading: the graph it is part of.
        inputs: how many arrows will end at it.
    """
    last = group.members[-1]
    weights = _weights(group, reading)
    kind, title, lines = _caption(group, reading, weights, inputs)
    result = _result(group)
    site = last.meta.get("layer", last.meta.get("site", "")) if group.kind == "role" else ""
    return Item(
        group.key,
        kind,
        clean(title, 200),
        tuple(clean(line, 200) for line in lines if line),
        group.frames,
        group.path,
        _type(group, reading),
        result.meta.get("shape"),
        result.meta.get("dtype"),
        reading.grad.get(result),
        weights,
        group.name if group.kind == "role" else "",
        str(site),
        str(last.meta.get("adapter", "")) if site else "",
        clean(
            next((n.meta["source"].short for n in group.members if n.meta.get("source")), ""), 200
        ),
        tuple(n.name for n in group.members),
        note=_rows_note(group),
        whole=group.saved,
    )


def _caption(
    group: Group, reading: Reading, weights: tuple[Weight, ...], inputs: int
) -> tuple[str, str, tuple[str, ...]]:
    node = group.members[0]
    if group.kind == "input":
        text = tensor(node.meta.get("shape"), node.meta.get("dtype"))
        return "input", str(node.target), (text,)
    if group.kind == "role":
        if group.name in _SIGNS:
            return "circle", _SIGNS[group.name], ()
        return "module", _role_title(group, reading), _role_lines(group, weights)
    if group.kind == "parameter":
        return "parameter", _parameter_title(plain_name(node)), _shape_lines(weights, True)
    if group.kind == "module":
        return "module", _module_title(group, reading), _module_lines(group, reading, weights)
    if group.kind == "op":
        return _operation(node, inputs)
    return "op", *_helper(group)


def _role_title(group: Group, reading: Reading) -> str:
    title = _ROLES[group.name]
    part = part_name(group.members[0])
    if part and not part.startswith("call_"):
        title = f"{title} · {clean(part, _ADAPTER)}"
    if group.name == "base" or len(reading.info.active) < 2:
        return title
    # Two pairs of A and B behind one W: only the adapter's name tells them apart.
    return f"{title} · {clean(group.members[0].meta.get('adapter', ''), _ADAPTER)}"


def _role_lines(group: Group, weights: tuple[Weight, ...]) -> tuple[str, ...]:
    if group.name == "magnitude":
        return "DoRA", _count(weights)
    if group.name == "rows" and weights:
        rows = weights[0].shape[0]
        said = "1 row trains" if rows == 1 else f"{rows} rows train"
        return said, _count(weights)
    return _shape_lines(weights, group.name in ("base", "diagonal"))


def _rows_note(group: Group) -> str:
    """Says which rows of an embedding train."""
    for node in group.members[:1] if group.name == "rows" else ():
        for put in (u for cast in node.users for u in cast.users):
            index: Any = put.kwargs.get("index")
            while isinstance(index, Node) and index.args and isinstance(index.args[0], Node):
                index = index.args[0]
            if isinstance(index, Node) and index.args:
                return clean(f"rows {index.args[0]} of W train", 120)
    return ""


def _parameter_title(name: str) -> str:
    owner, _, tail = name.rpartition(".")
    # `weight` alone says nothing; a parameter with a name of its own does.
    owner = owner.rpartition(".")[2]
    return f"{owner}.{tail}" if tail in ("weight", "bias") and owner else tail


def _module_title(group: Group, reading: Reading) -> str:
    tail = group.path.rpartition(".")[2]
    if not tail.isdigit():
        return tail
    # A bare number says nothing: `0 · Linear` in a Sequential at the top, `layers.0` below.
    parent = group.path.rpartition(".")[0].rpartition(".")[2]
    return f"{parent}.{tail}" if parent else f"{tail} · {reading.type_name(group.path)}"


def _module_lines(group: Group, reading: Reading, weights: tuple[Weight, ...]) -> tuple[str, ...]:
    name = reading.type_name(group.path)
    shown = "" if " · " in _module_title(group, reading) else name
    if not weights:
        return (shown,)
    main = max(weights, key=lambda w: w.count)
    total = _count(weights)
    if len(weights) > 2 or ({n.op for n in group.members} - {"call_module"} and len(weights) > 1):
        return (name, total if total.endswith("params") else f"{total} params")
    if len(main.shape) < 2:
        return (f"{shown} {times(main.shape)}".strip(),)
    if name == "Embedding":
        return (f"{times(main.shape)} · {total}",)
    if name in _PLAIN:
        return (times(main.shape), total)
    return (shown, f"{times(main.shape)} · {total}")


def _shape_lines(weights: tuple[Weight, ...], count: bool) -> tuple[str, ...]:
    if not weights:
        return ()
    main = max(weights, key=lambda w: w.count)
    if len(main.shape) < 2 and count:
        return (_count(weights),)
    lines = (times(main.shape),)
    return (*lines, _count(weights)) if count else lines


def _count(weights: tuple[Weight, ...]) -> str:
    """Returns `16.8 M`; a small count says what it counts."""
    text = quantity(sum(w.count for w in weights))
    return f"{text} params" if text.isdigit() else text


def _operation(node: Node, inputs: int) -> tuple[str, str, tuple[str, ...]]:
    sign = ops.symbol(node)
    if ops.is_circle(sign):
        if inputs > 1:
            return "circle", sign, ()
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        if numbers:
            return "op", f"{sign} {number(numbers[0])}", ()
        if inputs == 1 and len(node.args) == 2 and node.args[0] is node.args[1]:
            return "circle", sign, ()
    return "op", ops.title(node), (_heads(node),)


def _helper(group: Group) -> tuple[str, tuple[str, ...]]:
    by_name = {ops.name_of(n): n for n in group.members}
    if "scaled_dot_product_attention" in by_name:
        return "sdpa", (_heads(by_name["scaled_dot_product_attention"]),)
    if "softmax" in by_name and "matmul" in by_name:
        return "attention", (_heads(by_name["softmax"]),)
    if not group.name:
        return "forward", (f"{len(group.members)} operations",)
    return group.name.strip("_"), ()


def _heads(node: Node) -> str:
    """Returns `32 heads · 8 KV` of an attention call whose shapes are known."""
    name = ops.name_of(node)
    if name not in ("scaled_dot_product_attention", "softmax"):
        return ""
    shapes = [a.meta.get("shape") for a in node.args[:2] if isinstance(a, Node)]
    counts = [s[-3] for s in shapes if s is not None and len(s) == 4 and isinstance(s[-3], int)]
    if not counts:
        return ""
    if name == "softmax" or len(counts) < 2 or counts[0] == counts[1]:
        return f"{counts[0]} heads"
    return f"{counts[0]} heads · {counts[1]} KV"


def _result(group: Group) -> Node:
    """Returns the node whose value leaves the group: the last one that is read outside."""
    inside = set(group.members)
    for node in reversed(group.members):
        if any(u not in inside for u in node.users):
            return node
    return group.members[-1]


def _type(group: Group, reading: Reading) -> str:
    if group.kind in ("module", "role"):
        return reading.type_name(group.path) or ("Parameter" if group.kind == "role" else "")
    if group.kind in ("op", "helper"):
        return ops.name_of(group.members[0]) if group.kind == "op" else group.name or "forward"
    return group.kind


def _weights(group: Group, reading: Reading) -> tuple[Weight, ...]:
    found: dict[int, Weight] = {}
    for node in group.members:
        for identity, weight in reading.weights(node):
            found.setdefault(identity, weight)
    return tuple(found.values())
