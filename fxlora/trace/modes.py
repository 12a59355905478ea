"""One graph for train and eval: two runs, laid over each other.

A model that asks `self.training` is run once in each mode. Where the two runs make the same calls
and differ in a constant (`dropout_p=0.1` or `0.0`), the constant becomes a `ByMode` module that
follows `train()` and `eval()`. A random draw made in train mode only, whose value goes nowhere,
becomes a `TrainOnly` module. Anything else is two different graphs: the one of the current mode
is kept and refuses to run in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from fxlora.errors import TraceError
from fxlora.facts import path_of
from fxlora.trace import repeats
from fxlora.trace.arguments import Rebuild
from fxlora.trace.guards import ByMode, TrainOnly

_RANDOM = frozenset("rand randn randint rand_like randn_like bernoulli uniform_ normal_".split())
_WINDOW = 64


@dataclass
class Merged:
    """What came of laying the two runs over each other.

    Attributes:
        mode: None when the graph follows both modes, else the one it stands for.
        reason: why not both; a clause for an error message.
        modules: path -> the ByMode and TrainOnly modules the graph now calls.
        inserted: the nodes that call them.
        notes: what a reader should know.
        graph: the graph; None where nothing had to be merged.
    """

    mode: bool | None = None
    reason: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inserted: dict[Node, None] = field(default_factory=dict)
    graph: Graph | None = None


class _Differ(Exception):
    """The two runs make different calls."""


def merge(now: Graph, mode: bool, other: Callable[[], Graph], taken: Container[str] = ()) -> Merged:
    """Makes `now`, recorded in `mode`, follow both modes; changes it in place.

    Blocks that both runs repeat are laid over each other where they were run; where one run repeats
    what the other ran itself, everything is written out first.

    Args:
        now: the graph recorded in the current mode.
        mode: True when that mode is train.
        other: records the graph of the other mode; may raise TraceError.
        taken: module names a new module may not have.
    """
    name = "eval" if mode else "train"
    try:
        there = other()
    except TraceError as e:
        note = f"stands for {'train' if mode else 'eval'} mode only: {e}"
        return Merged(mode=mode, reason=f" ({e})", notes=(note,))
    if not repeats.same(now, there):
        now, there = (repeats.written(g, {}, {})[0] for g in (now, there))
    try:
        return _Merge(now, there, mode, taken).run()
    except _Differ as e:
        note = f"{name} mode takes another path: {e}"
        return Merged(mode=mode, reason=f" ({e})", notes=(note,), graph=now)


def _signature(node: Node) -> Any:
    target: Any = "" if node.op == "output" else node.target
    if isinstance(target, Rebuild):
        target = target.__name__  # each run made its own
    if isinstance(target, repeats.Repeat):
        target = (target.path, target.block.path)
    return node.op, target, path_of(node)


def _align(a: list[Node], b: list[Node]) -> tuple[list[tuple[Node, Node]], list[Node], list[Node]]:
    pairs: list[tuple[Node, Node]] = []
    only_a: list[Node] = []
    only_b: list[Node] = []
    i = j = 0
    while i < len(a) and j < len(b):
        if _signature(a[i]) == _signature(b[j]):
            pairs.append((a[i], b[j]))
            i, j = i + 1, j + 1
            continue
        for k in range(1, _WINDOW):
            if i + k < len(a) and _signature(a[i + k]) == _signature(b[j]):
                only_a += a[i : i + k]
                i += k
                break
            if j + k < len(b) and _signature(a[i]) == _signature(b[j + k]):
                only_b += b[j : j + k]
                j += k
                break
        else:
            raise _Differ(f"at {a[i].meta.get('source', a[i].name)}")
    return pairs, only_a + a[i:], only_b + b[j:]


class _Merge:
    """Lays the graph of the other mode over the one that is kept."""

    def __init__(self, now: Graph, there: Graph, mode: bool, taken: Container[str]) -> None:
        self._now, self._mode, self._taken = now, mode, taken
        self._pairs, self._only_now, self._only_there = _align(list(now.nodes), list(there.nodes))
        self._twin = {b: a for a, b in self._pairs}
        self._modules: dict[str, nn.Module] = {}
        self._made: dict[tuple[str, str], Node] = {}
        self._counts: dict[str, int] = {}
        self._inserted: dict[Node, None] = {}

    def run(self) -> Merged:
        """Returns what was merged; raises `_Differ` before anything has been changed."""
        for extra in (self._only_now, self._only_there):
            _check_idle(extra)
        changes = [(a, *self._differences(a, b)) for a, b in self._pairs]
        for a, args, kwargs, differ in changes:
            if differ:
                a.args = self._switched(a, a.args, args)
                a.kwargs = self._switched(a, a.kwargs, kwargs)
        self._keep_draws()
        return Merged(modules=self._modules, inserted=self._inserted, graph=self._now)

    def _differences(self, a: Node, b: Node) -> tuple[Any, Any, bool]:
        args, kwargs = self._moved(b.args), self._moved(b.kwargs)
        differ = not (_equal(a.args, args) and _equal(a.kwargs, kwargs))
        if differ:
            _check_constants(a, a.args, args)
            _check_constants(a, dict(a.kwargs), dict(kwargs))
        return args, kwargs, differ

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self._twin.get(value, value)
        if isinstance(value, (list, tuple)):
            return tuple(self._moved(v) for v in value)
        if isinstance(value, dict):
            return {k: self._moved(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._moved, (value.start, value.stop, value.step)))
        return value

    def _switched(self, at: Node, here: Any, there: Any) -> Any:
        if _equal(here, there):
            return here
        if isinstance(here, (list, tuple)):
            parts = [self._switched(at, h, t) for h, t in zip(here, there, strict=True)]
            return type(here)(parts) if type(here) in (list, tuple) else tuple(parts)
        if isinstance(here, dict):
            return {k: self._switched(at, here[k], there[k]) for k in here}
        return self._constant(at, *((here, there) if self._mode else (there, here)))

    def _constant(self, at: Node, train: Any, eval_: Any) -> Node:
        owner = _owner(at)
        key = (owner, repr((train, eval_)))
        if key not in self._made:
            path = self._new_path(owner, "_by_mode")
            self._modules[path] = ByMode(train, eval_)
            with self._now.inserting_before(at):
                node = self._now.call_module(path)
            node.meta.update({k: v for k, v in at.meta.items() if k in ("source", "module_stack")})
            self._made[key] = node
            self._inserted[node] = None
        return self._made[key]

    def _new_path(self, owner: str, name: str) -> str:
        prefix = f"{owner}.{name}" if owner else name
        n = self._counts.get(owner, 0)
        while f"{prefix}_{n}" in self._taken:
            n += 1
        self._counts[owner] = n + 1
        return f"{prefix}_{n}"

    def _keep_draws(self) -> None:
        """Turns random draws that only train mode makes into TrainOnly modules."""
        extra = self._only_now if self._mode else self._only_there
        draws = [n for n in extra if getattr(n.target, "__name__", n.target) in _RANDOM]
        for node in draws:
            if any(isinstance(v, Node) for v in node.all_input_nodes):
                continue
            before = node if self._mode else self._after(node)
            with self._now.inserting_before(before):
                path = self._new_path(_owner(node), "_train_only")
                new = self._now.call_module(path, node.args, dict(node.kwargs))
            new.meta.update(node.meta)
            self._inserted[new] = None
            self._modules[path] = TrainOnly(node.target)
        for node in reversed(self._only_now):
            if not node.users:
                self._now.erase_node(node)

    def _after(self, node: Node) -> Node:
        """Returns the kept node in front of which a node of the other run belongs."""
        while node not in self._twin:
            node = node.next
        return self._twin[node]


def _owner(node: Node) -> str:
    stack = node.meta.get("module_stack", ())
    if node.op == "call_module":
        stack = stack[:-1]
    return str(stack[-1].path) if stack else ""


def _check_idle(nodes: list[Node]) -> None:
    """Raises `_Differ` unless nothing that both modes share reads these nodes."""
    inside = set(nodes)
    for node in nodes:
        used = [u for u in node.users if u not in inside]
        if used or node.meta.get("mutates") or node.op in ("placeholder", "output"):
            raise _Differ(f"at {node.meta.get('source', node.name)}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return type(a) is type(b) and bool(a == b)


def _check_constants(at: Node, a: Any, b: Any) -> None:
    """Raises `_Differ` unless `a` and `b` differ in plain constants only."""
    if _equal(a, b):
        return
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            _check_constants(at, x, y)
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for k in a:
            _check_constants(at, a[k], b[k])
    elif not isinstance(a, (bool, int, float, str, type(None))) or not isinstance(
        b, (bool, int, float, str, type(None))
    ):
        raise _Differ(f"at {at.meta.get('source', at.name)}")
