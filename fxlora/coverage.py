"""What of a model a plan covers: target x layer x share of parameters and of FLOPs.

Sites of repeated blocks share a row, their layers share columns: a column is a range of layers in
which no row changes, so a gap is a column that says so and not a line among hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora.facts import info
from fxlora.flops import call_flops, distinct_calls, example_sizes, site_flops
from fxlora.fused import fused_advice
from fxlora.html import Printed
from fxlora.plan import Plan, PlannedSite
from fxlora.roles import Place, layer_at, place_of, role_of
from fxlora.sites import Site
from fxlora.slices import Slice, slices
from fxlora.text import share_of

BLOCKS = {"adapted": "█", "partial": "▒", "not": "░", "": " "}
ASCII = {"adapted": "#", "partial": "+", "not": ".", "": " "}
# ---- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """How many of some sites are adapted, how many in part (some slices of them), and how many there are."""

    adapted: int = 0
    partly: int = 0
    total: int = 0

    def plus(self, share: float) -> Tally:
        """Returns the tally with one more site, of which a share is adapted."""
        return Tally(self.adapted + (share == 1), self.partly + (0 < share < 1), self.total + 1)

    @property
    def state(self) -> str:
        """Returns "adapted", "partial", "not", or "" where there is no site."""
        if not self.total:
            return ""
        if self.adapted == self.total:
            return "adapted"
        return "partial" if self.adapted or self.partly else "not"

    @property
    def words(self) -> str:
        """The state, with how many of several it holds for."""
        if self.state != "partial":
            return self.state
        return f"{self.adapted}/{self.total}" if self.adapted else "some slices"


@dataclass(frozen=True)
class Part:
    """A part of a fused projection.

    Attributes:
        part: its role, "q", "gate", or a number.
        rows: its output features, as text.
        out_features: how many they are.
        share: of the fused layer, 0 to 1.
        layers: layer -> how many are adapted, alone or with the whole layer.
        tally: the same of all layers together.
    """

    part: str
    rows: str
    out_features: int
    share: float
    layers: Mapping[int, Tally]
    tally: Tally


@dataclass(frozen=True)
class Row:
    """One target of a model, over all layers that have it.

    Attributes:
        container, target: as `Place` has them.
        role: what it is for, one of `ROLES`.
        kind: the kind of layer.
        shape: of the weight, the first one's where they differ.
        sites: the names, in the order of the model.
        layers: layer -> how many of its sites are adapted; empty outside of layers.
        tally: the same of all layers together.
        uncalled: how many are never called on the traced path.
        ranks: the ranks in use.
        parameters, covered_parameters: of the weights, and of those with an adapter.
        flops, covered_flops: of the calls, and of those an adapter acts on.
        trainable: parameters of the adapters that train.
        parts: of a fused projection.
        note: what a reader should know.
    """

    container: str
    target: str
    role: str
    kind: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    layers: Mapping[int, Tally]
    tally: Tally
    uncalled: int
    ranks: tuple[int, ...]
    parameters: int
    covered_parameters: int
    flops: int
    covered_flops: int
    trainable: int
    parts: tuple[Part, ...] = ()
    note: str = ""

    def state(self, layer: int) -> str:
        """Returns "adapted", "not", "partial", or "" where the layer has no such site."""
        return self.layers.get(layer, Tally()).state

    @property
    def whole(self) -> str:
        """Returns the state of all its sites together."""
        return self.tally.state

    @property
    def adapted(self) -> int:
        """Returns how many of the sites are adapted as a whole."""
        return self.tally.adapted

    @property
    def gaps(self) -> tuple[int, ...]:
        """The layers that have the target and no adapter on (all of) it."""
        return tuple(i for i in self.layers if self.state(i) in ("not", "partial"))


@dataclass(frozen=True)
class Coverage(Printed):
    """What of a model a plan covers; prints as a table, iterates over its rows.

    Attributes:
        model_class: the class of the traced model.
        rows: one for each target, in the order of the model.
        sizes: the input sizes the FLOPs are for: `{"input_ids.size(1)": 16}`.
        parameters, covered_parameters: of all weights of linear sites, a tied one once.
        flops, covered_flops: of all calls of linear sites.
        trainable: parameters of the adapters that train.
        unknown: calls whose shapes the trace does not know, left out of the FLOPs.
        advice: what is fused, and what to write instead (`fused_advice`).
    """

    model_class: str
    rows: tuple[Row, ...]
    sizes: Mapping[str, int]
    parameters: int
    covered_parameters: int
    flops: int
    covered_flops: int
    trainable: int
    unknown: int = 0
    advice: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def share_of_parameters(self) -> float:
        """The share of the linear sites' parameters that has an adapter, 0 to 1."""
        return share_of(self.covered_parameters, self.parameters)

    @property
    def share_of_flops(self) -> float:
        """The share of the linear sites' operations an adapter acts on, 0 to 1."""
        return share_of(self.covered_flops, self.flops)

    def to_dict(self) -> dict[str, Any]:
        """Returns the coverage as plain data, for JSON."""
        from dataclasses import asdict

        rows = []
        for row in self.rows:
            made = asdict(row)
            made["parts"] = list(made["parts"])
            made["layers"] = {str(i): t.state for i, t in row.layers.items()}
            for part, of in zip(made["parts"], row.parts, strict=True):
                part["layers"] = {str(i): t.state for i, t in of.layers.items()}
                part["state"] = of.tally.state
                del part["tally"]
            del made["tally"]
            made["adapted"] = row.adapted
            made["gaps"] = list(row.gaps)
            made["state"] = row.whole
            made["share_of_parameters"] = share_of(row.parameters, self.parameters)
            made["share_of_flops"] = share_of(row.flops, self.flops)
            rows.append(made)
        return {
            "model": self.model_class,
            "sizes": dict(self.sizes),
            "parameters": self.parameters,
            "covered_parameters": self.covered_parameters,
            "share_of_parameters": self.share_of_parameters,
            "flops": self.flops,
            "covered_flops": self.covered_flops,
            "share_of_flops": self.share_of_flops,
            "trainable": self.trainable,
            "unknown": self.unknown,
            "rows": rows,
            "advice": list(self.advice),
        }

    def text(self, ascii_only: bool = False) -> str:
        """Returns the table; with letters and signs of ASCII alone where a terminal needs it."""
        from fxlora.coverage_report import coverage_parts

        return "\n".join(coverage_parts(self, ASCII if ascii_only else BLOCKS))

    def _parts(self) -> Iterable[str]:
        from fxlora.coverage_report import coverage_parts

        return coverage_parts(self, BLOCKS)


