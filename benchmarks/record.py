"""What a run found, as values: cases, their ratios, the file they are kept in, and its history."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Samples, ratio, recovered, together

FORMAT = 1
_TAXED = ("forward", "step", "gpu")  # where the peer is the floor's own work and adapters on top


@dataclass(frozen=True)
class Case:
    """One row: the same work done by several contenders in one run.

    Attributes:
        group: of the benchmark.
        name: of the case, unique in its group.
        unit: of the values: "s", "bytes".
        values: per contender what was measured; `median` is the main number, `failed` says why
            there is none.
        floors: contenders that no adapter can go below.
        ratios: each `ours` against each `peer`; above 1 ours is faster or smaller.
        notes: facts beside the numbers, such as whether the bits agree.
    """

    group: str
    name: str
    unit: str
    values: dict[str, dict[str, Any]]
    floors: tuple[str, ...] = ()
    ratios: tuple[dict[str, Any], ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


def timed(
    group: str,
    name: str,
    found: dict[str, Samples],
    pairs: list[tuple[str, str]],
    *,
    floors: tuple[str, ...] = (),
    notes: dict[str, str] | None = None,
) -> Case:
    """Makes a case of interleaved samples.

    Args:
        group, name: of the case.
        found: samples per contender.
        pairs: (ours, peer) to take ratios of.
        floors: contenders that are floors. The last but one is the floor without adapters, and
            `recovered` is the share of the peer's time above it that ours does not spend; the last
            is what the adapters cost in any case, and `avoidable` is the share above both.
        notes: facts beside the numbers.
    """
    ratios = []
    for ours, peer in pairs:
        if ours not in found or peer not in found:
            continue
        numbers: dict[str, Any] = dict(ratio(found[ours], found[peer]))
        if numbers and group in _TAXED and len(floors) > 1:
            below, least = found[floors[-2]], found[floors[-1]]
            numbers["recovered"] = recovered(found[ours], found[peer], below)
            numbers["avoidable"] = recovered(found[ours], found[peer], together(below, least))
        if numbers:
            ratios.append({"ours": ours, "peer": peer, **numbers})
    return Case(
        group=group,
        name=name,
        unit="s",
        values={k: v.to_dict() for k, v in found.items()},
        floors=floors,
        ratios=tuple(ratios),
        notes=dict(notes or {}),
    )


def sized(
    group: str,
    name: str,
    values: dict[str, float],
    pairs: list[tuple[str, str]],
    *,
    floor: str = "",
    unit: str = "bytes",
    notes: dict[str, str] | None = None,
) -> Case:
    """Makes a case of counted sizes; with a floor, of what lies above it."""
    below = values.get(floor, 0.0)
    ratios: list[dict[str, Any]] = []
    for ours, peer in pairs:
        if ours in values and peer in values:
            mine, other = values[ours] - below, values[peer] - below
            if mine > 0 and other > 0:
                ratio_of = {"ours": ours, "peer": peer, "median": other / mine}
                whole = {"whole": values[peer] / values[ours]} if floor else {}
                ratios.append({**ratio_of, **whole})
    return Case(
        group=group,
        name=name,
        unit=unit,
        values={k: {"median": v} for k, v in values.items()},
        floors=(floor,) if floor else (),
        ratios=tuple(ratios),
        notes=dict(notes or {}),
    )


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks: when, where, with what, and every case.

    Attributes:
        date: of the run, as YYYY-MM-DD.
        machine: the processor, its cores, its memory, a GPU if one was there.
        versions: of Python and of every package that was measured.
        quick: whether any of it is the short form.
        cases: the rows, in order.
        lines: what else the page should say, such as that no GPU was there.
    """

    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    quick: bool
    cases: tuple[Case, ...]
    lines: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Returns the run as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read(path: Path) -> Run:
    """Reads a run back.

    Raises:
        ValueError: when the file is of another format.
    """
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept.get("format") != FORMAT:
        raise ValueError(f"{path}: format {kept.get('format')!r}; this script reads {FORMAT}")
    cases = tuple(
        Case(**{**c, "floors": tuple(c["floors"]), "ratios": tuple(c["ratios"])})
        for c in kept["cases"]
    )
    return Run(
        date=kept["date"],
        machine=kept["machine"],
        versions=kept["versions"],
        quick=kept["quick"],
        cases=cases,
        lines=tuple(kept["lines"]),
    )


def joined(old: Run, new: Run) -> Run:
    """Returns the new run with the groups it did not measure taken from the old one."""
    measured = {c.group for c in new.cases}
    kept = tuple(c for c in old.cases if c.group not in measured)
    cases = tuple(sorted((*kept, *new.cases), key=lambda c: rank(c.group)))
    quick = new.quick or (bool(kept) and old.quick)
    return Run(new.date, new.machine, new.versions, quick, cases, new.lines)


ORDER = (
    "analysis",
    "growth",
    "peak",
    "drawing",
    "forward",
    "step",
    "gpu",
    "compile",
    "saved",
    "memory mode",
    "frontier",
    "startup",
)


def rank(group: str) -> int:
    """Returns where a group stands in the tables."""
    return ORDER.index(group) if group in ORDER else len(ORDER)


def changes(old: Run, new: Run) -> list[tuple[str, float | None, float | None]]:
    """Returns every ratio of two runs side by side: its name, then, now; None where it is missing.

    >>> case = Case("g", "c", "s", {}, ratios=({"ours": "a", "peer": "b", "median": 2.0},))
    >>> run = Run("2026-01-01", {}, {}, True, (case,))
    >>> changes(run, run)
    [('g / c: a against b', 2.0, 2.0)]
    """
    before, after = _ratios(old), _ratios(new)
    return [(k, before.get(k), after.get(k)) for k in dict.fromkeys([*before, *after])]


def _ratios(run: Run) -> dict[str, float]:
    return {
        f"{c.group} / {c.name}: {r['ours']} against {r['peer']}": r["median"]
        for c in run.cases
        for r in c.ratios
    }
