"""GraphModule x plan -> a new GraphModule: base + scaling * B(A(dropout(x))) at every adapted call.

    y = W x + b   ->   y = W x + b + s * B(A(dropout(x)))        (Hu et al. 2021, arXiv 2106.09685)

For a bare parameter, where there is no input to act on, the weight itself is replaced:

    W             ->   W + s * B A                               (peft.tuners.lora.ParamWrapper)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from fxlora import adapters
from fxlora.facts import info
from fxlora.freezing import bias_trains
from fxlora.plan import ADAPTER, Plan, PlannedSite
from fxlora.plan import plan as make_plan
from fxlora.trace.shell import frozen_view, shell
from fxlora.trace.tracer import attach, graph_module


def cast_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns `x` in the dtype of `like`; `x` itself when it has it already.

    peft decides this at every call (BaseTunerLayer._cast_input_dtype), so a graph that is later
    moved to another dtype, or run under autocast, must decide it then too.
    """
    return x if x.dtype == like.dtype else x.to(like.dtype)


def baddbmm(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """Returns `weight + alpha * left @ right` in the dtype of `weight`, under autocast too.

    peft folds the factors of expert weights this way (peft.tuners.lora.layer._LoraFactorsProxy).
    """
    if weight.device.type == "meta":
        return torch.baddbmm(weight, left, right, alpha=alpha)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight, left, right, alpha=alpha)


# So that a saved GraphModule, which torch.fx traces again when it is loaded, keeps them whole.
torch.fx.wrap("cast_like")
torch.fx.wrap("baddbmm")


def rewrite(traced: GraphModule, plan: Plan | Any) -> GraphModule:
    """Returns a new graph module in which the planned sites are base plus low-rank.

    Base weights are shared with the traced graph without copying and frozen in the new graph's
    view only; the model and the traced graph are not changed. Adapters hang below their site as
    PEFT names them: `...q_proj.lora_A.default.weight`. Under one seed they hold peft's bits.

    Args:
        traced: what `fxlora.trace` returned.
        plan: what `fxlora.plan` returned for it, or a `peft.LoraConfig`.

    Returns:
        A `torch.fx.GraphModule`; its nodes keep their names and meta, and inserted nodes carry
        `meta["role"]`, `meta["site"]` and `meta["adapter"]`.

    Raises:
        ConfigError: as `fxlora.plan`, when a config is given.
        ValueError: when the plan was made for another graph.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(r=4, target_modules=["0"]))
    >>> [n for n, p in lora.named_parameters() if p.requires_grad]
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    if not isinstance(plan, Plan) or info(traced).plan is not None:
        plan = make_plan(traced, plan.config if isinstance(plan, Plan) else plan)
    nodes = {id(n) for n in traced.graph.nodes}
    for p in plan:
        if any(id(c.node) not in nodes for c in p.site.calls):
            raise ValueError(
                f"the plan was made for another graph ({p.name!r} is called by nodes this one does "
                "not have): plan again with fxlora.plan(traced, config)"
            )
    root = shell(traced, _views(traced, plan))
    graph, new = _copy(traced.graph)
    for planned in plan.adapted:
        _add_modules(root, planned, plan.config)
    for planned in plan.adapted:
        _insert(graph, root, planned, new)
    return graph_module(root, graph, replace(info(traced), plan=plan))


def _views(traced: GraphModule, plan: Plan) -> Callable[[nn.Parameter], nn.Parameter]:
    adapted = {p.name for p in plan.adapted if p.kind != "Parameter"}
    trains = {
        id(p) for n, p in traced.named_parameters() if bias_trains(n, plan.config.bias, adapted)
    }

    def view(p: nn.Parameter) -> nn.Parameter:
        made = frozen_view(p)
        made.requires_grad = id(p) in trains
        return made

    return view


def _copy(old: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Copies a graph node for node, keeping names and meta."""
    graph = Graph()
    new: dict[Node, Node] = {}
    for node in old.nodes:
        made = graph.node_copy(node, new.__getitem__)
        made.meta = dict(node.meta)
        new[node] = made
        if "mutates" in node.meta:
            made.meta["mutates"] = tuple(new[n] for n in node.meta["mutates"])
    return graph, new


