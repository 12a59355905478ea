"""What fxlora writes into `node.meta` and `graph_module.meta`: the words every later layer reads.

Every node of a traced graph carries, in `node.meta`:

- `"module_stack"`: a tuple of `Frame`, outermost first; the root's path is `""`.
- `"shape"` and `"dtype"`: of a single-tensor result; a dimension is an int or, when it follows
  the input, its expression as text (`"s1"`, `"s0*s1"`). Absent where the trace knows no shapes.
- `"source"`: the `Source` line of the model's own code.
- `"mutates"`: the nodes whose tensor this node changes in place, when there are any.
- `"alias"`: the argument in whose memory the result lies, as a path (`(0,)`, `("input",)`, `(0, 1)`),
  None where it has memory of its own; of a part of several results, an argument of the call they
  came from. Absent where the trace cannot tell (no example inputs, a parameter among the arguments)
  and on nodes that were inserted.
- `"handed_on"`: True where the result is that argument itself (`x.to(x.dtype)`, nn.Identity).
- `"requires_grad"`: of an input whether the example's did; True where a hook of a layer asks for the
  gradient of its result.
- `"grad_enabled"`: False inside `torch.no_grad()`; absent elsewhere.
- `"autocast"`: (device type, dtype) inside a `torch.autocast(...)` of the model's own.

Nodes inserted by a rewrite also carry `"role"`, `"site"` and `"adapter"`; `"layer"`, where the site
is a part or a single call of that layer; and `"use"`, the node that reads the weight past its module.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fxlora.errors import UnsupportedError

KEY = "fxlora"  # graph_module.meta[KEY] is a TraceInfo
OPTIMIZED = "fxlora_optimize"  # graph_module.meta[OPTIMIZED]: what made it another graph to run


class Frame(NamedTuple):
    """One module call on the stack of a node: where, what class, and which call of that path."""

    path: str
    type: str
    call: int


class Source(NamedTuple):
    """A line of the model's own code."""

    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The source line itself, stripped; empty when the file is not readable."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def short(self) -> str:
        """The line without the machine's folders: the same text wherever the package lies."""
        file = self.file.replace("\\", "/")
        inside = file.rpartition("site-packages/")[2] if "site-packages/" in file else ""
        return f"{inside or file.rpartition('/')[2]}:{self.line} in {self.function}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass
class TraceInfo:
    """What a trace knows beyond its nodes.

    Attributes:
        model_class: the class name of the traced model.
        module_types: module path -> the class of the module, for every name in
            `model.named_modules(remove_duplicate=False)`.
        sizes: symbol -> the input dimension it stands for, e.g. `{"s1": "input_ids.size(1)"}`.
        guards: conditions on the sizes under which the graph is the model, as Python text.
        dynamic: False when every size of the inputs is fixed.
        mode: None when the graph follows train() and eval(); else the only mode it stands for.
        notes: facts a reader should know (a fallback taken, an effect left out).
        replayed: how many module calls were copied from an equal block instead of being run.
        model: the traced model, for what only the live object knows (its config, its heads).
        base: the traced graph a rewritten one was made from; None for a traced graph.
        adapters: adapter name -> its `fxlora.Plan`, in the order they were added.
        active: the names of the adapters the graph computes, in their order; empty when disabled.
        residuals: adapter name -> base weights it replaced when it was drawn (PiSSA and its like).
    """

    model_class: str
    module_types: dict[str, type]
    sizes: dict[str, str] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    dynamic: bool = False
    mode: bool | None = None
    notes: tuple[str, ...] = ()
    replayed: int = 0
    model: Any = None
    base: Any = None
    adapters: dict[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    residuals: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def plan(self) -> Any:
        """The plan of the first active adapter, else of the first; None for a traced graph."""
        names = [*self.active, *self.adapters]
        return self.adapters[names[0]] if names else None

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceInfo:
        # The model is a reference to what was traced, never a second copy of its weights.
        return self


def info(graph_module: torch.fx.GraphModule) -> TraceInfo:
    """Returns the `TraceInfo` of a graph module made by `fxlora.trace` or `fxlora.rewrite`.

    Raises:
        TypeError: when the module was not made by fxlora.
    """
    found = getattr(graph_module, "meta", {}).get(KEY)
    if not isinstance(found, TraceInfo):
        raise TypeError(
            f"{type(graph_module).__name__} was not made by fxlora.trace: "
            "call fxlora.trace(model, args, kwargs) first and pass its result"
        )
    return found


def check_plain(graph_module: torch.fx.GraphModule, doing: str) -> None:
    """Refuses a graph that `fxlora.optimize` made, whose nodes are no longer peft's steps.

    Args:
        graph_module: what was given.
        doing: what reads the plain graph, as the beginning of a sentence.

    Raises:
        UnsupportedError: when the graph was optimized.
    """
    if OPTIMIZED in getattr(graph_module, "meta", {}):
        raise UnsupportedError(
            f"{doing} reads the plain graph, and this one is optimized, for running: give it what "
            "fxlora.rewrite returned, before fxlora.optimize"
        )


def path_of(node: torch.fx.Node) -> str:
    """Returns the path of the innermost module that ran `node` (`""` is the root)."""
    stack = node.meta.get("module_stack", ())
    return stack[-1].path if stack else ""
