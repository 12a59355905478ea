"""What the plan and `fxlora.effects` say of every site, by the name the site has in the drawing."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import GraphModule

from fxlora.facts import KEY, TraceInfo
from fxlora_viz.names import clean, number
from fxlora_viz.parameters import Instances
from fxlora_viz.picture import Item

Effects = dict[tuple[str, str], Any]


class Verdicts:
    """The sites of a rewritten graph.

    Attributes:
        sites: name -> one entry for each active adapter.
        trouble: why there are no effects, where they could not be computed; else "".
    """

    def __init__(
        self, graph: GraphModule, instances: Instances, known: Effects | None = None
    ) -> None:
        """Reads the plans of the active adapters and their effects.

        Args:
            graph: a rewritten graph; of another one there is nothing to say.
            instances: the folds it is drawn with.
            known: (site, adapter) -> effect; computed where left out.
        """
        found = getattr(graph, "meta", {}).get(KEY)
        info = found if isinstance(found, TraceInfo) else TraceInfo("", {})
        self._instances = instances
        self.trouble = ""
        effects = known if known is not None else self._effects(graph) if info.active else {}
        entries: dict[tuple[str, str], list[Any]] = {}
        for adapter in info.active:
            for planned in info.adapters[adapter]:
                key = (instances.drawn(planned.name), adapter)
                entries.setdefault(key, []).append(planned)
        self.sites: dict[str, list[dict[str, Any]]] = {}
        for (name, adapter), planned in entries.items():
            entry = _entry(adapter, planned, [effects.get((p.name, adapter)) for p in planned])
            self.sites.setdefault(name, []).append(entry)

    def _effects(self, graph: GraphModule) -> Effects:
        from fxlora.effects import effects

        try:
            return {(e.site, e.adapter): e for e in effects(graph)}
        except Exception as error:  # noqa: BLE001 - a page without verdicts is better than none
            self.trouble = clean(f"no effects: {type(error).__name__}: {error}", 300)
            return {}

    def site_of(self, item: Item) -> str:
        """Returns the site an item is, or is a part of; "" for none."""
        names = [item.site, *(w.name for w in item.weights), item.path]
        if item.kind not in ("module", "parameter", "circle"):
            names = [item.site]
        if item.site and item.adapter:
            # Part of a fused layer: its sites are named below the layer.
            names.insert(0, f"{item.site}.{item.adapter.rpartition(' ')[2]}")
        for name in names:
            drawn = self._instances.drawn(name)
            if name and drawn in self.sites:
                return drawn
        return self._instances.drawn(item.site) if item.site else ""

    def site_of_name(self, name: str) -> str:
        """Returns the site whose name a parameter's name starts with; "" for none."""
        at = name
        while at:
            if at in self.sites:
                return at
            at = at.rpartition(".")[0]
        return ""


def _entry(adapter: str, planned: list[Any], effects: list[Any]) -> dict[str, Any]:
    first = planned[0]
    found: dict[str, Any] = {
        "adapter": clean(adapter, 200), "plan": _counted([p.verdict for p in planned]),
        "reason": clean(first.reason, 300), "count": len(planned),
    }  # fmt: skip
    known = [e for e in effects if e is not None]
    if known:
        found["effect"] = _counted([e.verdict for e in known])
        # The most telling reason: that of an instance that differs from the first.
        odd = next((e for e in known if not e.live), known[0])
        found["why"] = clean(odd.reason, 300)
        found["calls"] = odd.calls
    if first.adapted:
        found |= {
            "rank": first.rank, "alpha": number(first.alpha), "scaling": number(first.scaling),
        }  # fmt: skip
    return found


def _counted(words: list[str]) -> str:
    """Returns `live`, or `live ×30, inert ×2` where they differ."""
    counts = Counter(words)
    if len(counts) == 1:
        return words[0]
    return ", ".join(f"{w} ×{n}" for w, n in counts.items())
