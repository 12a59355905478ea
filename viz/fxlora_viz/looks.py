"""What an item looks like inside its block: equal values, equal pictures."""

from __future__ import annotations

from typing import Any

from fxlora_viz.picture import Item


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith((path + ".", path + "#"))


def likeness(item: Item, block: str) -> tuple[Any, ...]:
    """Returns what a picture shows of an item but for sizes, with its names relative to a block.

    Of a card it is nothing: the blocks it stands for are shown beside it.

    Args:
        item: read.
        block: path of the block.
    """

    def inner(path: str) -> str:
        return path[len(block) :] if _below(path, block) else path

    if item.kind == "again":
        return ()
    title = item.title if item.kind != "module" else ""
    return (
        item.kind, inner(item.path), title, item.type, str(item.dtype), item.role, inner(item.site),
        item.adapter, inner(item.whole), tuple((inner(w.name), w.trainable) for w in item.weights),
        item.verdict, _rank(item),
    )  # fmt: skip


def _rank(item: Item) -> int | None:
    """Returns the rank where an item is the A of an adapter: its rows, whatever it adapts."""
    return int(item.weights[0].shape[0]) if item.role == "lora_A" and item.weights else None


def look(item: Item, block: str) -> tuple[Any, ...]:
    """Returns everything a picture shows of an item, with its names relative to a block.

    Args:
        item: read.
        block: path of the block.
    """

    def inner(path: str) -> str:
        return path[len(block) :] if _below(path, block) else path

    # One batch may go by two symbols that a guard makes equal: which one is no difference.
    dims = (
        None if item.shape is None else tuple(d if isinstance(d, int) else "" for d in item.shape)
    )
    weights = tuple((inner(w.name), w.shape, w.trainable) for w in item.weights)
    title = item.title if item.kind != "module" else ""
    return (
        item.kind, inner(item.path), title, item.type, item.lines, dims, str(item.dtype),
        item.role, inner(item.site), item.adapter, inner(item.whole), weights,
        item.verdict, item.said,
    )  # fmt: skip
