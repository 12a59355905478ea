"""A panel -> the part of it inside one module, with what it reads and feeds at its border."""

from __future__ import annotations

import difflib
from dataclasses import replace

from fxlora_viz.names import clean, tensor
from fxlora_viz.picture import Arrow, Item, Panel


def focus_on(panel: Panel, path: str) -> Panel:
    """Returns the panel of one module (or one site).

    Args:
        panel: an unfolded panel; not changed.
        path: the module's path.

    Raises:
        ValueError: when no drawn node lies inside, with the nearest names.
    """
    inside = {k for k, i in panel.items.items() if _in(i, path)}
    if not inside:
        raise ValueError(_nothing(panel, path))
    items: dict[str, Item] = {}
    arrows: list[Arrow] = []
    border: dict[str, Item] = {}
    for a in panel.arrows:
        if a.source in inside and a.target in inside:
            arrows.append(a)
        elif a.target in inside:
            stub = border.setdefault(f"from:{a.source}", _stub(panel.items[a.source], "input"))
            arrows.append(replace(a, source=stub.key))
        elif a.source in inside:
            stub = border.setdefault(f"to:{a.source}", _stub(panel.items[a.source], "output"))
            arrows.append(replace(a, target=stub.key))
    items.update((i.key, i) for i in border.values() if i.kind == "input")
    items.update((k, _cut(i, path)) for k, i in panel.items.items() if k in inside)
    items.update((i.key, i) for i in border.values() if i.kind == "output")
    once = {(a.source, a.target): a for a in arrows}
    return replace(panel, items=items, arrows=list(once.values()))


def _in(item: Item, path: str) -> bool:
    return item.site == path or item.path == path or any(p == path for p, _ in item.frames)


def _cut(item: Item, path: str) -> Item:
    """Returns an item without the modules around the focus."""
    at = next((n for n, (p, _) in enumerate(item.frames) if p == path), len(item.frames) - 1)
    return replace(item, frames=item.frames[at:])


def _stub(item: Item, kind: str) -> Item:
    name = (item.site or item.path or item.title).rpartition(".")[2]
    text = tensor(item.shape, item.dtype)
    key = item.key.partition(":")[0] if item.role == "sum" else item.key
    return Item(
        f"{kind}:{key}",
        kind,
        clean(name) if kind == "input" else "output",
        (text,) if text else (),
        path=item.path,
        type=item.type,
        shape=item.shape,
        dtype=item.dtype,
        grad=item.grad,
        members=item.members,
    )


def _nothing(panel: Panel, path: str) -> str:
    names = list(dict.fromkeys(p for i in panel.items.values() for p, _ in i.frames))
    near = difflib.get_close_matches(path, names, 3, 0.5) or names[:3]
    return (
        f"focus={path!r} names no module of the graph; did you mean {' or '.join(map(repr, near))}?"
    )
