"""Concrete tracing: run the model once on fake tensors and record what it does."""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import os
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxlora.errors import GuardError, TraceError
from fxlora.facts import Source
from fxlora.trace import arguments, known, operators, sizes
from fxlora.trace.guards import InputGuards
from fxlora.trace.likeness import Maker, Results
from fxlora.trace.paths import Paths
from fxlora.trace.recorder import Recorder, model_line
from fxlora.trace.repeats import Recorded
from fxlora.trace.replay import Replay
from fxlora.trace.shell import device_of, is_leaf, tree

_ORIGINAL_CALL = nn.Module.__call__
_LOCK = threading.RLock()


class _ShapeEnv(ShapeEnv):
    """A ShapeEnv whose symbols are s0, s1, ... in the order of the inputs' dimensions."""

    def _generate_unique_id(self, source_name: str) -> int:  # noqa: ARG002 - torch calls it
        n = len(self.unique_ids)
        self.unique_ids.add(n)
        return n


@dataclass
class Recording:
    """One finished run: the graph, the tensors it lifted, and what the run depended on."""

    graph: Graph
    constants: dict[str, torch.Tensor]
    guards: InputGuards
    symbols: dict[str, str]
    conditions: tuple[str, ...]
    mode_reads: tuple[str, ...]
    replayed: int
    notes: tuple[str, ...]
    stretched: bool
    results: Results


class _Training:
    """A data descriptor over `nn.Module.training`: one mode for the whole run, reads noted.

    The model itself keeps its flags; only what they read as changes, and only while recording.
    """

    def __init__(self, mode: bool, recorder: Recorder, thread: int) -> None:
        self._mode, self._recorder, self._thread = mode, recorder, thread

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if threading.get_ident() != self._thread:
            return module.__dict__["training"]
        if not self._recorder.paused:
            self._recorder.read_mode()
        return self._mode

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    mode: bool,
    dynamic: bool,
    replay: bool,
    like: Recording | None = None,
) -> Recording:
    """Runs `model` on fakes of the example inputs and returns what happened.

    Args:
        model: the model; parameters may live on the meta device. Read, never changed.
        args, kwargs: the example inputs.
        mode: the value `self.training` reads as everywhere in the model.
        dynamic: whether the sizes of the inputs are symbols.
        replay: whether equal blocks are copied instead of run.
        like: the run in the other mode; what its calls gave need not be found out again.

    Raises:
        TraceError: with the line of the model's code that could not be followed.
    """
    results = Results() if like is None else like.results

    def run(stretch: bool) -> tuple[Recording, list[torch.Tensor]]:
        return _record(model, args, kwargs, mode, dynamic, replay, stretch, results)

    if like is not None:
        return run(like.stretched)[0]
    if dynamic and _batch_of_one(args, kwargs):
        # One sequence is the commonest example and stands for any batch. A size of one would be
        # taken for a broadcast, so trace with two.
        with contextlib.suppress(TraceError):
            recording, real = run(True)
            if _holds(recording.guards, real):
                return recording
        # The model does something else with one than with two: then the example is meant as it is.
    return run(False)[0]


