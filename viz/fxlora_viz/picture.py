"""The parts of a picture before it is laid out: items, arrows, boxes; plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Weight:
    """One parameter an item reads."""

    name: str
    shape: tuple[int, ...]
    trainable: bool
    count: int


@dataclass
class Item:
    """One drawn node: a module call, a group of operations, an input or an output.

    Attributes:
        key: names the item, the same before and after a rewrite.
        kind: "module", "op", "circle", "parameter", "input", "output", "entry" or "again" (blocks
            that are drawn already).
        title: the first, bold line.
        lines: the lines below it.
        frames: the module calls around the item, outermost first; its own call is the last one
            for a module.
        path: module path, or the path of the module around an operation.
        type: class name, or the operation.
        shape: of the result, when the trace knows it.
        dtype: of the result.
        grad: whether gradient reaches the result; None when unknown.
        weights: the parameters read here.
        role: "", or the part of its site (see `fxlora_viz.parts`).
        site: the site the item belongs to after a rewrite.
        adapter: name of the adapter.
        source: the line of the model's code.
        members: names of the fx nodes drawn as this item.
        tags: names of what is read besides (masks, rotary tables), which gets no edge.
        tag_keys: what those are computed from and in which module calls, to tell layers apart that
            read different ones.
        note: what else a reader should know.
        whole: path of the module trained as a whole that the item is, or is part of.
        verdict: what `fxlora.effects` says of the adapter at the item's site; "" without one.
        said: the verdict in a few words, where there is more to say than "live".
        reason: the verdict's reason.
        unit: the call of the site, where the key does not begin with it.
        beside: key of an item to share a row with.
        count: how many blocks a card stands for.
        held: how many parameters those have, and how many of them train.
        shown: keys of the boxes a card says its blocks are as.
    """

    key: str
    kind: str
    title: str
    lines: tuple[str, ...] = ()
    frames: tuple[tuple[str, int], ...] = ()
    path: str = ""
    type: str = ""
    shape: tuple[Any, ...] | None = None
    dtype: Any = None
    grad: bool | None = None
    weights: tuple[Weight, ...] = ()
    role: str = ""
    site: str = ""
    adapter: str = ""
    source: str = ""
    members: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    tag_keys: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    note: str = ""
    whole: str = ""
    verdict: str = ""
    said: str = ""
    reason: str = ""
    unit: str = ""
    beside: str = ""
    count: int = 0
    held: tuple[int, int] = (0, 0)
    shown: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """How many parameters the item reads, each counted once."""
        return sum(w.count for w in self.weights)

    @property
    def state(self) -> str:
        """Whether they train: "trainable", "partly", "frozen", or "" without parameters."""
        flags = {w.trainable for w in self.weights}
        if not flags:
            return ""
        return "partly" if len(flags) == 2 else "trainable" if True in flags else "frozen"


@dataclass(frozen=True)
class Arrow:
    """A value that one item makes and another reads.

    A far one ends at a port that names its source, and is not drawn as a line.
    """

    source: str
    target: str
    label: str = ""
    grad: bool | None = None
    far: bool = False


@dataclass(frozen=True)
class Box:
    """A frame around items: a module, or a run of equal blocks.

    Attributes:
        key: names the box, the same before and after a rewrite.
        kind: "module", "block" (one member of a list of blocks), "fold" (several equal ones) or
            "site" (a LoRA site).
        label: the first line.
        note: the second line, smaller.
        count: how many equal blocks a fold stands for.
        parent: key of the box around; "" for the panel.
        verdict: of the adapter in a site; "" for the rest.
        same_as: key of an earlier block that shows the same; "" for none.
        lacks: names of what that one shows besides; "" for nothing.
        differs: how it differs from that one in numbers, such as "at other sizes"; "" for not at all.
    """

    key: str
    kind: str
    label: str
    note: str = ""
    count: int = 1
    parent: str = ""
    verdict: str = ""
    same_as: str = ""
    lacks: str = ""
    differs: str = ""


@dataclass
class Panel:
    """One graph of the sheet.

    Attributes:
        items: key -> item, in execution order.
        arrows: every pair of items once.
        boxes: key -> box, outermost first.
        home: item key -> key of the box around it.
        types: module path -> class.
        facts: what the heading says.
    """

    items: dict[str, Item]
    arrows: list[Arrow]
    boxes: dict[str, Box] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)
    types: dict[str, type] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def inside(panel: Panel, box: str) -> set[str]:
    """Returns the keys of the items in a box, at any depth."""
    found = set()
    for key, home in panel.home.items():
        at = home
        while at and at != box:
            at = panel.boxes[at].parent
        if at == box:
            found.add(key)
    return found
