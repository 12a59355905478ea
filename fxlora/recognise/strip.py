"""A graph without the low-rank pairs in it: what is added is zero, DoRA's gain is one.

The rest is arithmetic: 0 + y is y, 0 * y is 0, (1 - 1) * y is 0, and what nobody reads goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from fxlora.errors import AdapterError
from fxlora.facts import KEY, TraceInfo
from fxlora.recognise.found import LowRank
from fxlora.recognise.match import recognise
from fxlora.recognise.reading import ADDS, CASTS, DIVS, MULS, SUBS, TURNS, VIEWS, name_of
from fxlora.recognise.rows import INTO_ROWS, PARTS, sides
from fxlora.trace.bulk import copy_graph
from fxlora.trace.shell import shell
from fxlora.trace.tracer import graph_module

G = TypeVar("G", bound=GraphModule | ExportedProgram)
_ZERO, _ONE = "zero", "one"
_ROLES = ("role", "site", "adapter")


def strip(graph: G) -> G:
    """Returns a new graph without the low-rank pairs that `recognise` finds in it.

    Base weights are shared with the graph it came from, which is not changed; the factors, and
    what only they needed, are gone. The new graph computes the base model's bits.

    Args:
        graph: as for `recognise`; read.

    Raises:
        AdapterError: when a factor or a product is read by something else too.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> traced = fxlora.trace(model)
    >>> strip(fxlora.rewrite(traced, LoraConfig(target_modules=["0"]))).code == traced.code
    True
    """
    return cast(G, _Strip(graph, recognise(graph)).run())


class _Strip:
    """One simplification of one graph."""

    def __init__(self, graph: Any, pairs: tuple[LowRank, ...]) -> None:
        self._old, self._pairs = graph, pairs
        self._graph, self._new = copy_graph(graph.graph)
        for node, made in self._new.items():
            made.name = node.name  # an export's signature names its nodes, also one called "input"
        self._values: dict[Node, Any] = {}  # node -> _ZERO, _ONE, or the node it comes to
        new = self._new.__getitem__
        self._zeros = {new(p.up) for p in pairs}
        self._ones = {new(g) for p in pairs for g in p.gains}
        self._ways = {new(n) for p in pairs for n in (*p.between, p.out, p.up)}

    def run(self) -> Any:
        """Returns the new graph, of the kind it was given."""
        had_users = {n for n in self._graph.nodes if n.users}
        for node in self._graph.nodes:
            self._visit(node)
        self._redirect()
        gone = self._erase(had_users)
        self._check(gone)
        for node in self._graph.nodes:
            for key in _ROLES:
                node.meta.pop(key, None)
        if isinstance(self._old, ExportedProgram):
            return self._exported()
        return self._module(gone)

    # ---- arithmetic

    def _value(self, arg: Any) -> Any:
        return self._values.get(arg, arg) if isinstance(arg, Node) else arg

    def _visit(self, node: Node) -> None:
        if node in self._zeros:
            fused = name_of(node) in ("baddbmm", "addmm") and node in self._ways
            is_sum = fused and any(self._new[p.out] is node for p in self._pairs)
            self._values[node] = self._value(node.args[0]) if is_sum else _ZERO
            return
        if node in self._ones:
            self._values[node] = _ONE
            return
        values = [self._value(a) for a in node.args]
        made = self._simplified(node, values)
        if made is not None:
            self._values[node] = made

    def _simplified(self, node: Node, values: list[Any]) -> Any:
        name = name_of(node)
        if not values:
            return None
        first = values[0]
        known = any(isinstance(v, str) and v in (_ZERO, _ONE) and isinstance(a, Node)
                    for v, a in zip(values, node.args, strict=True))  # fmt: skip
        if not known:
            return self._idle_cast(node, name, first)
        if name in INTO_ROWS:
            return first if self._value(sides(node)[1]) is _ZERO else None
        if name in CASTS | VIEWS | TURNS | PARTS or name in ("neg", "dropout", "expand"):
            return first if first in (_ZERO, _ONE) else None
        if name in ADDS and _ZERO in values:
            return values[1] if first is _ZERO else first
        if name in SUBS and len(values) > 1:
            if first is _ONE and values[1] == 1:
                return _ZERO
            return first if values[1] is _ZERO else None
        if name in MULS and len(values) > 1:
            if _ZERO in values:
                return _ZERO
            return values[1] if first is _ONE else first
        return _ZERO if name in DIVS and first is _ZERO else None

    def _idle_cast(self, node: Node, name: str, first: Any) -> Any:
        """A cast to the base's own dtype, whatever that is: it was there for the branch."""
        if name != "cast_like" or not isinstance(first, Node) or first is node.args[0]:
            return None
        return first if self._value(node.args[1]) is first else None

    # ---- nodes

    def _redirect(self) -> None:
        for old, value in self._values.items():
            if isinstance(value, Node) and value is not old:
                old.replace_all_uses_with(value, propagate_meta=False)
                for node in self._graph.nodes:
                    if old in node.meta.get("mutates", ()):
                        node.meta["mutates"] = tuple(
                            value if n is old else n for n in node.meta["mutates"]
                        )

    def _erase(self, had_users: set[Node]) -> list[Node]:
        gone = []
        for node in reversed(list(self._graph.nodes)):
            if node.op in ("placeholder", "output") or node.users:
                continue
            lost = node in had_users or node in self._values
            asserts = name_of(node) == "_assert_tensor_metadata" and any(
                a in self._values for a in node.all_input_nodes
            )
            if lost or asserts:
                gone.append(node)
                self._graph.erase_node(node)
        return gone

    def _check(self, gone: list[Node]) -> None:
        left = [n for n in self._values if n not in gone]
        for node in left:
            reader = next(iter(node.users), node)
            pair = next((p for p in self._pairs if self._new[p.up] is node), self._pairs[0])
            raise AdapterError(
                f"{pair.site!r}: the product of {pair.a!r} and {pair.b!r} is also read by "
                f"{reader.name!r}, which is no sum with a linear map of the same input; without the "
                "pair that has no value. Cut that use out of the model first"
            )
        read = {str(n.target) for n in self._graph.nodes if n.op in ("get_attr", "call_module")}
        for p in self._pairs:
            for name in (p.a, p.b):
                if name in read or name.rpartition(".")[0] in read:
                    raise AdapterError(
                        f"{p.site!r}: the factor {name!r} is read by something else too, so it cannot "
                        "be taken out of the graph. Cut that use out of the model first"
                    )

    # ---- what holds the graph

    def _module(self, gone: list[Node]) -> GraphModule:
        old = cast(GraphModule, self._old)
        facts = old.meta.get(KEY)
        root = shell(old)
        kept = {str(n.target) for n in self._graph.nodes if n.op in ("get_attr", "call_module")}
        names = [str(n.target) for n in gone if n.op in ("get_attr", "call_module")]
        if isinstance(facts, TraceInfo):
            from fxlora.rewrite import part_paths

            names += [p for plan in facts.adapters.values() for p in part_paths(plan)]
        bases = {p.weight for p in self._pairs}
        for name in dict.fromkeys(names):
            owner = name.rpartition(".")[0]
            used = any((k + ".").startswith(f"{name}.") for k in kept) or owner in kept
            if not used and name not in bases and f"{name}.weight" not in bases:
                _remove(root, name)
        if isinstance(facts, TraceInfo):
            plain = replace(facts, base=None, adapters={}, active=(), residuals={})
            return graph_module(root, self._graph, plain)
        made = GraphModule(root, self._graph, class_name=type(old).__name__)
        made.training = old.training
        made.graph.lint()
        return made

    def _exported(self) -> ExportedProgram:
        old = cast(ExportedProgram, self._old)
        signature = old.graph_signature
        names = {n for p in self._pairs for n in (p.a, p.b, p.b_bias, *p.scaled_by) if n}
        names |= {self._leaf_of(g) for p in self._pairs for g in p.gains}
        dead = {}
        for node in list(self._graph.nodes):
            target = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(
                node.name
            )
            if node.op == "placeholder" and target in names and not node.users:
                dead[node.name] = target
                self._graph.erase_node(node)
        outputs = [
            replace(s, arg=replace(s.arg, name=self._renamed(s.arg.name)))
            if hasattr(s.arg, "name") else s
            for s in signature.output_specs
        ]  # fmt: skip
        inputs = [s for s in signature.input_specs if getattr(s.arg, "name", None) not in dead]
        made = torch.export.graph_signature.ExportGraphSignature(inputs, outputs)
        module = GraphModule(old.graph_module, self._graph)
        module.meta.update(old.graph_module.meta)
        state = {k: v for k, v in old.state_dict.items() if k not in dead.values()}
        return old._update(module, made, state_dict=state)

    def _leaf_of(self, gain: Node) -> str:
        node: Any = gain.args[0]
        while isinstance(node, Node) and node.op != "placeholder":
            node = node.args[0]
        return str(self._old.graph_signature.inputs_to_parameters.get(node.name, ""))

    def _renamed(self, name: str) -> str:
        for node, value in self._values.items():
            if node.name == name and isinstance(value, Node):
                return value.name
        return name


def _remove(root: nn.Module, name: str) -> None:
    """Removes a part of a module tree, and the containers that hold nothing without it."""
    while name:
        owner, _, last = name.rpartition(".")
        try:
            parent = root.get_submodule(owner)
        except AttributeError:
            return
        for held in (parent._parameters, parent._buffers, parent._modules):
            cast(dict[str, Any], held).pop(last, None)
        bare = type(parent) in (nn.Module, nn.ModuleDict, nn.ParameterDict, nn.Linear)
        if parent._modules or parent._parameters or parent._buffers or not bare:
            return
        name = owner
