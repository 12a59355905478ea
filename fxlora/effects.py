"""What every adapter does to the outputs: live, inert, bypassed, partial, cut or dead, with a witness.

An adapter that is attached, listed and stepped may still reach no output. Names cannot show that;
the graph can: an adapter is live when a backward pass from the outputs arrives at its parameters,
and this walks that pass over the graph without running anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxlora.errors import AdapterError
from fxlora.facts import check_plain, info
from fxlora.gradients import (
    enabled,
    first_flags,
    gradient_sources,
    target_name,
    value_sources,
)
from fxlora.html import Printed
from fxlora.plan import PlannedSite
from fxlora.text import count

_FROZEN = "the adapter is frozen: its parameters do not require grad"
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
            called), "cut" (every path to an output passes something that stops the gradient, or
            makes zeros of it; or the adapter itself is frozen) or "dead" (no path leads to an output).
        calls: how many calls of the weight are adapted; more than one is a shared site.
        bypassing: the nodes that read the weight past the adapter.
        witness: for a live site the nodes from the adapter to the output; for a cut one from the
            adapter to what cuts it, which may be itself. Each follows from the one before it: it reads its result, or
            what it wrote into.
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
        """Whether a backward pass gives the adapter a gradient that is not zero by construction."""
        return self.verdict in ("live", "partial")

    @property
    def frozen(self) -> bool:
        """Whether it is cut because no parameter of the adapter requires grad."""
        return self.reason == _FROZEN

    def to_dict(self) -> dict[str, Any]:
        """Returns the effect as plain data."""
        from dataclasses import asdict

        return asdict(self)


@dataclass(frozen=True)
class Effects(Printed):
    """The effects of every adapted site of a graph; iterates over them, prints as a table."""

    effects: tuple[Effect, ...]

    def __iter__(self) -> Any:
        return iter(self.effects)

    def __len__(self) -> int:
        return len(self.effects)

    def _parts(self) -> Iterable[str]:
        from fxlora.report import effects_parts

        return effects_parts(self.effects)


def effects(lora: GraphModule) -> Effects:
    """Says for every adapter of a rewritten graph whether it reaches an output.

    The adapters' A and B are taken for nonzero: the B = 0 of a new adapter hides nothing.

    Args:
        lora: a rewritten graph with active adapters; not run and not changed.

    Raises:
        AdapterError: when no adapter is active.
        UnsupportedError: for a graph that was optimized.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(target_modules=["0"]))
    >>> [(e.site, e.verdict) for e in effects(lora)]
    [('0', 'live')]
    """
    facts = info(lora)
    check_plain(lora, "effects")
    if not facts.active:
        raise AdapterError("no adapter is active, so none has an effect")
    walk = _Walk(lora)
    found = [walk.effect(p, name) for name in facts.active for p in facts.adapters[name].adapted]
    return Effects(tuple(found))


def reached_parameters(lora: GraphModule) -> set[str]:
    """Returns the names of the parameters a backward pass from the outputs gives a gradient.

    This is autograd's own notion, `p.grad is not None`: the zeros that `round` hands on count. A
    parameter that several names stand for is listed under its first.
    """
    return _Walk(lora).parameters


class _Walk:
    """One backward pass over a graph, and what it met."""

    def __init__(self, lora: GraphModule) -> None:
        self._lora = lora
        self._flags = first_flags(lora)
        self._on = enabled(lora)
        self._own: dict[tuple[str, str], list[Node]] = {}
        for n in lora.graph.nodes:
            if n.meta.get("role") in ("lora_A", "lora_B"):
                key = (str(n.meta.get("site")), str(n.meta.get("adapter")))
                self._own.setdefault(key, []).append(n)
        self._output = next(n for n in reversed(lora.graph.nodes) if n.op == "output")
        self._steep = gradient_sources(lora, zeros=False)
        self._moved = self._backward(self._steep)
        values = value_sources(lora)
        self._leads = _closure(self._output, values)
        self._onward = _turned(values)

    @cached_property
    def _autograd(self) -> dict[Node, list[Node]]:
        return gradient_sources(self._lora)

    @cached_property
    def parameters(self) -> set[str]:
        """The names of the parameters a gradient arrives at."""
        first = {id(p): n for n, p in self._lora.named_parameters()}
        return {
            first[id(p)]
            for node in self._backward(self._autograd)
            for p in _read(self._lora, node)
            if p.requires_grad
        }

    def _backward(self, sources: dict[Node, list[Node]]) -> set[Node]:
        """Returns every node a gradient arrives at."""
        kept = {n: [s for s in of if self._flags[s]] for n, of in sources.items()}
        return _closure(self._output, kept)

    # ---- one site

    def effect(self, planned: PlannedSite, adapter: str) -> Effect:
        """Returns the effect of one adapter at one site."""
        own = self._own_nodes(planned, adapter)
        past = tuple(c.node.name for c in planned.site.calls if not planned.reaches(c))
        adapted = len(planned.site.calls) - len(past)
        verdict, witness, reason = self._verdict(planned, own, past, adapted)
        return Effect(planned.name, adapter, verdict, adapted, past, witness, reason)

    def _own_nodes(self, planned: PlannedSite, adapter: str) -> list[Node]:
        return self._own.get((planned.name, adapter), [])

    def _verdict(
        self, planned: PlannedSite, own: list[Node], past: tuple[str, ...], adapted: int
    ) -> tuple[str, tuple[str, ...], str]:
        if not planned.site.calls:
            return "inert", (), "the layer is never called on the traced path"
        if not own:
            return "bypassed", (), f"its weight is read past the module, by {', '.join(past[:3])}"
        # A gradient also passes through a frozen adapter, on its way to those before it.
        arrived = next((n for n in own if n in self._moved and self._trains(n)), None)
        if arrived is not None:
            shared = f"; shared by {adapted} calls" if adapted > 1 else ""
            path = self._path(arrived)
            if past:
                more = (
                    f"{count(len(past), 'call')} of the weight not adapted: {', '.join(past[:3])}"
                )
                return "partial", path, more + shared
            return "live", path, "its gradient arrives" + shared
        leading = [n for n in own if n in self._leads]
        if not leading:
            return "dead", (), "nothing that leads to an output uses what it computes"
        start = next((n for n in leading if self._trains(n)), None)
        if start is None:
            return "cut", (leading[0].name,), _FROZEN
        cut = self._cut(start)
        return "cut", _names(cut), self._why(cut)

    def _trains(self, node: Node) -> bool:
        return any(p.requires_grad for p in _read(self._lora, node))

    def _path(self, start: Node) -> tuple[str, ...]:
        """Returns a shortest way from a node with a gradient to the output."""
        return _names(_back(start, self._next)[::-1])

    @cached_property
    def _next(self) -> dict[Node, Node | None]:
        """For every node with a gradient, the next one on a shortest way to the output."""
        found: dict[Node, Node | None] = {self._output: None}
        todo = deque([self._output])
        while todo:
            at = todo.popleft()
            for source in self._steep[at]:
                if source not in found and source in self._moved:
                    found[source] = at
                    todo.append(source)
        return found

    def _cut(self, start: Node) -> list[Node]:
        """Returns a shortest way towards the output, up to the first node no gradient passes."""
        came: dict[Node, Node | None] = {start: None}
        todo = deque([start])
        while todo:
            at = todo.popleft()
            if not self._flags[at]:
                return _back(at, came)
            for onward in self._onward[at]:
                if onward in came or onward not in self._leads:
                    continue
                came[onward] = at
                if at not in self._steep[onward]:
                    return _back(onward, came)
                todo.append(onward)
        raise AssertionError(f"a gradient arrives at {start.name}")

    def _why(self, path: list[Node]) -> str:
        at = path[-1]
        if not self._on[at]:
            return f"{at.name} runs under torch.no_grad()"
        what = target_name(at) or str(at.target)
        if self._flags[at] and len(path) > 1 and path[-2] in self._autograd[at]:
            return f"the derivative of {what!r} is zero everywhere ({at.name})"
        return f"no gradient passes {what!r} ({at.name})"


def _closure(start: Node, sources: dict[Node, list[Node]]) -> set[Node]:
    """Returns a node and all it follows from."""
    found = {start}
    todo = [start]
    while todo:
        for source in sources[todo.pop()]:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _turned(sources: dict[Node, list[Node]]) -> dict[Node, list[Node]]:
    """Returns, for every node, those that follow from it."""
    onward: dict[Node, list[Node]] = {n: [] for n in sources}
    for node, of in sources.items():
        for source in of:
            onward[source].append(node)
    return onward


def _back(end: Node, came: dict[Node, Node | None]) -> list[Node]:
    path = []
    at: Node | None = end
    while at is not None:
        path.append(at)
        at = came[at]
    return path[::-1]


def _names(path: list[Node]) -> tuple[str, ...]:
    """Returns the names along a way, with the call between an argument and one of several results."""
    names = []
    for node, onward in zip(path, [*path[1:], None], strict=True):
        names.append(node.name)
        if onward is None or node in onward.all_input_nodes or not onward.args:
            continue
        call = onward.args[0]
        if isinstance(call, Node) and node in call.all_input_nodes:
            names.append(call.name)
    return tuple(names)


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
