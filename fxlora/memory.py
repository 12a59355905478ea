"""What a training step of a rewritten graph holds in memory, told by autograd without any weights.

The graph runs once on fake tensors, which have sizes and no numbers, and autograd says what it saves
for the backward pass (`torch.autograd.graph.saved_tensors_hooks`). Every storage counts once;
parameters and inputs, which are there anyway, do not count. So this is what is saved, not a formula
for it: which sites are adapted, what is frozen, dropout and the dtypes all follow.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from fxlora.errors import ConfigError, TraceError, did_you_mean
from fxlora.facts import check_plain, info
from fxlora.html import Printed
from fxlora.text import table
from fxlora.trace.arguments import tensors_inside
from fxlora.trace.bulk import copy_graph
from fxlora.trace.shell import shell
from fxlora.trace.tracer import graph_module

# Bytes of state for every trainable parameter, beside the parameter and its gradient.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2, "sgd": 0, "momentum": 4}
_LORA = ("lora_A", "lora_B", "cast", "dropout", "scale", "sum", "cast_back", "delta", "magnitude", "rows")  # fmt: skip


@dataclass(frozen=True)
class Memory(Printed):
    """Bytes of one training step, by what they are for; prints as a table.

    Attributes:
        weights: the parameters and buffers of the base model.
        adapters: the parameters that were added.
        gradients: of everything that trains.
        optimizer: its state for everything that trains.
        saved: what autograd saves for the backward pass.
        saved_by_lora: of that, what nodes of an adapter save first.
        inputs: the sizes of the inputs, as text.
        optimizer_name: which optimizer.
        trains: how many parameters train.
        label: what was measured.
        largest: the modules that save most, with their bytes.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    saved: int
    saved_by_lora: int
    inputs: tuple[str, ...]
    optimizer_name: str
    trains: int
    label: str = ""
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        """All of it; what kernels use for a moment is not in it."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.saved

    def to_dict(self) -> dict[str, Any]:
        """Returns the bytes as plain data."""
        return {**asdict(self), "total": self.total}

    def _parts(self) -> Iterable[str]:
        rows = [
            ("base weights", human_bytes(self.weights), ""),
            ("adapters", human_bytes(self.adapters), f"{self.trains:,} parameters train"),
            ("gradients", human_bytes(self.gradients), ""),
            ("optimizer", human_bytes(self.optimizer), self.optimizer_name),
            ("saved for backward", human_bytes(self.saved), f"{human_bytes(self.saved_by_lora)} by adapters"),
            ("together", human_bytes(self.total), "kernels' own workspace is not in it"),
        ]  # fmt: skip
        lines = [f"one training step on {', '.join(self.inputs)}", ""]
        lines.append(table(("memory", "size", ""), rows, right=(1,)))
        if self.largest:
            lines += ["", "saved most, by module"]
            cells = [(n or "(the model)", human_bytes(b)) for n, b in self.largest]
            lines.append(table(("module", "size"), cells, right=(1,)))
        return lines


def human_bytes(count: int) -> str:
    """Returns bytes in the unit a reader thinks in.

    >>> human_bytes(512), human_bytes(88_800_000), human_bytes(16 * 2**30)
    ('512 B', '84.7 MiB', '16.0 GiB')
    """
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def memory(
    graph: GraphModule,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    optimizer: str = "adamw",
    label: str = "",
) -> Memory:
    """Says what one training step of a graph holds in memory.

    Args:
        graph: what `fxlora.rewrite` returned; or a traced graph, which is full fine-tuning where
            its parameters require grad. Its weights may be on the meta device. Not changed. For
            another dtype cast the model before it is traced: its code may name the dtype it sees.
        args: example inputs, as the graph takes them; only their sizes count.
        kwargs: the same by name.
        optimizer: one of `OPTIMIZERS`.
        label: kept in the result.

    Raises:
        ConfigError: for another optimizer, and for an input that is missing.
        TraceError: when the graph does not run on fake tensors.
        UnsupportedError: for a graph that was optimized with checkpoint=True.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(r=4, target_modules=["1"]))
    >>> found = memory(lora, (torch.randn(3, 10),))
    >>> found.saved, found.gradients, found.optimizer  # x: 3 x 20, A x: 3 x 4; 100 parameters
    (288, 400, 800)
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer={optimizer!r} is none of {list(OPTIMIZERS)}.{did_you_mean(optimizer, OPTIMIZERS)}"
        )
    if any(getattr(n.target, "__name__", "") == "checkpointed" for n in graph.graph.nodes):
        check_plain(graph, "memory")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        fake = _fake(graph)
        given = [_fake_tensor(a) for a in args]
        named = {k: _fake_tensor(v) for k, v in (kwargs or {}).items()}
        run = _Saved(fake)
        del mode
        run.measure(given, named)
    parameters = dict(fake.named_parameters())
    added = _adapter_names(graph)
    trains = [p for p in parameters.values() if p.requires_grad]
    base = [p for n, p in parameters.items() if n not in added] + list(fake.buffers())
    count = sum(p.numel() for p in trains)
    return Memory(
        weights=_bytes(base),
        adapters=_bytes(p for n, p in parameters.items() if n in added),
        gradients=_bytes(trains),
        optimizer=OPTIMIZERS[optimizer] * count,
        saved=sum(run.by_node.values()),
        saved_by_lora=sum(b for n, b in run.by_node.items() if n.meta.get("role") in _LORA),
        inputs=tuple(_said(k, v) for k, v in [*enumerate(given), *named.items()]),
        optimizer_name=optimizer,
        trains=count,
        label=label,
        largest=run.largest(5),
    )