def _record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: bool,
    dynamic: bool,
    replay: bool,
    stretch: bool,
    results: Results,
) -> tuple[Recording, list[torch.Tensor]]:
    """Runs the model once, with a batch of one stretched to two or left; also returns the inputs."""
    graph = Recorded()
    shape_env = _ShapeEnv(duck_shape=False, specialize_zero_one=False) if dynamic else None
    fake_mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    fake_mode.cache_enabled = False  # its keys cost more than the few hits they give here
    recorder = Recorder(model, graph, device_of(model), Maker(results, fake_mode))
    recorder.shape_env = shape_env
    placeholders = arguments.Placeholders(graph)
    bound = arguments.bind(model, args, kwargs)
    real: list[torch.Tensor] = []
    fake = _faker(fake_mode, shape_env, stretch, real)
    values = {k: placeholders.add(k, v, fake) for k, v in bound.arguments.items()}
    positional = [values.pop(k) for k in bound.by_position]
    _name_sizes(recorder, placeholders)
    with _LOCK, fake_mode:
        with contextlib.ExitStack() as patches:
            patches.enter_context(_fake_buffers(model, recorder, fake_mode))
            replayer = _patch(patches, model, recorder, mode, replay)
            out = _run(model, recorder, positional, values)
        _finish(graph, recorder, out)
    guards, symbols = _guards(placeholders, recorder, shape_env)
    name = "_guards"
    while hasattr(model, name):
        name = f"_{name}"
    guards.path = name
    _guard_node(graph, placeholders, name)
    recording = Recording(
        graph=graph,
        constants=recorder.constants,
        guards=guards,
        symbols=symbols,
        conditions=guards.conditions,
        mode_reads=tuple(dict.fromkeys(recorder.mode_reads)),
        replayed=replayer.count,
        notes=tuple(replayer.notes),
        stretched=stretch,
        results=results,
    )
    return recording, real


def _holds(guards: InputGuards, tensors: list[torch.Tensor]) -> bool:
    try:
        guards._check_shapes(tuple(tensors))
    except GuardError:
        return False
    return True


def _batch_of_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    found = [t for t in _tensors((args, kwargs)) if t.dim()]
    return bool(found) and all(t.size(0) == 1 for t in found)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for part in arguments._parts(value) or ():
        yield from _tensors(part[3])


