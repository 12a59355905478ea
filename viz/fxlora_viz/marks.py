"""What `fxlora.effects` says of every adapter -> marks on a panel: what is inert, cut, shared.

An adapter that is never called or whose weight is read past it has no node in the graph. It gets
one here, beside the weight it does not reach: what is trained for nothing must not be invisible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from fxlora.effects import Effect, effects
from fxlora.facts import KEY, TraceInfo
from fxlora.reach import weight_names
from fxlora_viz.names import clean, quantity, times
from fxlora_viz.picture import Arrow, Item, Panel, Weight

IDLE = ("bypassed", "inert", "cut", "dead")  # the verdicts of adapters that learn nothing
_ABSENT = ("bypassed", "inert")  # those that have no node in the graph
_ENDS = "gradient ends here"


class Marks:
    """The effects of one graph.

    Attributes:
        effects: (site, adapter) -> effect; empty for a graph without active adapters.
        cuts: the nodes at which a gradient that an adapter needs ends.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        """Computes the effects of a graph; reads it only."""
        found = getattr(graph_module, "meta", {}).get(KEY)
        self._info = found if isinstance(found, TraceInfo) else TraceInfo("", {})
        self._graph_module = graph_module
        self.effects: dict[tuple[str, str], Effect] = {}
        if self._info.active:
            self.effects = {(e.site, e.adapter): e for e in effects(graph_module)}
        cut = [e for e in self.effects.values() if e.verdict == "cut" and not e.frozen]
        self.cuts = frozenset(e.witness[-1] for e in cut)

    def on(self, panel: Panel) -> Panel:
        """Returns a panel, not yet folded, with the verdicts on its items and in its facts."""
        if not self.effects:
            return panel
        metas = {n.name: n.meta for n in self._graph_module.graph.nodes}
        items = {k: self._marked(i, metas) for k, i in panel.items.items()}
        arrows = list(panel.arrows)
        absent = [e for e in self.effects.values() if e.verdict in _ABSENT]
        for effect in absent:
            for ghost in _Ghosts(self._graph_module, self._info, effect, items).made():
                items[ghost.key] = ghost
                if ghost.role == "lora_B":
                    arrows.append(
                        Arrow(ghost.key.replace(":lora_B", ":lora_A"), ghost.key, "", False)
                    )
        for key, note in self._closed(absent, items):
            items[key] = replace(items[key], lines=(*items[key].lines, note))
        facts = {
            **panel.facts,
            "adapters_hung": len(self.effects),
            "idle": sum(e.verdict in IDLE for e in self.effects.values()),
        }
        return replace(panel, items=_in_order(items), arrows=arrows, facts=facts)

    def _marked(self, item: Item, metas: dict[str, dict[str, Any]]) -> Item:
        if not item.role:
            ends = item.kind in ("op", "module", "circle") and self.cuts & set(item.members)
            return replace(item, lines=(*item.lines, _ENDS)) if ends else item
        # One W may stand behind several adapters, one part behind several of its layer.
        of = dict.fromkeys(
            (str(metas[m].get("site", "")), str(metas[m].get("adapter", "")))
            for m in item.members
            if m in metas
        )
        found = [self.effects[k] for k in of if k in self.effects]
        if item.role == "base":
            found = [e for e in self.effects.values() if e.site == item.site] or found
        if not found:
            return item
        worst = next((e for e in found if e.verdict in IDLE), found[0])
        return replace(
            item, verdict=worst.verdict, said=_said(worst), reason=clean(worst.reason, 200)
        )

    def _closed(self, absent: list[Effect], items: dict[str, Item]) -> Iterable[tuple[str, str]]:
        """Yields what to write on closed modules that hold an adapter without a node."""
        shown = {i.site for i in items.values() if i.site}
        hidden: dict[str, list[str]] = {}
        for effect in absent:
            if effect.site not in shown:
                around = _closed_around(effect.site, items)
                if around is not None:
                    hidden.setdefault(around, []).append(effect.verdict)
        for key, verdicts in hidden.items():
            noun = "adapter" if len(verdicts) == 1 else "adapters"
            yield key, f"{len(verdicts)} {noun} {_WORDS[verdicts[0]]}"


_WORDS = {"bypassed": "bypassed", "inert": "never called"}


def _said(effect: Effect) -> str:
    """Returns what is written on a site; "" for one that is simply live."""
    shared = f"shared by {effect.calls} calls" if effect.calls > 1 else ""
    if effect.verdict == "partial":
        first = f"partial: {effect.calls} of {effect.calls + len(effect.bypassing)} uses adapted"
        return first if effect.calls < 2 else f"{first}, shared"
    if effect.verdict == "live":
        return shared
    if effect.frozen:
        return "frozen: does not train"
    return {
        "bypassed": "bypassed: the weight is read past it",
        "inert": "never called",
        "cut": "cut: no gradient arrives",
        "dead": "dead: reaches no output",
    }[effect.verdict]


