"""What every adapter does to the outputs: live, inert, bypassed, partial, cut or dead, with a witness.

An adapter that is attached, listed and stepped may still reach no output. Names cannot show that;
the graph can: an adapter is live when a backward pass from the outputs arrives at its parameters,
and this walks that pass over the graph without running anything.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxlora.errors import AdapterError
from fxlora.facts import info
from fxlora.gradients import gradient_sources, requires_grad, target_name
from fxlora.plan import PlannedSite
from fxlora.text import count

_HUNG = ("lora_", "modules_to_save", "token_adapter", "base_layer")
VERDICTS = ("live", "partial", "bypassed", "inert", "cut", "dead")


@dataclass(frozen=True)
class Effect:
    """What one adapter at one site does.

    Attributes:
        site: the site's name.
        adapter: the adapter's name.
        verdict: "live" (its gradient arrives), "partial" (live, and some calls of the weight are
            not adapted), "bypassed" (every use of the weight goes past the module), "inert" (never
            called), "cut" (every path to an output passes something that stops the gradient) or
            "dead" (no path leads to an output).
        calls: how many calls of the weight are adapted; more than one is a shared site.
        bypassing: the nodes that read the weight past the adapter.
        witness: for a live site the nodes from the adapter to an output; for a cut one from the
            adapter to what cuts it.
        reason: one sentence.
    """

    site: str
    adapter: str
    verdict: str
    calls: int
    bypassing: tuple[str, ...]
    witness: tuple[str, ...]
    reason: str

    @property
    def live(self) -> bool:
        """Whether a backward pass gives the adapter a gradient."""
        return self.verdict in ("live", "partial")

    def to_dict(self) -> dict[str, Any]:
        """Returns the effect as plain data."""
        from dataclasses import asdict

        return asdict(self)


@dataclass(frozen=True)
class Effects:
    """The effects of every adapted site of a graph; iterates over them, prints as a table."""

    effects: tuple[Effect, ...]

    def __iter__(self) -> Any:
        return iter(self.effects)

    def __len__(self) -> int:
        return len(self.effects)

    def __str__(self) -> str:
        from fxlora.report import effects_text

        return effects_text(self.effects)


def effects(lora: GraphModule) -> Effects:
    """Says for every adapter of a rewritten graph whether it reaches an output.

    The adapters' A and B are taken for nonzero: the B = 0 of a new adapter hides nothing.

    Args:
        lora: a rewritten graph with active adapters; not run and not changed.

    Raises:
        AdapterError: when no adapter is active.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(target_modules=["0"]))
    >>> [(e.site, e.verdict) for e in effects(lora)]
    [('0', 'live')]
    """
    facts = info(lora)
    if not facts.active:
        raise AdapterError("no adapter is active, so none has an effect")
    walk = _Walk(lora)
    found = [walk.effect(p, name) for name in facts.active for p in facts.adapters[name].adapted]
    return Effects(tuple(found))


def reached_parameters(lora: GraphModule) -> set[str]:
    """Returns the names of the parameters a backward pass from the outputs gives a gradient.

    A parameter that several names stand for is listed under its first.
    """
    return _Walk(lora).parameters


class _Walk:
    """One backward pass over a graph, and what it met."""

    def __init__(self, lora: GraphModule) -> None:
        self._lora = lora
        self._flags = requires_grad(lora)
        self._sources = gradient_sources(lora)
        self._reached = self._backward()
        self._first = {id(p): n for n, p in lora.named_parameters()}
        self.parameters = {
            self._first[id(p)]
            for node in self._reached
            for p in _read(lora, node)
            if p.requires_grad
        }

    def _backward(self) -> set[Node]:
        """Returns every node a gradient arrives at."""
        output = next(n for n in reversed(self._lora.graph.nodes) if n.op == "output")
        todo = deque(n for n in output.all_input_nodes if self._flags[n])
        reached = set(todo)
        while todo:
            for source in self._sources[todo.popleft()]:
                if source not in reached and self._flags[source]:
                    reached.add(source)
                    todo.append(source)
        return reached

    # ---- one site

    def effect(self, planned: PlannedSite, adapter: str) -> Effect:
        """Returns the effect of one adapter at one site."""
        own = self._own_nodes(planned, adapter)
        past = tuple(c.node.name for c in planned.site.calls if not self._adapted(planned, c))
        adapted = len(planned.site.calls) - len(past)
        verdict, witness, reason = self._verdict(planned, own, past, adapted)
        return Effect(planned.name, adapter, verdict, adapted, past, witness, reason)

    def _adapted(self, planned: PlannedSite, call: Any) -> bool:
        if planned.form == "delta":
            stack = call.node.meta.get("module_stack", ())
            return any(f.path == planned.scope for f in stack)
        return bool(call.through_module and call.node.op == "call_module")

    def _own_nodes(self, planned: PlannedSite, adapter: str) -> list[Node]:
        return [
            n
            for n in self._lora.graph.nodes
            if n.meta.get("site") == planned.name
            and n.meta.get("adapter") == adapter
            and n.meta.get("role") in ("lora_A", "lora_B")
        ]

    def _verdict(
        self, planned: PlannedSite, own: list[Node], past: tuple[str, ...], adapted: int
    ) -> tuple[str, tuple[str, ...], str]:
        if not planned.site.calls:
            return "inert", (), "the layer is never called on the traced path"
        if not own:
            return "bypassed", (), f"its weight is read past the module, by {', '.join(past[:3])}"
        arrived = next((n for n in own if n in self._reached), None)
        if arrived is not None:
            shared = f"; shared by {adapted} calls" if adapted > 1 else ""
            path = self._path(arrived)
            if past:
                more = (
                    f"{count(len(past), 'call')} of the weight not adapted: {', '.join(past[:3])}"
                )
                return "partial", path, more + shared
            return "live", path, "its gradient arrives" + shared
        cut = self._cut(own)
        if cut is None:
            return "dead", (), "nothing that leads to an output uses what it computes"
        where = cut[-1]
        what = target_name(where) or str(where.target)
        return "cut", tuple(n.name for n in cut), f"no gradient passes {what!r} ({where.name})"

    def _path(self, start: Node) -> tuple[str, ...]:
        """Returns a shortest way from a reached node to an output, through reached nodes."""
        return self._search(start, lambda n: n in self._reached)

    def _search(self, start: Node, through: Any) -> tuple[str, ...]:
        came: dict[Node, Node | None] = {start: None}
        todo = deque([start])
        while todo:
            at = todo.popleft()
            if at.op == "output":
                return _back(at, came)
            for user in at.users:
                if user not in came and (user.op == "output" or through(user)):
                    came[user] = at
                    todo.append(user)
        return (start.name,)

    def _cut(self, own: list[Node]) -> list[Node] | None:
        """Returns a way to an output whose last node is the first that stops the gradient."""
        leads = self._leads_to_output()
        start = next((n for n in own if n in leads), None)
        if start is None:
            return None
        path = [start]
        while path[-1].op != "output":
            onward = next((u for u in path[-1].users if u in leads), None)
            if onward is None:
                break
            path.append(onward)
            stops = path[-2] not in self._sources.get(onward, ()) or not self._flags[onward]
            if onward.op != "output" and stops:
                break
        return path

    def _leads_to_output(self) -> set[Node]:
        leads: set[Node] = set()
        for node in reversed(self._lora.graph.nodes):
            if node.op == "output" or any(u in leads for u in node.users):
                leads.add(node)
        return leads


def _back(end: Node, came: dict[Node, Node | None]) -> tuple[str, ...]:
    names = []
    at: Node | None = end
    while at is not None:
        names.append(at.name)
        at = came[at]
    return tuple(reversed(names))


def _read(lora: GraphModule, node: Node) -> list[nn.Parameter]:
    """Returns the parameters a node reads by itself."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(lora.get_submodule(owner), name)
        return [found] if isinstance(found, nn.Parameter) else []
    if node.op == "call_module":
        module = lora.get_submodule(str(node.target))
        # Adapters hang below the layer they adapt, and are read by nodes of their own.
        return [
            p for n, p in module.named_parameters() if not n.partition(".")[0].startswith(_HUNG)
        ]
    return []
