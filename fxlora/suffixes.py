"""The smallest lists of targets and exclusions, on the tree of names read from their end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Lists(NamedTuple):
    """One way to say it."""

    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] = ()

    @property
    def entries(self) -> int:
        """How many entries the lists have together."""
        many = [self.targets, self.excluded]
        return sum(1 if isinstance(m, str) else len(m) for m in many) + bool(self.layers)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Fewest entries, then lists before layers before a pattern, then the shortest text."""
        way = 2 if isinstance(self.excluded, str) else 1 if self.layers else 0
        return self.entries, way, sum(map(len, (*self.targets, *self.excluded)))


@dataclass
class Name:
    """What is asked of a name: whether it shall be taken, and whether a suffix can take it."""

    want: bool | None
    by_suffix: bool
    children: dict[str, Name] = field(default_factory=dict)
    real: bool = True


def tree_of(names: Mapping[str, Name]) -> Name:
    """Returns names as a tree, their last part next to the root."""
    root = Name(None, True, real=False)
    for name, given in names.items():
        at = root
        for part in reversed(name.split(".")):
            at = at.children.setdefault(part, Name(None, True, real=False))
        at.want, at.by_suffix, at.real = given.want, given.by_suffix, True
    return root


class _Cost(NamedTuple):
    """Entries, of these exclusions, and characters; with what they are."""

    entries: int
    exclusions: int
    characters: int
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def plus(self, other: _Cost) -> _Cost:
        return _Cost(
            self.entries + other.entries,
            self.exclusions + other.exclusions,
            self.characters + other.characters,
            self.targets + other.targets,
            self.excluded + other.excluded,
        )

    @property
    def rank(self) -> tuple[int, int, int]:
        return self[:3]


def solved(root: Name) -> Lists | None:
    """Returns the smallest lists for a tree; None where suffixes cannot say it."""
    best = _Walk().best(root, "", False, False)
    if best is None or not best.targets:
        return None
    return Lists(tuple(sorted(best.targets)), tuple(sorted(best.excluded)))


class _Walk:
    """One walk over the tree of names, from the leaves up; every question is answered once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool, bool], _Cost | None] = {}

    def best(self, at: Name, entry: str, targeted: bool, excluded: bool) -> _Cost | None:
        """Returns the least cost below a node, given what the nodes above it decided."""
        key = (entry, targeted, excluded)
        if key not in self._known:
            self._known[key] = self._best(at, entry, targeted, excluded)
        return self._known[key]

    def _best(self, at: Name, entry: str, targeted: bool, excluded: bool) -> _Cost | None:
        best: _Cost | None = None
        # An entry on the root would be empty; one that repeats a decision adds nothing, except
        # where only the exact name counts.
        again = at.real and not at.by_suffix
        for target in (False, True) if entry and (again or not targeted) else (False,):
            for exclude in (False, True) if entry and not excluded else (False,):
                own = _Cost(
                    target + exclude, int(exclude), len(entry) * (target + exclude),
                    (entry,) * target, (entry,) * exclude,
                )  # fmt: skip
                found = self._with(at, entry, own, target, targeted or target, excluded or exclude)
                if found is not None and (best is None or found.rank < best.rank):
                    best = found
        return best

    def _with(
        self, at: Name, entry: str, cost: _Cost, here: bool, targeted: bool, excluded: bool
    ) -> _Cost | None:
        if at.real and at.want is not None:
            hit = targeted if at.by_suffix else here
            if (hit and not excluded) != at.want:
                return None
        if excluded or not targeted:
            # Below here only an entry of its own can take a name, and none is wanted.
            if not any(_wants(c) for c in at.children.values()):
                return cost
            if excluded:
                return None
        for part, child in at.children.items():
            found = self.best(child, f"{part}.{entry}" if entry else part, targeted, excluded)
            if found is None:
                return None
            cost = cost.plus(found)
        return cost


def _wants(at: Name) -> bool:
    return bool(at.want) or any(_wants(c) for c in at.children.values())


def smallest_lists(
    universe: Iterable[str], wanted: Iterable[str], free: Iterable[str] = ()
) -> Lists | None:
    """Returns the fewest suffixes to take and to leave that select exactly `wanted`.

    Args:
        universe: every name there is.
        wanted: the names to take.
        free: names for which either is good.

    Returns:
        None when no two lists can: `a` and `c.b.a` without `b.a`.

    >>> smallest_lists(["x.q", "y.q", "y.k"], ["x.q", "y.q"])
    Lists(targets=('q',), excluded=(), layers=())
    """
    take, either = set(wanted), set(free)
    root = tree_of({n: Name(None if n in either else n in take, by_suffix=True) for n in universe})
    return solved(root)
