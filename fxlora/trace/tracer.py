"""`fxlora.trace`: one entry, two tracers, one kind of graph."""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxlora.errors import TraceError
from fxlora.facts import KEY, TraceInfo
from fxlora.trace import concrete, examples, modes, repeats, symbolic
from fxlora.trace.bulk import uncollected
from fxlora.trace.lazy import LazyGraphModule
from fxlora.trace.regions import closed_regions
from fxlora.trace.shell import module_types, shell, tree


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic: bool = True,
    replay: bool = True,
) -> GraphModule:
    """Traces a model into an fx graph at the level of its own code.

    With example inputs the model is run once on fake tensors (nothing is computed, so the meta
    device and any size will do) and what it does is recorded. Without them,
    `torch.fx.symbolic_trace`'s tracer is used where the model allows it, and a transformers
    model gets inputs built from its config.

    The graph module returned has the model's module names and shares its parameters; it can be
    called like the model, on other batch sizes and lengths, in train and in eval mode. A call it
    does not stand for raises `fxlora.GuardError`. The model is not changed.

    Args:
        model: the model; parameters may be on the meta device.
        args: example positional inputs, as torch.export takes them.
        kwargs: example keyword inputs.
        dynamic: let the sizes of the inputs vary (of images the batch only); False fixes them to
            the example's.
        replay: copy the nodes of repeated blocks instead of running each; False runs all.

    Returns:
        A `torch.fx.GraphModule`; `fxlora.facts` says what its nodes carry in `meta`.

    Raises:
        TraceError: when the model cannot be traced; names the line of its code and the way out.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU())
    >>> [str(n.target) for n in trace(model).graph.nodes if n.op == "call_module"]
    ['0', '1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; fxlora.trace takes a torch.nn.Module")
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"args is a {type(args).__name__}; pass the positional inputs as a tuple: "
            "fxlora.trace(model, (x,))"
        )
    for name in model._modules:
        if isinstance(getattr(GraphModule, name, None), property):
            raise TraceError(
                f"{type(model).__name__} has a child called {name!r}, a property of every "
                "GraphModule; rename it"
            )
    _check_names(model)
    kwargs = dict(kwargs or {})
    if not args and not kwargs:
        if not examples.is_transformers(model):
            return _symbolic(model)
        kwargs = examples.inputs(model)
    with uncollected():
        return _concrete(model, tuple(args), kwargs, dynamic=dynamic, replay=replay)


def outline(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> GraphModule:
    """Traces which layers a model calls: in the mode it is in, at the example's sizes.

    That is all a plan reads, in a fraction of the time of `trace`.

    Returns:
        A graph to read: it holds the model's very modules, checks no inputs and is not to be run.
    """
    kwargs = dict(kwargs or {})
    if not args and not kwargs:
        if not examples.is_transformers(model):
            return trace(model)
        kwargs = examples.inputs(model)

    def record(mode: bool, dynamic: bool) -> concrete.Recording:
        with torch.inference_mode(False):
            return concrete.record(model, args, kwargs, mode=mode, dynamic=dynamic, replay=True)

    with uncollected():
        now, mode, _, notes = _first(record, bool(model.training), False)
        graph, _ = repeats.written(now.graph, {}, {})
        concrete.sweep(graph)
    facts = TraceInfo(
        model_class=type(model).__name__, module_types=module_types(model), mode=mode,
        notes=(*notes, *now.notes), replayed=now.replayed, model=model,
    )  # fmt: skip
    return graph_module(model, graph, facts, lint=False)


def _check_names(model: nn.Module) -> None:
    """Refuses names that torch.fx would write into a graph's code as something else than a name."""
    for path, module in tree(model, remove_duplicate=True):
        held = (module._modules, module._parameters, module._buffers)
        for name in (n for of in held for n in of.keys()):  # noqa: SIM118 - torch.jit's take no iter
            plain = name.isprintable() and '"' not in name and "\\" not in name
            if not plain or keyword.iskeyword(name):
                kind = "a word of Python's own" if plain else "no text torch.fx can quote"
                raise TraceError(
                    f"{path or type(model).__name__!r} has a child or parameter called {name!r}, "
                    f"{kind}: the code of a graph could not name it; rename it"
                )


def _symbolic(model: nn.Module) -> GraphModule:
    mode = bool(model.training)
    now = symbolic.record(model, mode)
    merged = modes.Merged()
    if now.mode_reads:
        merged = modes.merge(
            now.graph, mode, lambda: symbolic.record(model, not mode).graph, module_types(model)
        )
    facts = TraceInfo(
        model_class=type(model).__name__,
        module_types=module_types(model),
        mode=merged.mode,
        notes=merged.notes,
        model=model,
    )
    return _assemble(model, now.graph, facts, {**now.constants, **merged.modules})