def _faker(
    fake_mode: FakeTensorMode, shape_env: ShapeEnv | None, stretch: bool, real: list[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    count = iter(range(1_000_000))

    def fake(t: torch.Tensor) -> torch.Tensor:
        from torch._dynamo.source import ConstantSource

        if t.is_nested or t.layout is not torch.strided:
            raise TraceError(f"an example input is {t.layout}; fxlora traces strided tensors")
        real.append(t)
        requires_grad = t.requires_grad
        plain = t.detach()
        if stretch and plain.dim():
            plain = plain.expand(2, *plain.shape[1:]).contiguous()
        source = ConstantSource(f"input{next(count)}")
        if shape_env is None:
            made = fake_mode.from_tensor(plain, static_shapes=True, source=source)
        else:
            # The height and width of images stay fixed: windowed vision models turn them into
            # expressions no solver likes, and most of the others insist on one size anyway.
            image = plain.dim() >= 4 and plain.is_floating_point()
            context: Any = StatelessSymbolicContext(
                dynamic_sizes=[
                    DimDynamic.STATIC if image and d > 0 else DimDynamic.DYNAMIC
                    for d in range(plain.dim())
                ],
                constraint_sizes=[None] * plain.dim(),
            )
            made = fake_mode.from_tensor(plain, symbolic_context=context, source=source)
        return made.requires_grad_(requires_grad) if requires_grad else made

    return fake


def _name_sizes(recorder: Recorder, placeholders: arguments.Placeholders) -> None:
    for leaf in placeholders.leaves:
        recorder.bind(leaf.tensor, leaf.node)
        leaf.node.meta["module_stack"] = ()
        leaf.node.meta["shape"] = tuple(sizes.dimension(d) for d in leaf.tensor.shape)
        leaf.node.meta["dtype"] = leaf.tensor.dtype
        leaf.node.meta["requires_grad"] = leaf.tensor.requires_grad
        for d, size in enumerate(leaf.tensor.shape):
            if isinstance(size, torch.SymInt):
                recorder.size_nodes.origins[str(size.node.expr)] = (leaf.node, d)
                recorder.hints[str(size.node.expr)] = int(size.node.hint)
    if not recorder.size_nodes.origins and placeholders.leaves:
        recorder.size_nodes.origins[""] = (placeholders.leaves[0].node, 0)
    recorder.size_nodes.after = next(iter(reversed(recorder.graph.nodes)), None)


def _patch(
    patches: contextlib.ExitStack, model: nn.Module, recorder: Recorder, mode: bool, replay: bool
) -> Replay:
    """Installs, for the length of one run, everything that watches the model."""
    thread = threading.get_ident()
    paths = patches.enter_context(Paths(model))
    replayer = Replay(model, recorder, paths, enabled=replay)
    patches.enter_context(enable_python_dispatcher())
    patches.enter_context(torch.enable_grad())
    patches.enter_context(_restored(model, replayer.notes))
    patches.enter_context(
        mock.patch.object(nn.Module, "training", _Training(mode, recorder, thread), create=True)
    )
    patches.enter_context(
        mock.patch.object(nn.Module, "__call__", _caller(recorder, paths, replayer, thread))
    )
    patches.enter_context(
        mock.patch.object(torch.SymBool, "__bool__", _decider(recorder, torch.SymBool.__bool__))
    )
    # What it logs, a page for every call a kernel refuses, is in the error or was tried another way.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    patches.enter_context(mock.patch.object(log, "disabled", True))
    masking = sys.modules.get("transformers.masking_utils")
    if masking is not None and hasattr(masking, "is_tracing"):
        # transformers skips its mask shortcuts when it sees a fake tensor. Of positions it made
        # itself the value is known, and eager would take the shortcut: then so does the graph.
        patches.enter_context(
            mock.patch.object(masking, "is_tracing", _is_tracing(recorder, masking.is_tracing))
        )
    if masking is not None and hasattr(masking, "_vmap_expansion_sdpa"):
        patches.enter_context(mock.patch.object(masking, "_vmap_expansion_sdpa", _broadcasting))
    for patch in (*_stand_ins(), *_watchers(recorder)):
        patches.enter_context(patch)
    patches.enter_context(recorder)
    return replayer


def _stand_ins() -> Iterator[Any]:
    """Yields patches of torch functions that do nothing of interest here and refuse fakes."""
    from torch.nn.utils import parametrize

    autocast, maybe_set = torch.autocast, getattr(parametrize, "_maybe_set", None)
    attention = torch.nn.functional.scaled_dot_product_attention

    def on_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # torch has no autocast for the meta device; there is nothing to cast there either.
        if device_type == "meta":
            return contextlib.nullcontext()
        return autocast(device_type, *args, **kwargs)

    def decided(*args: Any, **kwargs: Any) -> Any:
        # `is_causal=q_len > 1` is a bool to eager, and torch takes no symbolic one.
        if isinstance(kwargs.get("is_causal"), torch.SymBool):
            kwargs["is_causal"] = bool(kwargs["is_causal"])
        return attention(*args, **kwargs)

    yield mock.patch.object(torch, "autocast", on_meta)
    yield mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", decided)
    # A distribution checks its arguments' values, which only ever raises.
    yield mock.patch.object(torch.distributions.Distribution, "_validate_args", False)
    if maybe_set is not None:
        # Registering a parametrization sets a parameter to itself, which fakes may not.
        yield mock.patch.object(
            parametrize, "_maybe_set", lambda a, b: None if a is b else maybe_set(a, b)
        )


def _watchers(recorder: Recorder) -> Iterator[Any]:
    """Yields patches that let the recorder see what torch does not dispatch to it."""
    region = torch.amp.autocast_mode.autocast
    enter, leave = region.__enter__, region.__exit__

    def entered(self: Any) -> Any:
        if not recorder.paused:
            recorder.autocast.enter(recorder.create, self)
        return enter(self)  # type: ignore[no-untyped-call]

    def left(self: Any, *exc: Any) -> Any:
        if not recorder.paused:
            recorder.autocast.leave(recorder.create, recorder.graph)
        return leave(self, *exc)

    yield mock.patch.object(region, "__enter__", entered)
    yield mock.patch.object(region, "__exit__", left)
    function = torch.autograd.Function
    apply = function.__dict__["apply"]

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        original = apply.__get__(None, cls)
        if recorder.paused or any(callable(a) for a in args):
            return original(*args, **kwargs)  # checkpointing: what it runs is what counts
        # One node: its backward is its own, not that of the operations inside.
        spelling = lambda: ("call_function", operators.applied(cls))  # noqa: E731
        return recorder.run(original, args, kwargs, spelling, cls.__name__)

    yield mock.patch.object(function, "apply", classmethod(applied))


def _is_tracing(recorder: Recorder, original: Callable[..., bool]) -> Callable[..., bool]:
    def is_tracing(tensor: Any = None) -> bool:
        if isinstance(tensor, torch.Tensor) and recorder.is_known(tensor):
            return False
        return original(tensor)

    return is_tracing


def _broadcasting(mask_function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for transformers' vmap over the indices of a mask, which hides its calls from us.

    Masks are functions of four indices, elementwise; transformers itself broadcasts the indices
    of the masks it knows, and vmaps those a model adds.
    """

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> Any:
        grid = (b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv)
        return mask_function(*grid).expand(b.size(0), h.size(0), q.size(0), kv.size(0))

    return mask


def _caller(recorder: Recorder, paths: Paths, replayer: Replay, thread: int) -> Callable[..., Any]:
    # PEFT adapts a parameter by parametrizing its module for the length of a call. Such a module
    # is traced through, to see what its weight has become; one that always was parametrized
    # (weight_norm) stays a leaf.
    always = {id(m._modules) for _, m in tree(recorder.model) if "parametrizations" in m._modules}

    def stays_whole(module: nn.Module) -> bool:
        now = "parametrizations" in module._modules
        whole = is_leaf(module) and (not now or id(module._modules) in always)
        return whole and module is not recorder.model

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder.paused or threading.get_ident() != thread:
            return _ORIGINAL_CALL(module, *args, **kwargs)
        path = paths.of(module)
        if path is None:  # made inside forward: its operations belong to whoever made it
            return _ORIGINAL_CALL(module, *args, **kwargs)
        if stays_whole(module):
            recorder.stack.append(recorder.frame(module, path))
            try:
                return recorder.leaf(_ORIGINAL_CALL, module, path, args, kwargs)
            finally:
                recorder.stack.pop()
        return replayer.call(_ORIGINAL_CALL, module, path, args, kwargs)

    return call


def _decider(recorder: Recorder, original: Callable[..., bool]) -> Callable[..., bool]:
    def decide(condition: torch.SymBool) -> bool:
        answer = original(condition)
        if not recorder.in_op and not _is_harmless(model_line()):
            recorder.decisions.append((condition.node.expr, answer))
        return answer

    return decide


# Decisions whose two answers give the same tensors: positions of batch one are expanded to the
# batch, or left alone when the batch is one.
_HARMLESS = {("masking_utils.py", "_preprocess_mask_arguments")}


def _is_harmless(line: Source | None) -> bool:
    return line is not None and (os.path.basename(line.file), line.function) in _HARMLESS


_REFILLED = frozenset((list, dict, OrderedDict, defaultdict, set, deque))


@contextlib.contextmanager
def _restored(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Puts back whatever attributes the model's forward assigns while it is traced."""
    kept = ("_parameters", "_buffers", "_modules")
    before = [
        (name, m, dict(m.__dict__), [dict(m.__dict__[k]) for k in kept])
        for name, m in model.named_modules()  # peft's MultiheadAttention puts its weights back here
    ]
    # Hooks are in an OrderedDict each: transformers puts its own on when hidden states are asked for.
    held = [
        value
        for _, _, attributes, _ in before
        for name, value in attributes.items()
        if type(value) in _REFILLED and name not in kept
    ]
    contents = {id(value): copy.copy(value) for value in held if value}
    try:
        yield
    finally:
        for value in held:
            if not value and id(value) not in contents:
                continue
            value.clear()
            content = contents.get(id(value), ())
            value.update(content) if hasattr(value, "update") else value.extend(content)
        for name, m, attributes, dicts in before:
            changed = _differing(m.__dict__, attributes)
            for d, k in zip(dicts, kept, strict=True):
                changed += _differing(m.__dict__[k], d)
                _put_back(m.__dict__[k], d)
            _put_back(m.__dict__, attributes)
            if changed:
                notes.append(
                    f"forward assigns {', '.join(sorted(changed))} on {name or 'the model'}; "
                    "the graph does not"
                )


@contextlib.contextmanager
def _fake_buffers(model: nn.Module, recorder: Recorder, mode: FakeTensorMode) -> Iterator[None]:
    """Puts a fake in place of every buffer: a batch norm in train mode counts in place."""
    fakes: dict[int, torch.Tensor] = {}
    before = [(m._buffers, dict(m._buffers)) for _, m in tree(model) if m._buffers]
    for buffers, _ in before:
        for name, b in buffers.items():
            if b is None:
                continue
            if id(b) not in fakes:
                fakes[id(b)] = mode.from_tensor(b, static_shapes=True)
                recorder.rename(b, fakes[id(b)])
            buffers[name] = fakes[id(b)]
    try:
        yield
    finally:
        for buffers, then in before:
            _put_back(buffers, then)


def _differing(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    return [k for k, v in now.items() if k not in then or then[k] is not v]


def _put_back(now: dict[str, Any], then: dict[str, Any]) -> None:
    if _differing(now, then) or len(now) != len(then):
        now.clear()
        now.update(then)


def _run(model: nn.Module, recorder: Recorder, args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except TraceError:
        raise
    except Exception as e:
        raise TraceError(_explain(model, recorder, e)) from e


def _explain(model: nn.Module, recorder: Recorder, e: Exception) -> str:
    line = _line_of(e)
    where = f"{line}: `{line.text}`" if line else "an unknown line"
    path = recorder.failed or ""
    inside = f", in module {path!r}" if path else ""
    kind = type(e).__name__
    said = str(e).strip().splitlines()
    head = f"{type(model).__name__} cannot be traced: {kind} at {where}{inside}."
    if "DataDependent" in kind or any("Cannot cast FakeTensor" in line for line in said):
        return (
            f"{head} This line chooses its path by a tensor's values, and tracing has no values. "
            "Choose by a size or a flag instead, or trace the submodules below it one by one"
        )
    if "DynamicOutputShape" in kind:
        return (
            f"{head} This line makes a tensor whose size depends on values (nonzero, unique, a "
            "boolean index). Use torch.where or masking, or trace the submodules below it"
        )
    detail = said[0] if said else kind
    return (
        f"{head} It says: {detail}. Check that model(*args, **kwargs) runs with these example "
        "inputs; if it does, trace with dynamic=False"
    )


def _line_of(e: BaseException) -> Any:
    import traceback

    from fxlora.trace.recorder import _SKIP

    found = None
    for f in traceback.extract_tb(e.__traceback__):
        library = any(f"/{name}/" in f.filename for name in ("sympy", "numpy"))
        if not f.filename.startswith(_SKIP) and "<" not in f.filename and not library:
            found = Source(f.filename, f.lineno or 0, f.name)
    return found or model_line()


def _finish(graph: Graph, recorder: Recorder, out: Any) -> None:
    def call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = graph.create_node("call_function", target, args, kwargs)
        node.meta["module_stack"] = ()
        return node

    with torch._C.DisableTorchFunction():
        args = arguments.output_args(out, recorder.arg, call)
        graph.output(args).meta["module_stack"] = ()


def sweep(graph: Graph) -> None:
    """Erases parts of tuples nobody asked for, and unused values that follow from sizes alone.

    Every other call stays, used or not: a random draw shifts the ones after it.
    """
    from_sizes: set[Node] = set()
    for node in graph.nodes:
        plain = node.op in ("call_function", "call_method") and not node.meta.get("mutates")
        name = str(getattr(node.target, "__name__", node.target))
        if plain and name not in known.RANDOM and not name.startswith(("enter_", "leave_")):
            fact = (node.op == "call_method" and name == "size") or known.is_device(node)
            if fact or all(n in from_sizes for n in node.all_input_nodes):
                from_sizes.add(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.target is operator.getitem or node in from_sizes):
            graph.erase_node(node)


def _guards(
    placeholders: arguments.Placeholders, recorder: Recorder, shape_env: ShapeEnv | None
) -> tuple[InputGuards, dict[str, str]]:
    leaves = placeholders.leaves
    fixed: list[tuple[int, int, int]] = []
    origins: dict[str, tuple[int, int]] = {}
    for i, leaf in enumerate(leaves):
        for d, size in enumerate(leaf.tensor.shape):
            expr = sizes.expression(size) if isinstance(size, torch.SymInt) else None
            if expr is None or expr.is_number:
                fixed.append((i, d, int(size)))
            if expr is not None:
                origins[str(size.node._expr)] = (i, d)
    conditions = _conditions(recorder, shape_env) if shape_env is not None else ()
    used = {s: o for s, o in origins.items() if (o[0], o[1]) not in {f[:2] for f in fixed}}
    guards = InputGuards(
        names=tuple(leaf.name for leaf in leaves),
        ranks=tuple(leaf.tensor.dim() for leaf in leaves),
        fixed=tuple(fixed),
        symbols=used,
        conditions=conditions,
        constants={k: v for k, (v, _) in placeholders.constants.items()},
    )
    symbols = {s: f"{leaves[i].name}.size({d})" for s, (i, d) in used.items()}
    return guards, symbols


def _conditions(recorder: Recorder, shape_env: ShapeEnv) -> tuple[str, ...]:
    """Collects what must hold of the sizes for the graph to be the model.

    Kept: what the model's own Python asked, and the equalities kernels found, on which the
    expressions for sizes rest. Left out: every other check a kernel makes for itself (is this a
    broadcast, is this contiguous), because the kernel runs again and checks again. squeeze() is
    the exception: its answer changes how many dimensions the code after it sees.
    """
    import sympy

    asked = [e if answer else sympy.Not(e) for e, answer in recorder.decisions]
    in_op: dict[int, str] = {}
    for start, end, name in recorder.op_guards:
        in_op.update(dict.fromkeys(range(start, end), name))
    for i, guard in enumerate(shape_env.guards):
        if isinstance(guard.expr, sympy.Eq) or "squeeze" in in_op.get(i, ""):
            asked.append(guard.expr)
    asked += [sympy.Eq(s, shape_env.replace(s)) for s in shape_env.replacements]
    numbers = {s: e for s in shape_env.replacements if (e := shape_env.replace(s)).is_number}
    stated: dict[Any, str] = {}
    for expr in asked:
        known = expr.xreplace(numbers)  # a fixed dimension is checked as such
        if known.free_symbols:
            same = frozenset(known.args) if isinstance(known, sympy.Eq) else known
            stated.setdefault(same, sizes.text(known))
    return tuple(dict.fromkeys(stated.values()))


def _guard_node(graph: Graph, placeholders: arguments.Placeholders, name: str) -> None:
    """Puts the check of the inputs behind the last input."""
    last = [n for n in graph.nodes if n.op == "placeholder"]
    if not last:
        return
    after = last[-1]
    for leaf in placeholders.leaves:
        if leaf.node.op != "placeholder":
            after = leaf.node if leaf.node > after else after
    tensors = tuple(leaf.node for leaf in placeholders.leaves)
    constants = tuple(node for _, node in placeholders.constants.values())
    with graph.inserting_after(after):
        node = graph.call_module(name, (tensors, constants))
    node.meta["module_stack"] = ()