def coverage(traced: GraphModule, plan: Plan, sizes: Mapping[str, int] | None = None) -> Coverage:
    """Says which targets a plan adapts in which layers, and what share of the model that is.

    Args:
        traced: what `fxlora.trace` returned; read.
        plan: for that graph.
        sizes: input sizes for the FLOPs, by symbol or by input (`{"input_ids.size(1)": 4096}`); the
            example inputs' where absent.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    >>> traced = fxlora.trace(model, (torch.randn(2, 10),))
    >>> c = coverage(traced, fxlora.plan(traced, LoraConfig(r=4, target_modules=["0"])))
    >>> round(c.share_of_parameters, 3), [(row.target, row.whole) for row in c]
    (0.667, [('0', 'adapted'), ('2', 'not')])
    """
    facts = info(traced)
    numbers = example_sizes(traced, sizes)
    parts: dict[str, list[Slice]] = {}
    for s in slices(traced):
        parts.setdefault(s.site, []).append(s)
    owned = _owned(plan)
    holders = _weights(owned, facts.model)
    rows = tuple(
        _row(place, members, facts.model, numbers, parts, holders)
        for place, members in _grouped(owned).items()
    )
    shares: dict[int, float] = {}
    for o in owned:
        key = holders[o.site.name][0]
        shares[key] = max(o.share, shares.get(key, 0.0))
    weights = dict(holders.values())
    return Coverage(
        model_class=plan.model_class,
        rows=rows,
        sizes={facts.sizes[s]: n for s, n in numbers.items() if s in facts.sizes},
        parameters=sum(weights.values()),
        covered_parameters=sum(round(n * shares[key]) for key, n in weights.items()),
        flops=sum(r.flops for r in rows),
        covered_flops=sum(r.covered_flops for r in rows),
        trainable=sum(r.trainable for r in rows),
        unknown=sum(
            call_flops(o.site, c, numbers) is None for o in owned for c in distinct_calls(o.site)
        ),
        advice=tuple(fused_advice(traced, plan)),
    )


@dataclass(frozen=True)
class _Owned:
    """One layer, and what of it the plan adapts: the whole, parts of it, or single calls.

    Attributes:
        site: the layer with all of its calls.
        planned: the plan's sites on it.
        share: of its weight that has an adapter, 0 to 1.
    """

    site: Site
    planned: tuple[PlannedSite, ...]

    @property
    def share(self) -> float:
        adapted = [p for p in self.planned if p.adapted]
        if any(not p.site.rows for p in adapted):
            return 1.0
        rows = {i for p in adapted for r in p.site.rows for i in r}
        return share_of(len(rows), self.site.out_features)


