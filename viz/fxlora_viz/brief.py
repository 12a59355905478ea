"""Folded panels -> panels that fit one sheet: near-equal blocks are cards, what nothing adapts is closed.

A sheet of two hundred nodes is not read. What it then shows in full is what LoRA does: the sites and
what lies between them. The rest is summed up, and says what it stands for; the steps are taken in
turn, and only while the sheet is too full. `detail="full"` draws everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fxlora_viz.again import again, moved
from fxlora_viz.looks import likeness, look
from fxlora_viz.names import clean, quantity
from fxlora_viz.picture import Box, Item, Panel, inside

Look = Callable[[Item, str], tuple[Any, ...]]
SHEET = 120  # nodes that still make one readable sheet
_LACKS = 2  # parts a block may lack and still be shown by another one
_STAGE = 6  # a stage of fewer parts is drawn: a card would say as much


def brief(panels: list[Panel], sheet: int = SHEET) -> list[Panel]:
    """Returns the panels of one sheet, summed up as far as they need be to have `sheet` nodes.

    Args:
        panels: folded; not changed.
        sheet: how many nodes are not too many.
    """
    steps: tuple[Callable[[list[Panel]], list[Panel]], ...] = (
        _near_equal,
        _untouched,
        _other_sizes,
    )
    for step in steps:
        if sum(len(p.items) for p in panels) <= sheet:
            break
        panels = step(panels)
    return panels


# ---- blocks that another one shows but for a part ------------------------------------------------


def _near_equal(panels: list[Panel]) -> list[Panel]:
    """Makes a card of a block whose parts are all in an earlier one, which has one or two more."""
    return _cards(panels, look, lambda box, other: _counts(panels[0], box, other))


def _cards(
    panels: list[Panel],
    looks: Look,
    differs: Callable[[Box, Box], str],
    least: int = 0,
) -> list[Panel]:
    """Makes a card of a block, of so many parts, that all look like parts of an earlier block."""
    found: dict[str, dict[str, Any]] = {}
    # What a card refers to must go on being drawn.
    named = {k for p in panels for i in p.items.values() for k in i.shown}
    for key, box in panels[0].boxes.items():
        if box.kind not in ("fold", "block") or not all(key in p.boxes for p in panels):
            continue
        if key in named or len(_looks(panels[0], key, looks)) < least:
            continue
        for other in panels[0].boxes.values():
            if other.key == key:
                break
            if other.key in found or not _are_siblings(box, other):
                continue
            lacks = [_lacks(p, key, other.key, looks) for p in panels]
            if None not in lacks:
                names = dict.fromkeys(n for of in lacks if of for n in of)
                found[key] = {
                    "same_as": other.key,
                    "lacks": ", ".join(names),
                    "differs": differs(box, other),
                }
                break
    return [
        again(replace(p, boxes={k: replace(b, **found.get(k, {})) for k, b in p.boxes.items()}))
        for p in panels
    ]


def _are_siblings(box: Box, other: Box) -> bool:
    kinds = ("fold", "block")
    same_class = box.note.partition(",")[0] == other.note.partition(",")[0]
    return other.kind in kinds and other.parent == box.parent and same_class


def _lacks(panel: Panel, key: str, other: str, looks: Look) -> list[str] | None:
    """Returns the titles of what a block lacks; None when the other one does not show it."""
    mine, theirs = _looks(panel, key, looks), _looks(panel, other, looks)
    if Counter(look for _, look in mine) - Counter(look for _, look in theirs):
        return None
    left = Counter(look for _, look in theirs) - Counter(look for _, look in mine)
    lacking = []
    for item, look_ in theirs:
        if left[look_] > 0:
            left[look_] -= 1
            lacking.append(item)
    plain = all(not i.role and not i.site and not i.whole for i in lacking)
    return [i.title for i in lacking] if plain and len(lacking) <= _LACKS else None


def _looks(panel: Panel, key: str, looks: Look) -> list[tuple[Item, tuple[Any, ...]]]:
    within = inside(panel, key)
    path = key.partition(":")[2].partition("#")[0]
    labels: dict[str, list[str]] = {}  # a scaling is written on an arrow
    for a in panel.arrows:
        if a.label and a.source in within and a.target in within:
            labels.setdefault(a.target, []).append(a.label)
    found = []
    for k in panel.items:
        item = panel.items[k]
        # Which flags of the gradient differ along a stack is said on the nodes, and makes no layer.
        seen = looks(item, path) if k in within and item.kind != "entry" else ()
        if seen:
            found.append((item, (*seen, *sorted(labels.get(k, ())))))
    return found


# ---- stages --------------------------------------------------------------------------------------


def _other_sizes(panels: list[Panel]) -> list[Panel]:
    """Makes a card of a stage that is an earlier one at other widths, or with more blocks."""

    def differs(box: Box, other: Box) -> str:
        mine, theirs = (Counter(_sizes(panels[0], b.key)) for b in (box, other))
        sizes = "at other sizes" if mine - theirs else ""
        return ", ".join(filter(None, (sizes, _counts(panels[0], box, other))))

    return _cards(panels, likeness, differs, _STAGE)


def _sizes(panel: Panel, key: str) -> Iterator[tuple[Any, ...]]:
    for item, _ in _looks(panel, key, likeness):
        yield tuple(w.shape for w in item.weights)


def _counts(panel: Panel, box: Box, other: Box) -> str:
    """Says how many blocks a stage has of each list of which the other has more or fewer."""
    mine, theirs = _blocks(panel, box.key), _blocks(panel, other.key)
    return ", ".join(f"{n} {name}" for name, n in mine.items() if n != theirs[name])


def _blocks(panel: Panel, key: str) -> Counter[str]:
    """Returns how many blocks of each list a stage has, drawn or on a card."""
    found: Counter[str] = Counter()
    for box in panel.boxes.values():
        if box.parent == key and box.kind in ("fold", "block"):
            found[box.label.partition(".")[0]] += box.count
    for item_key, item in panel.items.items():
        if item.kind == "again" and panel.home.get(item_key) == key:
            found[item.title.partition(".")[0]] += item.count
    return found


# ---- modules that nothing adapts -----------------------------------------------------------------


def _untouched(panels: list[Panel]) -> list[Panel]:
    """Closes every module, outermost first, in which no panel has a site or a mark."""
    named = [k for k, b in panels[0].boxes.items() if b.kind == "module"]
    shut = [k for k in named if all(_is_untouched(p, k) for p in panels)]
    return [_closed(p, shut) for p in panels]


def _is_untouched(panel: Panel, key: str) -> bool:
    if key not in panel.boxes:
        return False
    items = [panel.items[k] for k in inside(panel, key)]
    holds = {b.kind for k, b in panel.boxes.items() if _is_below(panel, k, key)}
    if len(items) < 2 or holds & {"fold", "block", "site"}:
        return False
    return not any(
        i.role or i.site or i.whole or i.verdict or i.kind in ("again", "input", "output", "entry")
        for i in items
    )


def _is_below(panel: Panel, key: str, top: str) -> bool:
    at = panel.boxes[key].parent
    while at and at != top:
        at = panel.boxes[at].parent
    return at == top


def _closed(panel: Panel, shut: list[str]) -> Panel:
    outermost = [k for k in shut if not any(_is_below(panel, k, other) for other in shut)]
    owner = {item: key for key in outermost for item in inside(panel, key)}
    items: dict[str, Item] = {}
    home = {k: h for k, h in panel.home.items() if k not in owner}
    for key, item in panel.items.items():
        box = owner.get(key)
        if box is None:
            items[key] = item
        elif f"closed:{box}" not in items:
            parts = [panel.items[k] for k in panel.items if owner.get(k) == box]
            items[f"closed:{box}"] = _sum(panel, panel.boxes[box], parts)
            home[f"closed:{box}"] = panel.boxes[box].parent
    into = {k: f"closed:{b}" for k, b in owner.items()}
    gone = {
        k for k in panel.boxes if k in outermost or any(_is_below(panel, k, o) for o in outermost)
    }
    return replace(
        panel,
        items=items,
        home=home,
        boxes={k: b for k, b in panel.boxes.items() if k not in gone},
        arrows=moved(panel.arrows, into),
    )


def _sum(panel: Panel, box: Box, parts: list[Item]) -> Item:
    path = box.key.partition(":")[2].partition("#")[0]
    cls = panel.types.get(path)
    weights = tuple(dict.fromkeys(w for i in parts for w in i.weights))
    count = sum(w.count for w in weights)
    name = clean(cls.__name__, 60) if cls is not None else ""
    lines = tuple(t for t in (name, f"{quantity(count)} params" if count else "") if t)
    last = parts[-1]
    frames = next(
        (i.frames[: n + 1] for i in parts for n, f in enumerate(i.frames) if f[0] == path), ()
    )
    return Item(
        f"closed:{box.key}", "module", box.label, lines, frames, path, name,
        shape=last.shape, dtype=last.dtype, grad=last.grad, weights=weights,
        members=tuple(m for i in parts for m in i.members),
        tags=tuple(dict.fromkeys(t for i in parts for t in i.tags)),
        note=f"nothing in it is adapted; {len(parts)} nodes, drawn one by one with detail='full'",
    )  # fmt: skip
