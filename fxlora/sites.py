"""GraphModule -> linear sites: every weight a linear map reads, and every call that reads it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxlora.errors import TraceError
from fxlora.facts import info
from fxlora.trace.shell import is_conv1d, tree

# Functions that multiply by a weight, and at which argument.
_WEIGHT_ARGUMENT: dict[Any, tuple[int, ...]] = {
    F.linear: (1,),
    F.bilinear: (2,),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.mv: (0, 1),
    operator.matmul: (0, 1),
    torch.addmm: (1, 2),
    torch.addmv: (1,),
    torch.baddbmm: (1, 2),
    torch.addbmm: (1, 2),
    torch.tensordot: (0, 1),
    torch.inner: (0, 1),
    F.multi_head_attention_forward: (5, 11),
    F.embedding: (1,),
    F.conv1d: (1,),
    F.conv2d: (1,),
    F.conv3d: (1,),
    torch.conv1d: (1,),
    torch.conv2d: (1,),
    torch.conv3d: (1,),
}
# Of these, what is no linear map of a matrix: a bare parameter read so is not for LoRA.
_NOT_LINEAR = frozenset("embedding conv1d conv2d conv3d".split())
_METHODS = frozenset("matmul mm bmm mv addmm baddbmm addbmm __matmul__ __rmatmul__ inner".split())
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))
# Operations a weight passes through on its way to the multiplication.
_TRANSPARENT = frozenset(
    "t T mT H adjoint transpose permute view reshape contiguous to type type_as float half bfloat16 "
    "double unsqueeze squeeze expand flatten getitem chunk split unbind getattr index_select clone "
    "detach data alias swapaxes movedim select narrow".split()
)


@dataclass(frozen=True)
class Call:
    """One node that multiplies by a site's weight.

    Attributes:
        node: the node of the traced graph.
        path: the name of the module whose call this is (an alias keeps its own name).
        through_module: False when the weight is read without calling the module that owns it, or by
            a name at which PEFT's wrapper does not stand; PEFT does not reach such a call.
    """

    node: Node
    path: str
    through_module: bool


@dataclass(frozen=True)
class Site:
    """One linear map of a traced model, and every place the graph calls it.

    A module used twice is one site with two calls, because LoRA adapts weights: both calls must
    read the same lora_A and lora_B, or merging is ill-defined.

    Attributes:
        name: the module's first name; for a bare parameter the parameter's.
        kind: the class a rewrite treats it as: "Linear", "Conv1D", "Embedding", "Conv1d",
            "Conv2d", "Conv3d", "MultiheadAttention" or "Parameter".
        type_name: the class name of the module, or "Parameter".
        in_features, out_features: of the map as PEFT counts them.
        shape: of the weight.
        bias: whether the layer has one.
        calls: every call, in the order of the graph; empty when the traced path has none.
        aliases: the module's other names.
        transposed: whether a stack of weights is stored as (experts, in, out).
        of: the name of the layer this is a part or a single call of; "" for a layer itself.
        rows: the output features of that layer which are this part's; empty for all.
        reached: the names by which a call gets to PEFT's wrapper, the first name first: PEFT replaces
            the child of one parent, and a parent may have several names itself. Of a parameter: the
            names of the module that owns it.
    """

    name: str
    kind: str
    type_name: str
    in_features: int
    out_features: int
    shape: tuple[int, ...]
    bias: bool
    calls: tuple[Call, ...]
    aliases: tuple[str, ...] = ()
    transposed: bool = False
    of: str = ""
    rows: tuple[range, ...] = ()
    reached: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The name of the layer that has the weight."""
        return self.of or self.name

    @property
    def weight_name(self) -> str:
        """The name of the weight in the traced graph."""
        if self.kind == "Parameter":
            return self.name
        if self.kind == "MultiheadAttention":
            return f"{self.owner}.in_proj_weight"
        return f"{self.owner}.weight" if self.owner else "weight"


