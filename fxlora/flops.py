"""Floating-point operations of every call of a site, from the shapes on the nodes; nothing is run.

A linear map costs 2 * in * out for every vector it reads, a convolution 2 * (in / groups) * kernel
for every number it writes, an embedding nothing. A dimension that follows an input is worked out
from the sizes of the example inputs, or from those the caller names.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxlora.errors import ConfigError
from fxlora.facts import info
from fxlora.layers import is_conv
from fxlora.sites import Call, Site
from fxlora.trace import examples
from fxlora.trace.guards import _FUNCTIONS

_BATCH, _LENGTH = examples.BATCH, examples.LENGTH
_ORIGIN = re.compile(r"(?P<name>.+)\.size\((?P<dim>\d+)\)")
_EINSUM = (torch.functional.einsum, torch.einsum)


def example_sizes(traced: GraphModule, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns a number for every symbol in the shapes of a traced graph.

    A transformers model is taken at the sizes of its example inputs; any other at a batch of 2 and
    16 for every further dimension, moved until the conditions of the trace hold.

    Args:
        traced: what `fxlora.trace` returned; read.
        given: sizes to use instead, by symbol (`"s1"`) or by input (`"input_ids.size(1)"`).

    Raises:
        ConfigError: when `given` names no size of the graph.

    >>> import torch, fxlora
    >>> traced = fxlora.trace(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(3, 4),))
    >>> example_sizes(traced)["s0"], example_sizes(traced, {"input.size(0)": 8})["s0"]
    (2, 8)
    """
    facts = info(traced)
    origins = dict(facts.sizes)
    for symbol, origin in _placeholder_symbols(traced):
        origins.setdefault(symbol, origin)
    found = _from_examples(facts.model, origins)
    fixed = _named(given or {}, origins)
    free = [s for s in origins if s not in found and s not in fixed]
    start = {s: _BATCH if origins[s].endswith(".size(0)") else _LENGTH for s in free}
    return _admitted({**start, **found, **fixed}, free, facts.guards)


def _placeholder_symbols(traced: GraphModule) -> Iterable[tuple[str, str]]:
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            for dim, size in enumerate(node.meta.get("shape") or ()):
                if isinstance(size, str) and size.isidentifier():
                    yield size, f"{node.target}.size({dim})"


def _from_examples(model: Any, origins: Mapping[str, str]) -> dict[str, int]:
    if not examples.is_transformers(model):
        return {}
    try:
        inputs = examples.inputs(model)
    except Exception:  # noqa: BLE001 - no example is no reason to fail: the default sizes remain
        return {}
    found = {}
    for symbol, origin in origins.items():
        parts = _ORIGIN.fullmatch(origin)
        value = inputs.get(parts["name"]) if parts else None
        if parts and isinstance(value, torch.Tensor) and int(parts["dim"]) < value.dim():
            found[symbol] = value.size(int(parts["dim"]))
    return found


def _named(given: Mapping[str, int], origins: Mapping[str, str]) -> dict[str, int]:
    by_origin = {origin: symbol for symbol, origin in origins.items()}
    found = {}
    for key, value in given.items():
        symbol = by_origin.get(key, key)
        if symbol not in origins:
            raise ConfigError(
                f"sizes={key!r}: the graph has no such size; it has "
                f"{', '.join(f'{s} ({o})' for s, o in origins.items()) or 'fixed sizes only'}"
            )
        found[symbol] = int(value)
    return found


def _admitted(sizes: dict[str, int], free: list[str], guards: Iterable[str]) -> dict[str, int]:
    """Moves the sizes nobody named until the conditions of the trace hold, if a few tries do it."""
    conditions = [g for g in guards if any(re.search(rf"\b{s}\b", g) for s in free)]
    if not conditions:
        return sizes
    asked = sorted({int(n) for g in conditions for n in re.findall(r"(?<![\w.])\d+", g)})
    tries = [[sizes[s], *(n for n in asked if n > 0), 1, 4, 32, 64] for s in free[:4]]
    for values in itertools.islice(itertools.product(*tries), 2000):
        moved = {**sizes, **dict(zip(free, values, strict=False))}
        if all(_holds(g, moved) for g in conditions):
            return moved
    return sizes


def _holds(condition: str, sizes: Mapping[str, int]) -> bool:
    try:
        return bool(_evaluated(condition, sizes))
    except (NameError, ZeroDivisionError):
        return True  # it speaks of something else, too