class _Ghosts:
    """The nodes of one adapter that the graph has none of."""

    def __init__(
        self, graph_module: GraphModule, info: TraceInfo, effect: Effect, items: dict[str, Item]
    ) -> None:
        self._graph_module = graph_module
        self._effect = effect
        self._items = items
        self._several = len(info.active) > 1
        self._planned = info.adapters[effect.adapter][effect.site]

    def made(self) -> list[Item]:
        """Returns A and B for every place they stand at; marks the weights they stand beside."""
        found: list[Item] = []
        for item in self._readers():
            unit = f"{self._effect.site}@{item.key}"
            if item.kind == "parameter":
                self._items[item.key] = replace(
                    item, site=self._planned.site.owner, unit=unit, verdict=self._effect.verdict,
                    said=_said(self._effect), reason=clean(self._effect.reason, 200),
                )  # fmt: skip
            found += self._pair(unit, item)
        if not found and self._effect.verdict == "inert":
            beside = self._neighbour()
            if beside is not None:
                unit = f"{self._effect.site}@never"
                around = _frames_around(self._effect.site, beside)
                stand = replace(beside, frames=around)
                found = [self._base(unit, stand), *self._pair(unit, stand)]
        return found

    def _readers(self) -> list[Item]:
        """Returns the drawn items that read the weight, one for each module call."""
        site = self._planned.site
        try:
            names = weight_names(site, self._graph_module)
        except AttributeError:
            names = {site.weight_name}
        past = set(self._effect.bypassing)
        found: dict[Any, Item] = {}
        for wanted in ("parameter", ""):
            for item in self._items.values():
                reads = bool(past & set(item.members)) or any(w.name in names for w in item.weights)
                if reads and not item.role and (item.kind == wanted or not wanted):
                    closed = item.kind == "module" and self._effect.site.startswith(f"{item.path}.")
                    if not closed:
                        found.setdefault(item.frames, item)
            if found:
                break
        return list(found.values())

    def _neighbour(self) -> Item | None:
        """Returns the item a module that is never called stands beside: the first of its owner."""
        if _closed_around(self._effect.site, self._items) is not None:
            return None
        path = self._effect.site
        while path:
            path = path.rpartition(".")[0]
            inside = [
                i
                for i in self._items.values()
                if i.kind not in ("input", "output")
                and (not path or any(p == path for p, _ in i.frames))
            ]
            if inside:
                return next((i for i in inside if not i.role), inside[0])
        return None

    def _base(self, unit: str, stand: Item) -> Item:
        """Returns the W of a layer that is never called."""
        own = dict(self._graph_module.named_parameters(remove_duplicate=False))
        name = self._planned.site.weight_name
        weights = (_weight(name, own[name]),) if name in own else ()
        shown = weights[0].shape if weights else self._planned.site.shape
        said = quantity(weights[0].count) if weights else ""
        count = (f"{said} params" if said.isdigit() else said,)
        return self._item(
            unit, "W", "base", (times(shown), *(c for c in count if c)), weights, stand
        )

    def _pair(self, unit: str, stand: Item) -> list[Item]:
        found = []
        first = stand.key
        for letter, role in (("A", "lora_A"), ("B", "lora_B")):
            weights = self._weights(letter)
            lines = (times(weights[0].shape),) if weights else ()
            title = f"{letter} · {clean(self._effect.adapter, 24)}" if self._several else letter
            item = self._item(unit, title, role, lines, weights, stand)
            beside = f"{unit}:base" if self._effect.verdict == "inert" else first
            found.append(replace(item, beside=beside if letter == "A" else ""))
        return found

    def _item(
        self, unit: str, title: str, role: str, lines: tuple[str, ...],
        weights: tuple[Weight, ...], stand: Item,
    ) -> Item:  # fmt: skip
        suffix = f"@{self._effect.adapter}" if self._several and role != "base" else ""
        kind = self._planned.kind
        return Item(
            f"{unit}:{role}{suffix}" if role != "base" else f"{unit}:base", "module", title, lines,
            stand.frames[:-1] if stand.kind == "module" and stand.frames else stand.frames,
            self._effect.site, kind, weights=weights, role=role, site=self._effect.site,
            adapter=self._effect.adapter, verdict=self._effect.verdict, unit=unit,
            said=_said(self._effect), reason=clean(self._effect.reason, 200),
            beside=stand.key if role == "base" else "", grad=False if role != "base" else None,
        )  # fmt: skip

    def _weights(self, letter: str) -> tuple[Weight, ...]:
        start = f"{self._planned.prefix}."
        parts = (
            f"lora_{letter}.{self._effect.adapter}",
            f"lora_embedding_{letter}.{self._effect.adapter}",
        )
        return tuple(
            _weight(name, p)
            for name, p in self._graph_module.named_parameters()
            if name.startswith(start)
            and f"{name.removeprefix(start)}.".startswith(tuple(f"{q}." for q in parts))
        )


def _weight(name: str, parameter: Any) -> Weight:
    shape = tuple(int(d) for d in parameter.shape)
    return Weight(name, shape, parameter.requires_grad, parameter.numel())


def _closed_around(site: str, items: dict[str, Item]) -> str | None:
    """Returns the key of the closed module a site lies in, if it is drawn as one node."""
    for key, item in items.items():
        if item.kind == "module" and not item.role and site.startswith(f"{item.path}."):
            return key
    return None


def _frames_around(site: str, beside: Item) -> tuple[tuple[str, int], ...]:
    """Returns the calls around an item that a site lies in, too."""
    return tuple(f for f in beside.frames if site.startswith(f"{f[0]}."))


def _in_order(items: dict[str, Item]) -> dict[str, Item]:
    """Puts every item that has no place of its own behind the one it stands beside."""
    followers: dict[str, list[str]] = {}
    for key, item in items.items():
        if item.beside:
            followers.setdefault(item.beside, []).append(key)
    lead = {key: key for key in items}
    found: dict[str, Item] = {}

    def put(key: str) -> None:
        found[key] = items[key]
        for follower in followers.get(lead[key], ()):
            if follower not in found:
                put(follower)
                below = follower.replace(":lora_A", ":lora_B")
                if below in items and below not in found:
                    found[below] = items[below]

    for key, item in items.items():
        ghost = bool(item.unit) and item.kind != "parameter"
        if key not in found and not ghost:
            put(key)
    found.update((k, i) for k, i in items.items() if k not in found)
    return found
