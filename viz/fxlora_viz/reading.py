"""Facts of one fx graph that the picture needs: parameters, owners, flags, plumbing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxlora.facts import KEY, TraceInfo
from fxlora.rewrite import part_paths
from fxlora_viz import ops
from fxlora_viz.picture import Weight

Frames = tuple[tuple[str, int], ...]
_ADAPTER_ROLES = ("lora_A", "lora_B", "cast", "dropout", "saved")


class Reading:
    """Answers questions about the nodes of one graph module; changes nothing."""

    def __init__(self, graph_module: GraphModule) -> None:
        """Reads a graph module once."""
        self.graph_module = graph_module
        self.nodes: tuple[Node, ...] = tuple(graph_module.graph.nodes)
        found = getattr(graph_module, "meta", {}).get(KEY)
        self.info = found if isinstance(found, TraceInfo) else TraceInfo("", {})
        self.grad = _gradients(graph_module)
        self._weights: dict[Node, tuple[tuple[int, Weight], ...]] = {}
        self._parameters = dict(graph_module.named_parameters(remove_duplicate=False))
        self._adapters = self._adapter_prefixes()
        self._of_adapters = {
            id(p) for name, p in self._parameters.items() if name.startswith(self._adapters)
        }
        self._owners = self._owner_paths()
        self.plumbing = self._plumbing()

    # ---- modules -----------------------------------------------------------------------------

    def frames(self, node: Node) -> Frames:
        """Returns the module calls around a node, outermost first, without the root."""
        stack = node.meta.get("module_stack", ())
        return tuple((f.path, f.call) for f in stack if f.path)

    def type_name(self, path: str) -> str:
        """Returns the class name of a module path; "" when nobody knows it."""
        known = self.info.module_types.get(path)
        if known is not None:
            return known.__name__
        module = self.module(path)
        return type(module).__name__ if module is not None else ""

    def module(self, path: str) -> nn.Module | None:
        """Returns the module at a path of the graph module; None where the graph keeps none."""
        try:
            return self.graph_module.get_submodule(path)
        except AttributeError:
            return None

    def is_simple(self, path: str) -> bool:
        """Whether no module below `path` owns a parameter: it is drawn as one node."""
        return path not in self._owners

    # ---- parameters --------------------------------------------------------------------------

    def weights(self, node: Node) -> tuple[tuple[int, Weight], ...]:
        """Returns (identity, weight) of the parameters a node reads; adapters only for their own."""
        if node.op not in ("get_attr", "call_module"):
            return ()
        if node not in self._weights:
            self._weights[node] = tuple(self._read(node))
        return self._weights[node]

    def _read(self, node: Node) -> Iterator[tuple[int, Weight]]:
        if node.op == "get_attr":
            p = self._parameters.get(str(node.target))
            if p is not None:
                yield id(p), _weight(str(node.target), p)
        elif node.op == "call_module":
            module = self.module(str(node.target))
            own = str(node.target).startswith(self._adapters) if self._adapters else False
            for name, p in module.named_parameters() if module is not None else ():
                full = f"{node.target}.{name}"
                if own or id(p) not in self._of_adapters:  # by identity: a layer has two names
                    yield id(p), _weight(full, p)

    def totals(self) -> tuple[int, int]:
        """Returns (trainable, all) parameters; a tied weight counts once."""
        every = list(self.graph_module.parameters())
        return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)

    def _adapter_prefixes(self) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for plan in self.info.adapters.values():  # adapters that are not active hang there too
            for path in part_paths(plan):
                found[path + "."] = found[path] = None
        for node in self.nodes:
            if node.meta.get("role") in _ADAPTER_ROLES and node.op in ("call_module", "get_attr"):
                path = str(node.target)
                found[path.removesuffix(".weight") + "."] = None
                found[path] = None
        return tuple(found)

    def _owner_paths(self) -> frozenset[str]:
        """Returns every path with a parameter owner strictly below it; adapters do not count."""
        found: set[str] = set()
        for name, p in self._parameters.items():
            if id(p) in self._of_adapters:
                continue
            owner = name.rpartition(".")[0]
            while owner:
                owner = owner.rpartition(".")[0]
                found.add(owner)
        return frozenset(found)

    # ---- plumbing ----------------------------------------------------------------------------

    def _plumbing(self) -> frozenset[Node]:
        """Returns the nodes through which no tensor flows."""
        found: set[Node] = set()
        for node in self.nodes:
            if ops.is_plumbing_name(node) or self._is_switch(node):
                found.add(node)
            elif node.op in ("call_function", "call_method") and "dtype" not in node.meta:
                inputs = node.all_input_nodes
                # Arithmetic on sizes: int results only, and nothing but sizes go in.
                if inputs and all(n in found for n in inputs):
                    found.add(node)
        return frozenset(found)

    def _is_switch(self, node: Node) -> bool:
        if node.op != "call_module":
            return node.op == "get_attr" and node.meta.get("role") in ("cast", "dropout")
        module = self.module(str(node.target))
        return ops.is_plumbing_module(type(module).__name__)


def _weight(name: str, parameter: nn.Parameter) -> Weight:
    shape = tuple(int(d) for d in parameter.shape)
    return Weight(name, shape, parameter.requires_grad, parameter.numel())


def _gradients(graph_module: GraphModule) -> dict[Node, bool]:
    """Returns the flags of `fxlora.gradients`, or none where there is no such module."""
    try:
        from fxlora.gradients import requires_grad
    except ImportError:
        return {}
    return requires_grad(graph_module)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Node]]:
    """Yields (name, node) for every node in an output, named as the model names it."""
    if isinstance(value, Node):
        if isinstance(value.target, type) and value.op == "call_function":
            yield from leaves({**dict(enumerate(value.args)), **value.kwargs}, name)
        else:
            yield name, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from leaves(v, name or str(key))
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            many = len(value) > 1 and not name
            yield from leaves(v, f"output {i}" if many else name)
