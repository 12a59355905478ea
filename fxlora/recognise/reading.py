"""How a graph says things: one reader for traced, symbolically traced and exported graphs.

A map, a cast, a scale has many spellings (a module, a method, a function, an operator, ATen's
before and after decomposition); what stands above this file sees one of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

CASTS = frozenset(
    "to _to_copy cast_like type type_as float half bfloat16 double contiguous clone detach alias "
    "lift_fresh_copy".split()
)
VIEWS = frozenset("view reshape _unsafe_view view_as reshape_as flatten unsqueeze squeeze".split())
TURNS = frozenset("t T mT H numpy_T transpose permute swapaxes adjoint".split())
ADDS = frozenset("add add_ iadd __add__ __radd__ __iadd__".split())
SUBS = frozenset("sub sub_ isub __sub__ __isub__ subtract".split())
MULS = frozenset("mul mul_ imul __mul__ __rmul__ __imul__ multiply".split())
DIVS = frozenset("div div_ truediv itruediv __truediv__ divide true_divide".split())
_DROPOUTS = frozenset("dropout dropout_ feature_dropout native_dropout dropout1d dropout2d dropout3d".split())  # fmt: skip
_NORMS = frozenset("norm linalg_norm vector_norm linalg_vector_norm".split())


def is_in_place(name: str) -> bool:
    """Whether an operation of this name writes into its first argument."""
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "iadd", "isub", "imul", "itruediv", "__iadd__", "__imul__", "__isub__",
    )  # fmt: skip


def name_of(node: Node) -> str:
    """Returns the bare name of what a node calls, without ATen's overload."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    if target is getattr:
        return str(node.args[1])
    return str(getattr(target, "__name__", target)).rpartition(".")[2]


def is_norm(node: Node) -> bool:
    """Whether a node takes a 2-norm: by name, or as torch 2.14 and later decompose one.

    There it is the power 0.5 of a sum of powers 2.
    """
    if name_of(node) in _NORMS:
        return True
    total = _power(node, 0.5)
    if total is None or name_of(total) != "sum":
        return False
    squares = total.args[0]
    return isinstance(squares, Node) and _power(squares, 2) is not None


def _power(node: Node, exponent: float) -> Node | None:
    """Returns what a node raises to a power; None when it does not."""
    if name_of(node) != "pow" or len(node.args) < 2 or node.args[1] != exponent:
        return None
    base = node.args[0]
    return base if isinstance(base, Node) else None


def shape_of(node: Any) -> tuple[str, ...] | None:
    """Returns a node's sizes as text; None where the graph knows no shapes."""
    meta = node.meta if isinstance(node, Node) else {}
    shape = meta.get("shape")
    if shape is None:
        held = meta.get("val", meta.get("tensor_meta"))
        shape = getattr(held, "shape", None)
    return None if shape is None else tuple(map(str, shape))


