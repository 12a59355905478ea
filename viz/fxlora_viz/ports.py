"""Folded panels -> panels in which one tower reads another through a named port, not a long arrow.

A decoder's every layer reads the end of the encoder. Drawn as arrows, that pushes the decoder below
the encoder and fills the sheet with lines across it; with ports the towers stand side by side.
"""

from __future__ import annotations

from dataclasses import replace

import networkx as nx

from fxlora_viz.names import clean, tensor
from fxlora_viz.picture import Arrow, Item, Panel


def with_ports(panel: Panel) -> Panel:
    """Returns a panel with a port in every block that reads from another tower.

    Args:
        panel: folded; not changed.
    """
    towers = {key: _chain(panel, key)[-1:] for key in panel.items}
    graph = nx.DiGraph((a.source, a.target) for a in panel.arrows)
    beside: dict[tuple[str, str], bool] = {}
    moved: dict[tuple[str, str], list[Arrow]] = {}
    for a in panel.arrows:
        source, target = towers[a.source], towers[a.target]
        if not source or not target or source == target:
            continue
        block = next((b for b in _chain(panel, a.target) if panel.boxes[b].kind != "module"
                      and panel.boxes[b].kind != "site"), "")  # fmt: skip
        modules = panel.boxes[source[0]].kind == panel.boxes[target[0]].kind == "module"
        pair = (a.source, target[0])
        if block and modules and pair not in beside:
            below = nx.descendants(graph, a.source)
            beside[pair] = any(k not in below for k, t in towers.items() if t == target)
        if block and modules and beside[pair]:
            moved.setdefault((a.source, block), []).append(a)
    if not moved:
        return panel
    return _replaced(panel, moved)


def _replaced(panel: Panel, moved: dict[tuple[str, str], list[Arrow]]) -> Panel:
    home, arrows = dict(panel.home), list(panel.arrows)
    before: dict[str, list[Item]] = {}
    for (source, block), through in moved.items():
        port = _port(panel.items[source], block, any(a.grad for a in through))
        first = next(k for k in panel.items if any(a.target == k for a in through))
        before.setdefault(first, []).append(port)
        home[port.key] = block
        arrows = [a for a in arrows if a not in through]
        arrows.append(Arrow(source, port.key, "", port.grad, far=True))
        arrows += [replace(a, source=port.key) for a in through]
    items: dict[str, Item] = {}
    for key, item in panel.items.items():
        items.update((p.key, p) for p in before.get(key, ()))
        items[key] = item
    return replace(panel, items=items, arrows=arrows, home=home)


def _port(source: Item, block: str, grad: bool) -> Item:
    name = source.site or source.path or source.title
    text = tensor(source.shape, source.dtype)
    return Item(
        f"port:{block}:{source.key}", "entry", f"from {clean('.'.join(name.split('.')[-2:]), 60)}",
        (text,) if text else (), shape=source.shape, dtype=source.dtype, grad=grad,
        path=source.path, type="a value of another part of the model",
    )  # fmt: skip


def _chain(panel: Panel, key: str) -> list[str]:
    """Returns the boxes around an item, innermost first."""
    found, at = [], panel.home.get(key, "")
    while at:
        found.append(at)
        at = panel.boxes[at].parent
    return found