class Places:
    """By which names a call of a module gets to the wrapper PEFT puts in its place.

    Args:
        live: the modules of the model by every name.
    """

    def __init__(self, live: dict[str, nn.Module]) -> None:
        self._first: dict[int, str] = {}
        self._names: dict[tuple[int, str], list[str]] = {}
        self._live = live
        for name, module in live.items():
            self._first.setdefault(id(module), name)
            self._names.setdefault(self.place(name), []).append(name)

    def place(self, path: str) -> tuple[int, str]:
        """Returns the place a name leads to: a parent object, and the name of its child."""
        parent, _, last = path.rpartition(".")
        return id(self._live[parent]), last

    def reached(self, name: str) -> tuple[str, ...]:
        """Returns those names, for a module by any of its own."""
        module = self._live.get(name)
        if module is None:
            return (name,)
        return tuple(self._names[self.place(self._first[id(module)])])


def kind_of(module_type: type) -> str | None:
    """Returns the kind of layer PEFT would adapt a class as; None for any other class."""
    for kind, base in (
        ("Embedding", nn.Embedding),
        ("Conv2d", nn.Conv2d),
        ("Conv3d", nn.Conv3d),
        ("Conv1d", nn.Conv1d),
        ("MultiheadAttention", nn.MultiheadAttention),
        ("Linear", nn.Linear),
    ):
        if issubclass(module_type, base):
            return kind
    return "Conv1D" if is_conv1d(module_type) else None


def sites(graph_module: GraphModule) -> tuple[Site, ...]:
    """Finds every site of a traced graph, called or not, in the order of its modules.

    Args:
        graph_module: what `fxlora.trace` returned.

    Returns:
        Sites of every layer kind PEFT can adapt, and of every 2-D or 3-D parameter that a linear
        function reads without such a layer around it.
    """
    facts = info(graph_module)
    types = facts.module_types
    held = dict(tree(graph_module))
    live = dict(tree(facts.model))
    names: dict[int, list[str]] = {}
    for name, m in held.items():
        names.setdefault(id(m), []).append(name)
    places = Places(live)
    calls = _calls(graph_module, places)
    found = []
    covered: set[str] = set()
    for aliases in names.values():
        kind = kind_of(types[aliases[0]]) if aliases[0] in types else None
        if kind is None:
            continue
        parameters = [n for alias in aliases for n in _parameter_names(held[alias], alias)]
        _check_unchanged(live.get(aliases[0]), types[aliases[0]], aliases[0])
        type_name = types[aliases[0]].__name__
        reached = places.reached(aliases[0])
        found.append(_module_site(live, aliases, kind, type_name, calls, parameters, reached))
        covered.update(parameters)
    found += _bare(graph_module, calls, covered, places, names)
    return tuple(found)


def _check_unchanged(now: nn.Module | None, then: type, name: str) -> None:
    """Refuses a model that got other layers after it was traced, as get_peft_model gives it."""
    if not isinstance(now, then):
        what = "gone" if now is None else f"now {type(now).__module__}.{type(now).__qualname__}"
        raise TraceError(
            f"the model was changed after it was traced: {name!r} was {then.__name__} and is {what}. "
            "get_peft_model changes the model it is given: give it copy.deepcopy(model), or trace "
            "the model again"
        )


def _parameter_names(module: nn.Module, name: str) -> Iterator[str]:
    for inner, _ in module.named_parameters():
        yield f"{name}.{inner}" if name else inner


def _module_site(
    live: dict[str, nn.Module], aliases: list[str], kind: str, type_name: str,
    calls: dict[str, list[Call]], parameters: list[str], reached: tuple[str, ...],
) -> Site:  # fmt: skip
    name = aliases[0]
    # The live module: a graph keeps of a non-leaf (nn.MultiheadAttention) its tensors only.
    module: Any = live[name]
    weight = module.in_proj_weight if kind == "MultiheadAttention" else module.weight
    shape = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
    own = [Call(c.node, c.path, a in reached) for a in aliases for c in calls.get(a, ())]
    projections = tuple(f"{alias}.out_proj.".removeprefix(".") for alias in aliases)
    for parameter in parameters:
        if kind == "MultiheadAttention" and parameter.startswith(projections):
            continue  # a layer of its own
        if parameter in calls and parameter.rpartition(".")[2] != "bias":
            own += [c for c in calls[parameter] if c not in own]
    own.sort(key=lambda c: c.node)
    in_features, out_features = _features(module, kind, shape)
    bias = getattr(module, "in_proj_bias" if kind == "MultiheadAttention" else "bias", None)
    return Site(
        name, kind, type_name, in_features, out_features, shape, bias is not None,
        tuple(own), tuple(aliases[1:]), reached=reached,
    )  # fmt: skip