def _concrete(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic: bool, replay: bool
) -> GraphModule:
    mode = bool(model.training)

    def record(
        mode: bool, dynamic: bool, like: concrete.Recording | None = None
    ) -> concrete.Recording:
        with torch.inference_mode(False):  # inference tensors keep no versions
            return concrete.record(
                model, args, kwargs, mode=mode, dynamic=dynamic, replay=replay, like=like
            )

    now, mode, dynamic, notes = _first(record, mode, dynamic)
    merged = modes.Merged()
    if any("eval mode only" in n for n in notes):
        merged = modes.Merged(mode=False, reason=f": {notes[-1]}")
    elif now.mode_reads:
        merged = modes.merge(
            now.graph, mode, lambda: record(not mode, dynamic, now).graph, module_types(model)
        )
    if merged.mode is not None:
        _check_one_mode(model, now.mode_reads, merged.reason)
    facts = TraceInfo(
        model_class=type(model).__name__,
        module_types=module_types(model),
        sizes=now.symbols,
        guards=now.conditions,
        dynamic=bool(now.symbols),
        mode=merged.mode,
        notes=(*notes, *now.notes, *merged.notes),
        replayed=now.replayed,
        model=model,
    )
    now.guards.mode, now.guards.mode_reason = merged.mode, merged.reason
    graph, switches = repeats.written(merged.graph or now.graph, merged.inserted, merged.modules)
    concrete.sweep(graph)
    extra = {**now.constants, **switches, now.guards.path: now.guards}
    return _assemble(model, graph, facts, extra)


def _check_one_mode(model: nn.Module, reads: tuple[str, ...], reason: str) -> None:
    """Refuses a model in two modes at once whose path depends on the mode."""
    for path in reads:
        module = model.get_submodule(path)
        if module.training != model.training:
            one, other = ("train", "eval") if model.training else ("eval", "train")
            raise TraceError(
                f"{path!r} is in {other} mode inside a model in {one} mode, and the model takes "
                f"another path in either{reason}: call model.train() or model.eval(), then trace"
            )


def _first(
    record: Callable[[bool, bool], concrete.Recording], mode: bool, dynamic: bool
) -> tuple[concrete.Recording, bool, bool, tuple[str, ...]]:
    """Records the model as it stands; gives up symbolic sizes, then train mode, before failing.

    Returns:
        The recording, its mode, whether its sizes are symbolic, and notes on what was given up.
    """
    tries = [(mode, dynamic), (mode, False), (False, dynamic), (False, False)]
    first: TraceError | None = None
    for m, d in dict.fromkeys(tries):
        try:
            now = record(m, d)
        except TraceError as e:
            first = first or e
            continue
        why = str(first).splitlines()[0] if first is not None else ""
        notes = []
        if d != dynamic:
            notes.append(f"sizes are fixed to the example's: {why}")
        if m != mode:
            notes.append(f"stands for eval mode only: {why}")
        return now, m, d, tuple(notes)
    assert first is not None
    raise first from first.__cause__


def _assemble(
    model: nn.Module, graph: Graph, facts: TraceInfo, extra: dict[str, Any]
) -> GraphModule:
    root = shell(model)
    for path, value in extra.items():
        attach(root, path, value)
    return graph_module(root, graph, facts)


def attach(root: nn.Module, path: str, value: nn.Module | torch.Tensor) -> None:
    """Hangs a module or a constant tensor below `root`, in the mode of its parent."""
    *above, name = path.split(".")
    parent = root.get_submodule(".".join(above))
    if isinstance(value, nn.Module):
        value.train(parent.training)
        parent.add_module(name, value)
    else:
        parent.register_buffer(name, value, persistent=False)


def graph_module(
    root: nn.Module, graph: Graph, facts: TraceInfo, *, lint: bool = True
) -> GraphModule:
    """Joins a module tree and a graph over it, keeping modules that the graph never calls.

    torch.fx keeps only what a graph uses; a parameter nobody reads is a fact users ask about.
    """
    if lint:
        graph.lint()
    made = LazyGraphModule(nn.Module(), Graph(), class_name=facts.model_class)
    made._modules, made._parameters, made._buffers = root._modules, root._parameters, root._buffers
    made._non_persistent_buffers_set = root._non_persistent_buffers_set
    made.training = root.training
    graph._codegen._body_transformer = closed_regions
    made.graph = graph
    made.meta[KEY] = facts
    return made
