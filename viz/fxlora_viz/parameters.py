"""The parameters of a sheet as rows of a table: one row for the equal ones of a fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from fxlora_viz.names import times
from fxlora_viz.picture import Item, Panel

if TYPE_CHECKING:
    from fxlora_viz.verdicts import Verdicts

Frames = tuple[tuple[str, int], ...]


class Instances:
    """The blocks every fold of a panel stands for, and the name each thing has in the drawn one."""

    def __init__(self, whole: Panel, folded: Panel) -> None:
        """Finds the members of every fold.

        Args:
            whole: the panel before folding.
            folded: the same panel, folded.
        """
        self.panel = folded
        self.members: dict[str, tuple[str, ...]] = {}
        self._drawn: dict[str, str] = {}
        levels = _levels(whole)
        for key, box in folded.boxes.items():
            if box.kind == "fold":
                run = _run(levels, key, box.count)
                self.members[key] = tuple(_said(f, run) for f in run)
                # A module called many times is one module: its parameters have one name.
                for path, _ in run:
                    self._drawn.setdefault(path, run[0][0])

    def drawn(self, name: str) -> str:
        """Returns the name that what `name` names has in the block that is drawn."""
        found = ""
        for part in name.split("."):
            found = f"{found}.{part}" if found else part
            found = self._drawn.get(found, found)
        return found


def _levels(panel: Panel) -> list[tuple[Frames, tuple[str, int]]]:
    """Returns every module call once, with the calls around it, in execution order."""
    found: dict[tuple[Frames, tuple[str, int]], None] = {}
    for item in panel.items.values():
        for depth, frame in enumerate(item.frames):
            found[item.frames[:depth], frame] = None
    return list(found)


def _run(
    levels: list[tuple[Frames, tuple[str, int]]], key: str, count: int
) -> list[tuple[str, int]]:
    start = next((i for i, (_, f) in enumerate(levels) if key == _box_key(f)), None)
    if start is None:
        return []
    around, first = levels[start]
    return [f for a, f in levels[start:] if a == around and _siblings(first, f)][:count]


def _box_key(frame: tuple[str, int]) -> str:
    return f"box:{frame[0]}" if frame[1] == 0 else f"box:{frame[0]}#{frame[1]}"


def _siblings(a: tuple[str, int], b: tuple[str, int]) -> bool:
    pa, pb = a[0].rpartition("."), b[0].rpartition(".")
    return a[0] == b[0] or (pa[0] == pb[0] and pa[2].isdigit() and pb[2].isdigit())


def _said(frame: tuple[str, int], run: list[tuple[str, int]]) -> str:
    called = run[0][0] == run[-1][0]
    return f"{frame[0]} (call {frame[1] + 1})" if called else frame[0]


@dataclass
class Row:
    """Equal parameters: one, or that of every block of a fold.

    Attributes:
        name: as in the block that is drawn.
        shape: of each, "4096 × 1024".
        each: how many numbers one holds.
        dtype: of each.
        counts: for each panel, how many there are.
        own: for each panel, how many of them are no other name of one already counted.
        flags: for each panel, the values of requires_grad among them.
        tied: name of the parameter it is another name of; often "".
    """

    name: str
    shape: str
    each: int
    dtype: str
    counts: list[int]
    own: list[int]
    flags: list[set[bool]] = field(default_factory=list)
    tied: str = ""

    @property
    def count(self) -> int:
        """How many parameters the row stands for."""
        return max(self.counts)

    def total(self, panel: int) -> int:
        """Returns how many numbers the row stands for in a panel; tied ones count elsewhere."""
        return self.each * self.own[panel]

    def said(self) -> list[str]:
        """Returns requires_grad in each panel: "trains", "frozen", "mixed", or "" where absent."""
        words = {frozenset({True}): "trains", frozenset({False}): "frozen", frozenset(): ""}
        return [words.get(frozenset(f), "mixed") for f in self.flags]


class Parameters:
    """All parameters of the graphs of a sheet, drawn or not."""

    def __init__(self, graphs: Sequence[GraphModule], instances: Sequence[Instances]) -> None:
        """Reads the parameters of one graph after the other.

        Args:
            graphs: before and after, or one alone.
            instances: the folds of their panels.
        """
        self._instances = instances[-1]
        found: dict[str, Row] = {}
        # The last graph first: it has the adapters, each after the layer it belongs to.
        for panel in reversed(range(len(graphs))):
            first: dict[int, str] = {}
            for name, p in graphs[panel].named_parameters(remove_duplicate=False):
                drawn = self._instances.drawn(name)
                if drawn not in found:
                    zeros = [0] * len(graphs)
                    dtype = str(p.dtype).removeprefix("torch.")
                    found[drawn] = Row(
                        drawn, times(p.shape) or "scalar", p.numel(), dtype,
                        zeros, list(zeros), [set() for _ in graphs],
                    )  # fmt: skip
                row = found[drawn]
                row.counts[panel] += 1
                row.flags[panel].add(p.requires_grad)
                if first.setdefault(id(p), name) == name:
                    row.own[panel] += 1
                else:
                    row.tied = self._instances.drawn(first[id(p)])
        self.rows = list(found.values())
        self._at = {r.name: i for i, r in enumerate(self.rows)}
        self._site: dict[int, str] = {}

    def of(self, item: Item) -> list[int]:
        """Returns the rows of the parameters an item reads."""
        names = dict.fromkeys(self._instances.drawn(w.name) for w in item.weights)
        return [self._at[n] for n in names if n in self._at]

    def site(self, row: Row, verdicts: Verdicts) -> str:
        """Returns the site a parameter belongs to: by the drawing, else by its name."""
        if not self._site:
            for item in self._instances.panel.items.values():
                for i in self.of(item) if item.site else ():
                    self._site.setdefault(i, verdicts.site_of(item))
        return self._site.get(self._at[row.name]) or verdicts.site_of_name(row.name)