def _owned(plan: Plan) -> list[_Owned]:
    groups: dict[str, list[PlannedSite]] = {}
    for p in plan:
        groups.setdefault(p.site.owner, []).append(p)
    out = []
    for name, members in groups.items():
        whole = next((p.site for p in members if not p.site.of), None)
        if whole is None:  # a layer whose calls have adapters of their own
            calls = dict.fromkeys(c for p in members if not p.site.rows for c in p.site.calls)
            first = next(p.site for p in members if not p.site.rows)
            whole = replace(first, name=name, of="", calls=tuple(calls))
        out.append(_Owned(whole, tuple(members)))
    return out


def _weights(owned: Iterable[_Owned], model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns site -> (which weight it reads, its size): tied sites read the same one."""
    first: dict[int, int] = {}
    found = {}
    for i, o in enumerate(owned):
        owner, _, last = o.site.weight_name.rpartition(".")
        weight = getattr(layer_at(model, owner) if owner else model, last, None)
        key = first.setdefault(id(weight), i) if weight is not None else i
        found[o.site.name] = (key, math.prod(o.site.shape))
    return found


def _grouped(owned: Iterable[_Owned]) -> dict[tuple[Place, str], list[_Owned]]:
    """Returns the sites by target, containers in the order of the model and together."""
    groups: dict[tuple[Place, str], list[_Owned]] = {}
    for o in owned:
        place = replace(place_of(o.site.name), layer=None)
        groups.setdefault((place, o.site.kind), []).append(o)
    order = list(dict.fromkeys(place.container for place, _ in groups))
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0][0].container)))


def _row(
    key: tuple[Place, str],
    members: list[_Owned],
    model: nn.Module,
    sizes: Mapping[str, int],
    parts: Mapping[str, list[Slice]],
    holders: Mapping[str, tuple[int, int]],
) -> Row:
    place, kind = key
    per_layer, tally = _tallies((o.site.name, o.share) for o in members)
    first = members[0].site
    planned = [p for o in members for p in o.planned]
    return Row(
        container=place.container,
        target=place.target or "(the model)",
        role=role_of(first, model),
        kind=kind,
        shape=first.shape,
        sites=tuple(o.site.name for o in members),
        layers=per_layer,
        tally=tally,
        uncalled=sum(not o.site.calls for o in members),
        ranks=tuple(sorted({p.r for p in planned if p.adapted})),
        parameters=sum(holders[o.site.name][1] for o in members),
        covered_parameters=sum(round(holders[o.site.name][1] * o.share) for o in members),
        flops=sum(site_flops(o.site, sizes) for o in members),
        covered_flops=sum(covered_flops(p, sizes) for p in planned),
        trainable=sum(p.adapter.trainable for p in planned if p.adapter is not None),
        parts=tuple(_part(s, members) for s in parts.get(first.name, ())),
        note=_note(members, holders),
    )


def _tallies(sites: Iterable[tuple[str, float]]) -> tuple[dict[int, Tally], Tally]:
    per_layer: dict[int, Tally] = {}
    together = Tally()
    for name, share in sites:
        layer = place_of(name).layer
        together = together.plus(share)
        if layer is not None:
            per_layer[layer] = per_layer.get(layer, Tally()).plus(share)
    return dict(sorted(per_layer.items())), together


def covered_flops(planned: PlannedSite, sizes: Mapping[str, int]) -> int:
    """Returns the operations of the calls an adapter acts on: none of those that bypass it."""
    if not planned.adapted:
        return 0
    calls = (c for c in distinct_calls(planned.site) if planned.reaches(c))
    return sum(call_flops(planned.site, c, sizes) or 0 for c in calls)


def _part(s: Slice, members: Iterable[_Owned]) -> Part:
    rows = {i for r in s.rows for i in r}
    first = next(iter(members))
    layers, tally = _tallies((o.site.name, _part_share(rows, o)) for o in members)
    share = share_of(s.out_features, first.site.out_features)
    return Part(s.part, s.where, s.out_features, share, layers, tally)


def _part_share(rows: set[int], o: _Owned) -> float:
    if o.share == 1:
        return 1.0
    adapted = {i for p in o.planned if p.adapted for r in p.site.rows for i in r}
    return share_of(len(rows & adapted), len(rows))


def _note(members: Sequence[_Owned], holders: Mapping[str, tuple[int, int]]) -> str:
    notes = []
    uncalled = sum(not o.site.calls for o in members)
    if uncalled:
        notes.append("never called" if uncalled == len(members) else f"{uncalled} never called")
    bypassed = sum(_is_bypassed(p) for o in members for p in o.planned)
    if bypassed:
        notes.append(f"{bypassed} read past the adapter")
    names = {key: name for name, (key, _) in reversed(tuple(holders.items()))}
    own = {o.site.name for o in members}
    tied = {names[holders[n][0]] for n in own} - own
    if tied:
        notes.append(f"same weight as {min(tied)}")
    return "; ".join(notes)


def _is_bypassed(p: PlannedSite) -> bool:
    return p.adapted and not all(p.reaches(c) for c in distinct_calls(p.site))
