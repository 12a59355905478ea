"""Which rows of a layer's output a product is added to: fxlora's add_rows, and what export makes of it.

add_rows(y, d, blocks, -1)                    as fxlora inserts it
cat(y[:s], y[s:e] + d, y[e:]), -1)            exported, one block of rows
index_add(y, -1, rows, d)                     exported, rows interleaved by head
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxlora.recognise.reading import name_of

INTO_ROWS = frozenset(("add_rows", "index_add"))
PARTS = frozenset(("narrow", "slice"))
_NO_END = 2**62  # torch.export writes 2**63 - 1 for an open slice
Span = tuple[int, int]


def rows_added(node: Node, dim: int) -> tuple[range, ...] | None:
    """Returns the rows an `add_rows` along a dimension adds to; None for an index computed later.

    Raises:
        ValueError: when it adds along another dimension.
    """
    if name_of(node) == "index_add":
        if node.args[1] != dim:
            raise ValueError(f"rows along {node.args[1]}, not {dim}")
        return None
    if node.kwargs.get("dim") != dim:
        raise ValueError(f"rows along {node.kwargs.get('dim')}, not {dim}")
    blocks: Any = node.kwargs["blocks"]
    return tuple(range(s + i * step, s + i * step + width)
                 for s, width, step, count in blocks for i in range(count))  # fmt: skip


def sides(node: Node) -> tuple[Any, Any]:
    """Returns what rows are added to, and what is added."""
    return node.args[0], node.args[3 if name_of(node) == "index_add" else 1]


def narrowed(node: Node, span: Span | None) -> tuple[Node, Span] | None:
    """Follows some last coordinates of a node one node back, through a slice or a concatenation.

    Args:
        node: a slice or a concatenation along the last dimension.
        span: which of its coordinates; None for all.
    """
    name = name_of(node)
    if name in PARTS:
        source, dim, start, end = (*node.args, None)[:4] if len(node.args) > 2 else (None,) * 4
        if not isinstance(source, Node) or not isinstance(start, int) or not _is_last(node, dim):
            return None
        if name == "narrow" and isinstance(end, int):
            end = start + end
        size = _size(source)
        if not isinstance(end, int) or end < 0 or start < 0 or len(node.args) > 4 or size is None:
            return None
        end = size if end > _NO_END else min(end, size)
        return source, (start, end) if span is None else (start + span[0], start + span[1])
    if name == "cat" and span is not None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return _in_one(list(node.args[0]), span) if _is_last(node, dim) else None  # type: ignore[arg-type]
    return None


def _in_one(joined: list[Any], span: Span) -> tuple[Node, Span] | None:
    at = 0
    for one in joined:
        size = _size(one)
        if size is None:
            return None
        if at <= span[0] and span[1] <= at + size and span[0] < at + size:
            return one, (span[0] - at, span[1] - at)
        at += size
    return None


def _is_last(node: Node, dim: Any) -> bool:
    value = node.meta.get("val")
    return dim == -1 or (isinstance(value, torch.Tensor) and dim == value.dim() - 1)


def _size(node: Any) -> int | None:
    """Returns the last size of an exported tensor, where it is a number."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None