def _features(module: Any, kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns (in, out) as peft.tuners.tuners_utils._get_in_out_features does."""
    if kind == "Linear" and hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if kind == "Conv1D":
        return shape[0], shape[1]
    if kind == "Embedding":
        return module.num_embeddings, module.embedding_dim
    if kind == "MultiheadAttention":
        return module.embed_dim, 3 * module.embed_dim
    if kind.startswith("Conv"):
        return module.in_channels, module.out_channels
    return shape[1], shape[0]


def _bare(
    root: nn.Module, calls: dict[str, list[Call]], covered: set[str], places: Places,
    names: dict[int, list[str]],
) -> list[Site]:  # fmt: skip
    found = []
    for name, p in root.named_parameters():
        if name in covered or p.dim() not in (2, 3):
            continue
        owner, _, last = name.rpartition(".")
        aliases = names[id(root.get_submodule(owner))]
        own = [c for a in aliases for c in calls.get(f"{a}.{last}" if a else last, ())]
        if not own or any(_name(c.node) in _NOT_LINEAR for c in own):
            continue
        own.sort(key=lambda c: c.node)
        shape = tuple(p.shape)
        in_features, out_features = (shape[1], shape[0]) if p.dim() == 2 else shape[1:]
        found.append(
            Site(name, "Parameter", "Parameter", in_features, out_features, shape, False,
                 tuple(own), reached=places.reached(owner))
        )  # fmt: skip
    return found


def _calls(graph_module: GraphModule, places: Places) -> dict[str, list[Call]]:
    """Returns module or parameter name -> its calls."""
    found: dict[str, list[Call]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            found.setdefault(target, []).append(Call(node, target, True))
        elif node.op == "get_attr":
            for consumer in _consumers(node):
                name = str(node.target)
                reached = places.reached(name.rpartition(".")[0])
                found.setdefault(name, []).append(_functional(consumer, reached))
    return found


def _functional(node: Node, reached: tuple[str, ...]) -> Call:
    stack = node.meta.get("module_stack", ())
    # PEFT wraps the module that owns the parameter, and is in effect while that module runs.
    inside = any(f.path in reached for f in stack) if reached != ("",) else False
    return Call(node, stack[-1].path if stack else "", inside)


def _consumers(source: Node) -> Iterator[Node]:
    """Yields the linear functions a parameter reaches through reshapes, casts and slices."""
    seen: set[Node] = set()
    todo = [source]
    while todo:
        at = todo.pop(0)
        for user in at.users:
            if user in seen:
                continue
            if _multiplies_by(user, at):
                seen.add(user)
                yield user
            elif _is_transparent(user, at):
                seen.add(user)
                todo.append(user)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]


def _is_transparent(user: Node, at: Node) -> bool:
    return _name(user) in _TRANSPARENT and bool(user.args) and user.args[0] is at


def _multiplies_by(user: Node, weight: Node) -> bool:
    if user.op == "call_method":
        return user.target in _METHODS
    if user.op != "call_function":
        return False
    if _name(user) in _GROUPED:
        return len(user.args) > 1 and user.args[1] is weight
    if user.target is torch.functional.einsum or user.target is torch.einsum:
        return True
    positions = _WEIGHT_ARGUMENT.get(user.target)
    if positions is None:
        return False
    named = {"weight": user.kwargs.get("weight"), "mat2": user.kwargs.get("mat2")}
    return any(i < len(user.args) and user.args[i] is weight for i in positions) or any(
        v is weight for v in named.values()
    )