def _evaluated(text: str, sizes: Mapping[str, int]) -> Any:
    # The text is the trace's own rendering of a size, never a user's.
    return eval(text, {"__builtins__": {}, **_FUNCTIONS}, dict(sizes))


def numel(shape: Iterable[int | str], sizes: Mapping[str, int]) -> int:
    """Returns how many numbers a shape holds at given sizes.

    >>> numel(("s0", "s0*2 + 1", 3), {"s0": 2})
    30
    """
    return math.prod(d if isinstance(d, int) else int(_evaluated(d, sizes)) for d in shape)


def call_flops(site: Site, call: Call, sizes: Mapping[str, int]) -> int | None:
    """Returns the operations one call of a site costs; None where the graph knows no shape of it.

    Args:
        site: the site.
        call: one of its calls.
        sizes: symbol -> size, as `example_sizes` returns them.
    """
    if site.kind == "Embedding":
        return 0
    try:
        whole = _flops(site, call.node, sizes)
    except (NameError, IndexError, TypeError, KeyError):
        return None
    if whole is None or not site.rows:
        return whole
    # A part of a fused layer has its share of what the call writes.
    return whole * sum(map(len, site.rows)) // whole_out_features(site)


def whole_out_features(site: Site) -> int:
    """Returns the output features of the layer a site is, or is a part of."""
    if not site.rows:
        return site.out_features
    return site.shape[1 if site.kind == "Conv1D" else 0]


def site_flops(site: Site, sizes: Mapping[str, int]) -> int:
    """Returns the operations all calls of a site cost; a call of unknown shape counts for nothing."""
    return sum(call_flops(site, call, sizes) or 0 for call in distinct_calls(site))


def distinct_calls(site: Site) -> tuple[Call, ...]:
    """Returns a site's calls, one for each node: attention reads two weights of one site in one."""
    by_node: dict[Node, Call] = {}
    for call in site.calls:
        if call.node not in by_node or call.through_module:
            by_node[call.node] = call
    return tuple(by_node.values())


def _flops(site: Site, node: Node, sizes: Mapping[str, int]) -> int | None:
    if node.target is F.multi_head_attention_forward:
        return _attention(site, node, sizes)
    out = node.meta.get("shape")
    if is_conv(site.kind):
        return None if out is None else 2 * numel(out, sizes) * math.prod(site.shape[1:])
    if node.op == "call_module":
        if out is not None:
            return 2 * numel(out, sizes) * site.in_features
        given = _shape(next(iter(node.all_input_nodes), None))  # a subclass that returns a tuple
        return None if given is None else 2 * numel(given, sizes) * site.out_features
    if node.target in _EINSUM:
        return _einsum(node, sizes)
    inner = _contracted(node)
    if out is None or inner is None:
        return None
    return 2 * numel(out, sizes) * numel((inner,), sizes)


def _shape(node: Any) -> Any:
    return node.meta.get("shape") if isinstance(node, Node) else None


def _contracted(node: Node) -> int | str | None:
    """Returns the size of the dimension a product sums over: the last one of its left factor."""
    name = str(getattr(node.target, "__name__", node.target))
    left = 1 if name in ("addmm", "baddbmm", "addbmm", "addmv") else 0
    shape = _shape(node.args[left]) if left < len(node.args) else _shape(node.kwargs.get("input"))
    return shape[-1] if shape else None


def _attention(site: Site, node: Node, sizes: Mapping[str, int]) -> int | None:
    # torch's function projects query, key and value with one weight, and its result with another.
    shapes = [_shape(a) for a in node.args[:3]]
    if any(s is None for s in shapes):
        return None
    if site.kind != "MultiheadAttention":
        return 2 * numel(shapes[0], sizes) * site.out_features
    return sum(2 * numel(s, sizes) * (whole_out_features(site) // 3) for s in shapes)


def _einsum(node: Node, sizes: Mapping[str, int]) -> int | None:
    """Returns the cost of one contraction: a multiplication and an addition per index tuple."""
    equation, operands = node.args[0], node.args[1:]
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    index: dict[str, int | str] = {}
    for letters, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        shape = _shape(operand)
        if shape is None:
            return None
        index.update(zip(letters.strip(), shape, strict=True))
    return 2 * numel(index.values(), sizes)