@dataclass
class Chain:
    """A way back from a node through what only scales, casts, drops out or reshapes.

    Attributes:
        end: the node it ends at.
        nodes: those it passed, from the start.
    """

    end: Node
    scale: float = 1.0
    named: list[str] = field(default_factory=list)
    dropout: float = 0.0
    gains: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    turned: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing on the way changed a value, but for casts."""
        return self.scale == 1 and not (self.named or self.gains or self.dropout)


class Reader:
    """Reads one graph; never writes."""

    def __init__(self, graph: GraphModule | ExportedProgram) -> None:
        self.root: nn.Module = graph.graph_module if isinstance(graph, ExportedProgram) else graph
        self.graph: Graph = graph.graph
        self._inputs: dict[str, tuple[str, Any]] = {}
        if isinstance(graph, ExportedProgram):
            s = graph.graph_signature
            held = {**graph.state_dict, **graph.constants}
            for names in (s.inputs_to_parameters, s.inputs_to_buffers,
                          s.inputs_to_lifted_tensor_constants):  # fmt: skip
                self._inputs |= {k: (n, held.get(n)) for k, n in names.items()}
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self._gains: dict[Node, bool] = {}

    # ---- leaves and numbers

    def leaf(self, node: Any) -> tuple[str, Any] | None:
        """Returns the name and the tensor of a node that reads one."""
        if not isinstance(node, Node):
            return None
        if node.op == "placeholder":
            found = self._inputs.get(str(node.target))
            return found if found and isinstance(found[1], torch.Tensor) else None
        if node.op != "get_attr":
            return None
        owner, _, last = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(owner), last, None)
        return (str(node.target), value) if isinstance(value, torch.Tensor) else None

    def factor(self, node: Any, views: bool = False) -> tuple[str, Any, Chain] | None:
        """Returns the parameter a node is, transposed, cast or scaled; None for anything else."""
        if not isinstance(node, Node):
            return None
        chain = self.back(node, turns=True, free_views=views)
        found = self.leaf(chain.end)
        if found is None or chain.gains or chain.dropout or not isinstance(found[1], nn.Parameter):
            return None
        return (*found, chain)

    def number(self, value: Any) -> tuple[float, list[str]] | None:
        """Returns a scalar as a number and the names of the tensors in it; None for no scalar."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value), []
        if not isinstance(value, Node):
            return None
        plain = self._computed(value)
        if isinstance(plain, (int, float)):
            return float(plain), []
        name = name_of(value)
        if name in ("tensor", "scalar_tensor") and isinstance(value.args[0], (int, float)):
            dtype: Any = value.kwargs.get("dtype")  # a number is rounded to what holds it
            return float(torch.tensor(value.args[0], dtype=dtype)), []
        if name in CASTS or name in VIEWS:
            return self.number(value.args[0])
        found = self.leaf(value)
        # A vector scales coordinates, which is linear too (KaSA's diagonal); a matrix is a weight.
        if found is not None and (found[1].dim() < 2 or found[1].numel() == 1):
            return 1.0, [found[0]]
        return None

    def _computed(self, value: Any) -> Any:
        """Returns a number that Python computes from constants and the shapes of leaves."""
        if not isinstance(value, Node):
            return value
        name, target = name_of(value), value.target
        if name in ("shape", "size", "dim"):
            found = self.leaf(value.args[0])
            if found is None:
                return None
            sizes = tuple(found[1].shape)
            if name == "dim":
                return len(sizes)
            return sizes[value.args[1]] if name == "size" and len(value.args) > 1 else sizes  # type: ignore[index]
        module = getattr(target, "__module__", "")
        if value.op == "call_function" and module in ("_operator", "operator", "math"):
            args = [self._computed(a) for a in value.args]
            if all(isinstance(a, (int, float, tuple)) for a in args):
                return target(*args)  # type: ignore[operator]
        return None

    # ---- ways back

    def back(self, node: Node, turns: bool = False, free_views: bool = False) -> Chain:
        """Walks back through scales, casts, dropout and reshapes that keep rows whole."""
        chain = Chain(node)
        while True:
            before = self.step(chain, turns, free_views)
            if before is None:
                return chain
            chain.nodes.append(chain.end)
            chain.end = before

    def step(self, chain: Chain, turns: bool = False, free_views: bool = False) -> Node | None:
        """Returns the node before a chain's end, with what it does written into the chain."""
        node = chain.end
        first = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "call_module":
            return self._idle(chain, self.root.get_submodule(str(node.target)), first)
        name = name_of(node)
        if name in MULS or name in DIVS:
            return self._scale(chain, node, name)
        if not isinstance(first, Node):
            return None
        if name in CASTS:
            return first
        if name in VIEWS and (free_views or keeps_rows(node, first)):
            return first
        if name == "expand" and shape_of(node) == shape_of(first) is not None:
            return first  # a decomposed matmul expands what is as large already
        if name in TURNS and turns:
            chain.turned = chain.turned != _swaps(node, name)
            return first
        if name == "neg":
            chain.scale = -chain.scale
            return first
        if name in _DROPOUTS:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            on = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            chain.dropout = float(p) if isinstance(p, (int, float)) and on is not False else 0.0
            return first
        if name == "getitem" and name_of(first) == "native_dropout" and node.args[1] == 0:
            return first
        return None

    def _idle(self, chain: Chain, module: nn.Module, first: Any) -> Node | None:
        if not isinstance(first, Node):
            return None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            chain.dropout = module.p
            return first
        return first if isinstance(module, nn.Identity) else None

    def _scale(self, chain: Chain, node: Node, name: str) -> Node | None:
        if len(node.args) < 2:
            return None
        left, right = node.args[:2]
        pairs = [(left, right)] if name in DIVS else [(left, right), (right, left)]
        for value, by in pairs:
            if not isinstance(value, Node):
                continue
            gain = self.gain(by)
            if gain is not None and name in MULS:
                chain.gains.append(gain)
                return value
            found = self.number(by)
            if found is None or (name in DIVS and (found[1] or found[0] == 0)):
                continue
            chain.scale = chain.scale / found[0] if name in DIVS else chain.scale * found[0]
            chain.named += found[1]
            return value
        return None

    def gain(self, value: Any) -> Node | None:
        """Returns the division m / |W + s B A| behind a node, through views and casts."""
        node = value
        while isinstance(node, Node) and name_of(node) in CASTS | VIEWS | TURNS:
            node = node.args[0]
        if not isinstance(node, Node) or name_of(node) not in DIVS or len(node.args) < 2:
            return None
        if node not in self._gains:
            self._gains[node] = self._is_gain(node)
        return node if self._gains[node] else None

    def _is_gain(self, node: Node) -> bool:
        top, below = node.args[:2]
        while isinstance(below, Node) and name_of(below) in CASTS | VIEWS | TURNS:
            below = below.args[0]
        if not isinstance(below, Node) or not is_norm(below):
            return False
        if not isinstance(top, Node) or self.factor(top, views=True) is None:
            return False
        leaves = self.leaves_of(below)
        return leaves is not None and len(leaves) >= 3

    def leaves_of(self, node: Node) -> set[str] | None:
        """Returns the names of the leaves a tensor is computed from; None when an input is one."""
        names: set[str] = set()
        todo, seen = [node], {node}
        while todo:
            at = todo.pop()
            found = self.leaf(at)
            if found is not None:
                names.add(found[0])
                continue
            if at.op == "placeholder":
                return None
            name = name_of(at)
            if name in ("device", "dtype", "shape", "size"):
                continue  # where a tensor lives is not what it holds
            if at.op == "call_module":
                names.update(f"{at.target}.{n}" for n, _ in self.module(at).named_parameters())
            reads = at.all_input_nodes[:1] if name in CASTS else at.all_input_nodes
            for n in reads:
                if n not in seen:
                    seen.add(n)
                    todo.append(n)
        return names

    def behind(self, nodes: list[Node]) -> set[Node]:
        """Returns the nodes that some nodes are computed from."""
        todo, seen = list(nodes), set(nodes)
        while todo:
            for n in todo.pop().all_input_nodes:
                if n not in seen:
                    seen.add(n)
                    todo.append(n)
        return seen

    def module(self, node: Node) -> nn.Module:
        """Returns the module a node calls."""
        return self.root.get_submodule(str(node.target))

    # ---- in-place writes

    def written(self, node: Node) -> Iterator[Node]:
        """Yields the nodes that write into a node's tensor, or into a view of it."""
        todo, seen = [node], {node}
        while todo:
            at = todo.pop()
            for user in at.users:
                if user in seen:
                    continue
                seen.add(user)
                name = name_of(user)
                first = user.args[0] if user.args else None
                own = first is at and (is_in_place(name) or name in ("__setitem__", "setitem"))
                if at in user.meta.get("mutates", ()) or own:
                    yield user
                if first is at and (name in VIEWS or name in TURNS or name == "getitem"):
                    todo.append(user)


def keeps_rows(node: Node, before: Node) -> bool:
    """Whether a reshape leaves the last dimension whole, as far as the graph knows."""
    now, was = shape_of(node), shape_of(before)
    if now and was:
        return now[-1] == was[-1]
    return name_of(node) in ("view", "reshape", "_unsafe_view") and bool(node.args[-1] != -1)


def _swaps(node: Node, name: str) -> bool:
    """Whether a transposition changes the order of the last two dimensions."""
    args: Any = node.args
    if name == "permute":
        dims = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return len(dims) >= 2 and bool(dims[-1] < dims[-2])
    return name not in ("transpose", "swapaxes") or bool(args[1] != args[2])
