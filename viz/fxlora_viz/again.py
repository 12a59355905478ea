"""Folded panels -> panels in which blocks equal to ones drawn already are one node that says so.

Layers that alternate (five with a sliding window, one without, five, one, ...) fold into short runs,
each drawn in full: a sheet of fifteen thousand points that shows two pictures over and over.
"""

from __future__ import annotations

from dataclasses import replace

from fxlora_viz.names import quantity
from fxlora_viz.picture import Arrow, Box, Item, Panel

_NAMED = 12  # runs the tooltip names


def again(panel: Panel) -> Panel:
    """Returns a panel in which every block that is equal to an earlier one is part of a card.

    Args:
        panel: folded; `Box.same_as` names the earlier block. Not changed.
    """
    repeats = {k: b for k, b in panel.boxes.items() if b.same_as}
    if not repeats:
        return panel
    owner = {key: _outermost(panel, home, repeats) for key, home in panel.home.items()}
    card_of: dict[str, str] = {}  # repeated box -> key of its card
    cards: dict[str, list[Box]] = {}
    current = ""
    for key in panel.items:  # in execution order: neighbours share a card
        box = owner.get(key, "")
        if not box:
            current = ""
            continue
        if box not in card_of:
            if not current or cards[current][0].parent != repeats[box].parent:
                current = f"again:{box}"
            card_of[box] = current
            cards.setdefault(current, []).append(repeats[box])
        current = card_of[box]
    items: dict[str, Item] = {}
    home = {}
    for key, item in panel.items.items():
        card = card_of.get(owner.get(key, ""), "")
        if not card:
            items[key] = item
            if key in panel.home:
                home[key] = panel.home[key]
        elif card not in items:
            items[card] = _card(card, cards[card], panel, item)
            home[card] = cards[card][0].parent
    into = {k: card_of[b] for k, b in owner.items() if b}
    return replace(
        panel,
        items=items,
        arrows=moved(panel.arrows, into),
        boxes={k: b for k, b in panel.boxes.items() if not _outermost(panel, k, repeats)},
        home=home,
    )


def _outermost(panel: Panel, home: str, repeats: dict[str, Box]) -> str:
    """Returns the outermost repeated box around a place; "" for none."""
    found = ""
    while home:
        found = home if home in repeats else found
        home = panel.boxes[home].parent
    return found


def moved(arrows: list[Arrow], into: dict[str, str]) -> list[Arrow]:
    """Returns arrows with their ends moved, each pair of ends once, and none within one item.

    Args:
        arrows: read.
        into: item key -> key of the item that now stands for it.
    """
    found: dict[tuple[str, str], Arrow] = {}
    for a in arrows:
        source, target = into.get(a.source, a.source), into.get(a.target, a.target)
        if source != target:
            label = "" if (source, target) != (a.source, a.target) else a.label
            before = found.get((source, target))
            if before is None or (a.grad and not before.grad):
                found[source, target] = replace(a, source=source, target=target, label=label)
    return list(found.values())


def _card(key: str, boxes: list[Box], panel: Panel, first: Item) -> Item:
    counts: dict[tuple[str, str, str], int] = {}
    for box in boxes:
        shown = (box.same_as, box.lacks, box.differs)
        counts[shown] = counts.get(shown, 0) + box.count
    lines: list[str] = []
    for (same, lacks, differs), n in counts.items():
        lines.append(f"{n} as {panel.boxes[same].label}")
        lines += [f"without {lacks}"] if lacks else []
        lines += [differs] if differs else []
    held, trains = _held(panel, boxes)
    if any(box.differs for box in boxes):
        more = f", {quantity(trains)} train" if trains else ""
        lines.append(f"{quantity(held)} params{more}")
    said = [f"{b.label} as {panel.boxes[b.same_as].label}" for b in boxes]
    more = f"; … {len(said) - _NAMED} more" if len(said) > _NAMED else ""
    name, last = boxes[0].label.partition(" … ")[0], boxes[-1].label
    end = last.rpartition(" … ")[2].rpartition(".")[2]
    title = last if len(boxes) == 1 else f"{name} … {end}"
    path = boxes[0].key.partition(":")[2]
    return Item(
        key, "again", title, tuple(lines), first.frames[: _depth(first, path)], path,
        boxes[0].note.removesuffix(", identical"), shape=first.shape, dtype=first.dtype,
        grad=any(i.grad for i in panel.items.values()) or None,
        note="; ".join(said[:_NAMED]) + more, count=sum(box.count for box in boxes), held=(held, trains),
        shown=tuple(dict.fromkeys(box.same_as for box in boxes)),
    )  # fmt: skip


def _held(panel: Panel, boxes: list[Box]) -> tuple[int, int]:
    """Returns how many parameters some blocks have, and how many of them train."""
    within = {box.key for box in boxes}
    weights: dict[str, tuple[int, bool]] = {}
    held, trained = 0, 0
    for key, item in panel.items.items():
        times, inside, at = 1, False, panel.home.get(key, "")
        while at:
            box = panel.boxes[at]
            # One module that is called several times has its parameters once; it has one name.
            times *= box.count if " … " in box.label else 1
            inside = inside or at in within
            at = panel.boxes[at].parent
        if inside:
            weights |= {w.name: (w.count * times, w.trainable) for w in item.weights}
            held, trained = held + item.held[0] * times, trained + item.held[1] * times
    return (
        held + sum(n for n, _ in weights.values()),
        trained + sum(n for n, trains in weights.values() if trains),
    )


def _depth(item: Item, path: str) -> int:
    return next((n for n, (p, _) in enumerate(item.frames) if p == path), len(item.frames))