def saved_by_node(
    graph: GraphModule, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns what autograd saves at every node, and the size of every tensor, in bytes by node name.

    Args:
        graph: as `memory` takes it; not changed.
        args: example inputs; only their sizes count.
        kwargs: the same by name.

    Raises:
        TraceError: when the graph does not run on fake tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        run = _Saved(_fake(graph))
        run.measure(
            [_fake_tensor(a) for a in args],
            {k: _fake_tensor(v) for k, v in (kwargs or {}).items()},
        )
    return {n.name: b for n, b in run.by_node.items()}, run.sizes


def at_sizes(
    traced: GraphModule,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    batch: int | None = None,
    length: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns example inputs at other sizes; without values, on the meta device.

    Args:
        traced: what `fxlora.trace` returned for them, with sizes that may vary.
        args: the inputs of the trace.
        kwargs: the same by name.
        batch: the size of every first dimension; as it is where None.
        length: the size of every other dimension that may vary.

    Raises:
        ConfigError: for a size below one, and where the trace fixed that size.
    """
    asked = {"batch": batch, "length": length}
    for name, size in asked.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size}: a size is at least 1")
    sizes = info(traced).sizes
    first = {s for s, where in sizes.items() if where.endswith(".size(0)")}
    for name, size, there in (("batch", batch, first), ("length", length, {*sizes} - first)):
        if size is not None and not there:
            raise ConfigError(
                f"{name}={size}: the graph's inputs have no such size that may vary "
                f"({sizes or 'all are fixed'}); trace the model with inputs of that size"
            )
    values = {s: batch if s in first else length for s in sizes}
    shapes = {
        str(n.target): n.meta.get("shape") for n in traced.graph.nodes if n.op == "placeholder"
    }
    order = list(shapes)

    def resized(name: str, value: Any) -> Any:
        shape = shapes.get(name)
        if not isinstance(value, torch.Tensor) or shape is None:
            return value
        new = []
        for d, old in zip(shape, value.shape, strict=True):
            size = values.get(d) if isinstance(d, str) else None
            new.append(old if size is None else size)
        return torch.empty(new, dtype=value.dtype, device="meta")

    return (
        tuple(resized(order[i], a) for i, a in enumerate(args)),
        {k: resized(k, v) for k, v in kwargs.items()},
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _said(name: Any, value: Any) -> str:
    shape = list(value.shape) if isinstance(value, torch.Tensor) else value
    return f"{name} {shape}" if isinstance(name, str) else f"input {shape}"


def _adapter_names(graph: GraphModule) -> set[str]:
    """Returns the names of the parameters the rewrite added."""
    base = info(graph).base
    known = set() if base is None else {n for n, _ in base.named_parameters(remove_duplicate=False)}
    return {n for n, _ in graph.named_parameters() if base is not None and n not in known}


# ---- the fake graph ------------------------------------------------------------------------------


def _fake(graph: GraphModule) -> GraphModule:
    """Returns the same graph over fake tensors on a CPU, in train mode."""
    buffers: dict[int, torch.Tensor] = {}

    def view(p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(_fake_tensor(p), requires_grad=p.requires_grad)

    root = shell(graph, view)
    for module in root.modules():
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = buffers.setdefault(id(b), _fake_tensor(b))
    copied, _ = copy_graph(graph.graph)
    fake = graph_module(root, copied, replace(info(graph)))
    if info(graph).mode is not False:
        fake.train()
    return fake


def _fake_tensor(value: Any) -> Any:
    """Returns a fake of a tensor, or a copy of whatever holds tensors with fakes in their place."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cpu")
    fakes = {id(t): _fake_tensor(t) for t in tensors_inside(value)}
    return copy.deepcopy(value, fakes) if fakes else value


# ---- what autograd saves -------------------------------------------------------------------------


class _Saved:
    """Runs a graph node by node and counts what autograd saves, at the node that saves it first."""

    def __init__(self, fake: GraphModule) -> None:
        self._fake = fake
        self.by_node: dict[Node, int] = {}
        self.sizes: dict[str, int] = {}

    def measure(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Runs the graph.

        Raises:
            TraceError: names the node that does not run on fake tensors.
        """
        given = tensors_inside([*args, *kwargs.values()])
        seen = {_storage(t) for t in (*self._fake.parameters(), *self._fake.buffers(), *given)}
        at: list[Node] = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            key = _storage(t)
            if key not in seen:
                seen.add(key)
                node = at[-1]
                self.by_node[node] = self.by_node.get(node, 0) + t.untyped_storage().nbytes()
            kept.append(t)  # a storage that is freed would lend its address to the next one
            return t

        kept: list[torch.Tensor] = []

        sizes = self.sizes

        class Steps(Interpreter):
            def run_node(self, node: Node) -> Any:
                at.append(node)
                out = super().run_node(node)
                if isinstance(out, torch.Tensor):
                    sizes[node.name] = _bytes([out])
                return out

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if getattr(target, "__name__", "") in ("grouped_mm", "_grouped_mm"):
                    return _GroupedMm.apply(*args, *kwargs.values())  # type: ignore[no-untyped-call]
                return super().call_function(target, args, kwargs)

        steps = Steps(self._fake, garbage_collect_values=True)
        steps.extra_traceback = False
        inputs = _in_order(self._fake, args, kwargs)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                self._out = steps.run(*inputs)
        except Exception as e:
            where = at[-1].name if at else "its inputs"
            raise TraceError(
                f"the graph does not run on fake tensors: {type(e).__name__} at {where}: "
                f"{str(e).splitlines()[0] if str(e) else e!r}"
            ) from e

    def largest(self, many: int) -> tuple[tuple[str, int], ...]:
        """Returns the modules whose nodes save most, layers of a list together."""
        from fxlora.text import open_indices

        found: dict[str, int] = {}
        for node, size in self.by_node.items():
            stack = node.meta.get("module_stack", ())
            path = str(node.target) if node.op == "call_module" else stack[-1].path if stack else ""
            site = node.meta.get("layer", node.meta.get("site", path))
            name = open_indices(str(site))
            found[name] = found.get(name, 0) + size
        return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:many])


class _GroupedMm(torch.autograd.Function):
    """torch's grouped_mm as memory sees it; its own fake kernel takes bfloat16 only."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Saves what torch saves, and makes the result's size."""
        ctx.save_for_backward(a, b, *(t for t in rest if isinstance(t, torch.Tensor)))
        return a.new_empty((*a.shape[:-1], b.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Is never run."""
        raise NotImplementedError


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _in_order(graph: GraphModule, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the inputs in the order of the graph's placeholders, defaults for the rest."""
    rest = list(args)
    out = []
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name in kwargs:
            out.append(kwargs[name])
        elif rest:
            out.append(rest.pop(0))
        elif node.args:
            out.append(node.args[0])
        else:
            raise ConfigError(
                f"no input {name!r} was given; the graph takes "
                f"{[str(n.target) for n in graph.graph.nodes if n.op == 'placeholder']}"
            )
    return out


def sweep_text(found: Sequence[Memory]) -> str:
    """Returns several measurements as one table, for comparing them."""
    rows = [
        (
            m.label,
            f"{m.trains:,}",
            human_bytes(m.saved),
            human_bytes(m.saved_by_lora),
            human_bytes(m.adapters + m.gradients + m.optimizer),
            human_bytes(m.total),
        )
        for m in found
    ]
    head = ("what trains", "parameters", "saved", "by adapters", "adapters' own", "together")
    lines = [f"one training step on {', '.join(found[0].inputs)}, {found[0].optimizer_name}", ""]
    return "\n".join([*lines, table(head, rows, right=(1, 2, 3, 4, 5))])
