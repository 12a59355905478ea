"""Graphs as labelled DAGs, hashed from the inputs up: equal hashes, equal computation.

Every node's digest covers what it computes and the digests of what it reads, down to the names,
shapes, dtypes and flags of the parameters; nothing of how nodes are called or ordered. What
changes no value is passed through: a cast to the dtype a tensor has, nn.Identity, the guard.
In-place calls count as a new version of the tensor they change, and of what it views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxlora.dtypes import CASTS, true_dtypes
from fxlora.gradients import attribute, target_name
from fxlora.runtime import DoraBase
from fxlora.trace.guards import ByMode, InputGuards, TrainOnly

_VIEWS = frozenset(
    "view reshape transpose permute getitem unsqueeze squeeze expand t T mT chunk split unbind "
    "narrow select flatten alias view_as detach data".split()
)
_EFFECTS = frozenset(("enter_grad_mode", "leave_grad_mode"))
# Drawn and not used, a random number still shifts those drawn after it.
_DRAWS = frozenset("rand randn randint rand_like randn_like randint_like bernoulli normal".split())


@dataclass
class Canonical:
    """The canonical form of one graph.

    Attributes:
        digest: of outputs, effects and parameters together.
        outputs: the digest of what the graph returns.
        nodes: node -> digest, for the nodes that compute something.
        labels: node -> a line for a reader.
        parameters: name -> (shape, dtype, requires_grad).
    """

    digest: str = ""
    outputs: str = ""
    nodes: dict[Node, str] = field(default_factory=dict)
    labels: dict[Node, str] = field(default_factory=dict)
    parameters: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def canonical(
    graph_module: GraphModule, name: Callable[[str], str] = lambda n: n, mode: bool | None = None
) -> Canonical:
    """Computes the canonical form of a graph, in linear time.

    Args:
        graph_module: a graph made by fxlora, of a model or of a PEFT-wrapped one.
        name: turns a parameter's name in this graph into the name both sides share.
        mode: the one mode (train is True) the form shall stand for; None for both.
    """
    return _Canonicaliser(graph_module, name, mode).run()


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class _Canonicaliser:
    """One pass over one graph."""

    def __init__(
        self, graph_module: GraphModule, name: Callable[[str], str], mode: bool | None
    ) -> None:
        self._gm, self._name, self._mode = graph_module, name, mode
        self._dtype = true_dtypes(graph_module)
        self._first: dict[int, str] = {}
        self._out = Canonical()
        self._digest: dict[Node, str] = {}
        self._base: dict[Node, Node] = {}
        self._version: dict[Node, str] = {}
        self._effects: list[str] = []
        self._inputs = 0

    def run(self) -> Canonical:
        """Returns the finished form."""
        for n, p in self._gm.named_parameters():
            shared = self._name(n)
            self._first[id(p)] = shared
            self._out.parameters[shared] = (tuple(p.shape), str(p.dtype), p.requires_grad)
        for node in self._gm.graph.nodes:
            self._visit(node)
        table = sorted(self._out.parameters.items())
        self._out.digest = _hash(self._out.outputs, self._effects, table)
        return self._out

    def _visit(self, node: Node) -> None:
        if node.op == "output":
            self._out.outputs = _hash("output", self._arg(node.args[0]))
            return
        same = self._passes_through(node)
        if same is not None:
            self._digest[node] = self._digest[same]
            self._base[node] = self._base.get(same, same)
            return
        label, parts = self._parts(node)
        if label is None:
            self._digest[node] = _hash("nothing")
            return
        digest = _hash(*parts, node.meta.get("grad_enabled", True), node.meta.get("autocast"))
        self._digest[node] = digest
        self._out.nodes[node], self._out.labels[node] = digest, label
        if target_name(node) in _VIEWS and node.args and isinstance(node.args[0], Node):
            self._base[node] = self._base.get(node.args[0], node.args[0])
        self._note_effect(node, digest)

    def _note_effect(self, node: Node, digest: str) -> None:
        drawn = target_name(node) in _DRAWS and not node.users
        if target_name(node) in _EFFECTS or drawn or _is_kind(self._gm, node, TrainOnly):
            self._effects.append(digest)
        for changed in node.meta.get("mutates", ()):
            base = self._base.get(changed, changed)
            self._version[base] = _hash(self._version.get(base), digest)
            self._effects.append(digest)
            self._base[node] = base

    def _passes_through(self, node: Node) -> Node | None:
        """Returns the node whose value this one hands on unchanged, if it does."""
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if source is None:
            return None
        if node.op == "call_module":
            module = self._gm.get_submodule(str(node.target))
            if isinstance(module, DoraBase) and self._mode is False and node.args[1] is None:
                return source
            idle = isinstance(module, nn.Dropout) and (module.p == 0 or self._mode is False)
            return source if isinstance(module, nn.Identity) or idle else None
        if node.op in ("call_method", "call_function") and target_name(node) in CASTS:
            # Where a value lives is not what it is: a move to a device counts as no change.
            before, after = self._dtype[source], self._dtype[node]
            if before is not None and before == after:
                return source
        if target_name(node) == "requires_grad_" and target_name(source) == "detach":
            return source  # nn.Parameter(x) inside a forward: the values of x, cut off
        return None

    def _parts(self, node: Node) -> tuple[str | None, tuple[Any, ...]]:
        """Returns a label and what to hash; no label for a node that computes nothing."""
        if node.op == "placeholder":
            self._inputs += 1
            return f"input {node.target}", ("input", str(node.target), repr(node.args))
        if node.op == "get_attr":
            return self._attribute(node)
        args = (self._arg(node.args), self._arg(dict(node.kwargs)))
        if node.op == "call_module":
            return self._module(node, args)
        name = target_name(node)
        if name == "device":
            return None, ()
        if name in CASTS and self._dtype[node] is not None:
            # How a cast says its dtype (a constant, another tensor) is a matter of spelling.
            shown = str(self._dtype[node])
            return f"cast to {shown}", ("cast", shown, self._arg(node.args[0]))
        return f"{name}({self._shown(node)})", ("call", name, *args)

    def _attribute(self, node: Node) -> tuple[str, tuple[Any, ...]]:
        value = attribute(self._gm, str(node.target))
        if isinstance(value, nn.Parameter):
            shared = self._first.get(id(value), str(node.target))
            facts = self._out.parameters.get(shared, ())
            return f"parameter {shared}", ("parameter", shared, facts)
        shared = self._name(str(node.target))
        if "_tensor_constant" in shared:
            shared = "constant " + _content(value)
        return f"buffer {shared}", ("buffer", shared, tuple(value.shape), str(value.dtype))

    def _module(self, node: Node, args: tuple[Any, ...]) -> tuple[str | None, tuple[Any, ...]]:
        module = self._gm.get_submodule(str(node.target))
        if isinstance(module, InputGuards):
            return None, ()
        if isinstance(module, ByMode):
            if self._mode is not None:
                return None, ()  # a constant, where it is read
            values = (repr(module.train_value), repr(module.eval_value))
            return f"train {values[0]}, eval {values[1]}", ("mode", *values)
        if isinstance(module, DoraBase) and self._mode is not None:
            return self._dora_base(module, node)
        if isinstance(module, TrainOnly):
            function = getattr(module.function, "__name__", repr(module.function))
            if self._mode is not None:
                return ("call " + function, ("call", function, *args)) if self._mode else (None, ())
            return f"in train mode {function}", ("train only", function, *args)
        # By name: what removes a parametrization registers the weight anew, behind the bias.
        held = tuple(
            (k, None if p is None else self._held(p)) for k, p in sorted(module._parameters.items())
        )
        buffers = tuple(
            (k, tuple(b.shape)) for k, b in sorted(module._buffers.items()) if b is not None
        )
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        label = f"{type(module).__name__} {self._name(str(node.target))}"
        return label, ("module", kind, module.extra_repr(), held, buffers, *args)

    def _dora_base(self, module: DoraBase, node: Node) -> tuple[str, tuple[Any, ...]]:
        """Writes out what the module calls in the one mode that is asked for."""
        result, bias, x, weight = node.args
        if not self._mode:
            return "sub", ("call", "sub", self._arg((result, bias)), self._arg({}))
        if not module.settings:
            return "linear", ("call", "linear", self._arg((x, weight)), self._arg({}))
        name = ("conv1d", "conv2d", "conv3d")[len(module.settings["stride"]) - 1]
        settings = {"bias": None, **module.settings}
        return name, ("call", name, self._arg((x, weight)), self._arg(settings))

    def _held(self, p: nn.Parameter) -> tuple[Any, ...]:
        shared = self._first.get(id(p), "")
        return (shared, self._out.parameters.get(shared))

    def _arg(self, value: Any) -> Any:
        if isinstance(value, Node):
            if self._mode is not None and _is_kind(self._gm, value, ByMode):
                # A model that is traced in one mode has the constant of that mode there.
                made: Any = self._gm.get_submodule(str(value.target))
                return self._arg(made.train_value if self._mode else made.eval_value)
            base = self._base.get(value, value)
            return ("node", self._digest[value], self._version.get(base))
        if isinstance(value, (list, tuple)):
            return tuple(self._arg(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self._arg(v)) for k, v in value.items() if k != "device")
        if isinstance(value, slice):
            return ("slice", *map(self._arg, (value.start, value.stop, value.step)))
        if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
            return repr(value)
        return getattr(value, "__qualname__", None) or repr(type(value))

    def _shown(self, node: Node) -> str:
        constants = [repr(a) for a in node.args if isinstance(a, (int, float, str, bool))]
        return ", ".join([*(str(n) for n in node.all_input_nodes), *constants])


def _is_kind(root: GraphModule, node: Node, kind: type) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), kind)


def _content(value: torch.Tensor) -> str:
    """Returns a digest of a lifted constant: its values, where it has any."""
    if value.device.type == "meta":
        return f"{tuple(value.shape)} {value.dtype} without values"
    return _hash(tuple(value.shape), str(value.dtype), value.detach().cpu().tolist())


def first_difference(ours: Canonical, theirs: Canonical) -> tuple[str, str] | None:
    """Returns the first computation of each side that the other does not have; None if none."""
    a, b = set(ours.nodes.values()), set(theirs.nodes.values())
    mine = next((n for n, d in ours.nodes.items() if d not in b), None)
    other = next((n for n, d in theirs.nodes.items() if d not in a), None)
    if mine is None and other is None:
        return None

    def line(node: Node | None, labels: dict[Node, str]) -> str:
        if node is None:
            return "nothing"
        stack = node.meta.get("module_stack", ())
        at = node.meta.get("site") or (stack[-1].path if stack else "")
        return labels[node] + (f" in {at}" if at else "")

    return line(mine, ours.labels), line(other, theirs.labels)