def _add_modules(root: nn.Module, planned: PlannedSite, config: Any) -> None:
    owner, _, name = planned.site.weight_name.rpartition(".")
    weight = getattr(root.get_submodule(owner), name)
    if planned.prefix.endswith(".base_layer") and not _has(root, planned.prefix):
        attach(root, planned.prefix, nn.Module())
    for child, module in adapters.build(planned, weight, config).items():
        attach(root, f"{planned.prefix}.{child}", module)


def _weight(root: nn.Module, path: str) -> nn.Parameter:
    weight = root.get_submodule(path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _insert(graph: Graph, root: nn.Module, planned: PlannedSite, new: dict[Node, Node]) -> None:
    if planned.kind == "Parameter":
        _insert_delta(graph, planned, root, new)
        return
    for call in planned.site.calls:
        # PEFT puts the adapter where the first name of a module stands: an alias keeps the base.
        if call.through_module and call.node.op == "call_module":
            _insert_branch(graph, planned, new[call.node], root)


class _Inserter:
    """Adds nodes of one site, each with its role, behind one another."""

    def __init__(self, graph: Graph, planned: PlannedSite, like: Node) -> None:
        self._graph, self._planned, self._like = graph, planned, like
        self.last = like

    def add(
        self, role: str, op: str, target: Any, args: tuple[Any, ...], shape: Any, dtype: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> Node:  # fmt: skip
        """Adds a node; `shape` and `dtype` may be None where the trace knows none."""
        with self._graph.inserting_after(self.last):
            node = self._graph.create_node(op, target, args, kwargs or {})
        meta = node.meta
        for key in ("module_stack", "source", "grad_enabled"):
            if key in self._like.meta:
                meta[key] = self._like.meta[key]
        meta["role"], meta["site"], meta["adapter"] = role, self._planned.name, ADAPTER
        if shape is not None:
            meta["shape"] = shape
        if dtype is not None:
            meta["dtype"] = dtype
        self.last = node
        return node


def _insert_branch(graph: Graph, planned: PlannedSite, base: Node, root: nn.Module) -> None:
    x = base.args[0] if base.args else next(iter(base.kwargs.values()))
    base.meta.update(role="base", site=planned.name, adapter=ADAPTER)
    # Snapshot the users first: the sum below becomes a user of `base` too, and must keep reading
    # the base output rather than itself.
    users = list(base.users)
    prefix = planned.prefix
    weight = _weight(root, f"{prefix}.lora_A.{ADAPTER}")
    shape, dtype = base.meta.get("shape"), base.meta.get("dtype")
    x_shape = x.meta.get("shape") if isinstance(x, Node) else None
    inner = None if x_shape is None else (*x_shape[:-1], weight.shape[0])
    to = weight.dtype if dtype is not None else None
    new = _Inserter(graph, planned, base)
    a_weight = new.add("cast", "get_attr", f"{prefix}.lora_A.{ADAPTER}.weight", (),
                       tuple(weight.shape), weight.dtype)  # fmt: skip
    cast = new.add("cast", "call_function", cast_like, (x, a_weight), x_shape, to)
    drop = new.add("dropout", "call_module", f"{prefix}.lora_dropout.{ADAPTER}", (cast,),
                   x_shape, to)  # fmt: skip
    a = new.add("lora_A", "call_module", f"{prefix}.lora_A.{ADAPTER}", (drop,), inner, to)
    b = new.add("lora_B", "call_module", f"{prefix}.lora_B.{ADAPTER}", (a,), shape, to)
    scaled = new.add("scale", "call_method", "mul", (b, planned.scaling), shape, to)
    wide = None if dtype is None else torch.promote_types(dtype, weight.dtype)
    total = new.add("sum", "call_method", "add", (base, scaled), shape, wide)
    out = new.add("cast_back", "call_function", cast_like, (total, base), shape, dtype)
    _redirect(users, base, out)


def _redirect(users: list[Node], old: Node, new: Node) -> None:
    for user in users:
        user.replace_input_with(old, new)
        if old in user.meta.get("mutates", ()):
            user.meta["mutates"] = tuple(new if n is old else n for n in user.meta["mutates"])


def _open_layer(graph: Graph, call: Node, root: nn.Module) -> None:
    """Replaces the call of a Linear by F.linear, so that its weight can be another tensor."""
    path = str(call.target)
    layer = root.get_submodule(path)
    x = call.args[0] if call.args else next(iter(call.kwargs.values()))
    held: list[Node | None] = []
    for name in ("weight", "bias"):
        p = getattr(layer, name)
        if p is None:
            held.append(None)
            continue
        with graph.inserting_before(call):
            node = graph.get_attr(f"{path}.{name}")
        node.meta.update({k: v for k, v in call.meta.items() if k not in ("shape", "dtype")})
        node.meta["shape"], node.meta["dtype"] = tuple(p.shape), p.dtype
        held.append(node)
    with graph.inserting_before(call):
        made = graph.call_function(F.linear, (x, *held))
    made.meta = dict(call.meta)
    call.replace_all_uses_with(made)
    graph.erase_node(call)


def _insert_delta(
    graph: Graph, planned: PlannedSite, root: nn.Module, new: dict[Node, Node]
) -> None:
    """Replaces a parameter by W + s * B A wherever the module that owns it reads it."""
    owner = planned.name.rpartition(".")[0]
    for call in planned.site.calls:
        if call.node.op == "call_module":
            _open_layer(graph, new[call.node], root)
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == planned.name]:
        users = [
            u for u in node.users if any(f.path == owner for f in u.meta.get("module_stack", ()))
        ]
        if users:
            node.meta.update(role="base", site=planned.name, adapter=ADAPTER)
            out = _delta_nodes(graph, planned, node, root)
            _redirect(users, node, out)


def _delta_nodes(graph: Graph, planned: PlannedSite, base: Node, root: nn.Module) -> Node:
    new = _Inserter(graph, planned, base)
    shape, dtype = tuple(planned.site.shape), base.meta.get("dtype")
    names = [f"{planned.prefix}.{which}.{ADAPTER}" for which in ("lora_A", "lora_B")]
    weights = [_weight(root, n) for n in names]
    a, b = (
        new.add(role, "get_attr", f"{n}.weight", (), tuple(w.shape), w.dtype)
        for role, n, w in zip(("lora_A", "lora_B"), names, weights, strict=True)
    )
    to = weights[0].dtype
    if planned.experts == 1:
        product = new.add("delta", "call_method", "matmul", (b, a), shape, to)
        scaled = new.add("scale", "call_method", "mul", (product, planned.scaling), shape, to)
        cast = new.add("cast_back", "call_function", cast_like, (scaled, base), shape, dtype)
        return new.add("sum", "call_method", "add", (base, cast), shape, dtype)
    # A is (experts * r, in), expert-major; B is (out, r * experts), rank-major.
    e, r = planned.experts, planned.r
    (_, i), (o, _) = planned.adapter_shapes
    a3 = new.add("delta", "call_method", "reshape", (a, e, -1, i), (e, r, i), to)
    b3 = new.add("delta", "call_method", "reshape", (b, o, -1, e), (o, r, e), to)
    b3 = new.add("delta", "call_method", "permute", (b3, 2, 0, 1), (e, o, r), to)
    left, right = b3, a3
    if shape != (e, o, i):
        left = new.add("delta", "call_method", "transpose", (a3, -2, -1), (e, i, r), to)
        right = new.add("delta", "call_method", "transpose", (b3, -2, -1), (e, r, o), to)
    left = new.add("cast", "call_function", cast_like, (left, base), left.meta["shape"], dtype)
    right = new.add("cast", "call_function", cast_like, (right, base), right.meta["shape"], dtype)
    return new.add(
        "sum", "call_function", baddbmm, (base, left, right), shape, dtype,
        {"alpha": planned.scaling},
    )  # fmt: skip
