"""fxlora's graph against PEFT's wrapping of the same model: a certificate, a table, and a run."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import GraphModule

from fxlora import peft_side
from fxlora.canonical import Canonical, canonical, first_difference
from fxlora.config import init_name
from fxlora.divergences import FAST_PATH, Divergence, distance, divergences, largest
from fxlora.errors import TraceError, UnsupportedError
from fxlora.facts import KEY, info
from fxlora.html import Printed
from fxlora.plan import Plan
from fxlora.plan import plan as make_plan
from fxlora.rewrite import rewrite, rewrite_as_peft, trained_values
from fxlora.trace import trace
from fxlora.trace.arguments import tensors_inside
from fxlora.trace.bulk import uncollected

SEED = 0


class PeftRunError(Exception):
    """What kept a run from being compared."""


@dataclass(frozen=True)
class Parameter:
    """One row of the parameter table.

    Attributes:
        name: ours, and the original model's for a base parameter.
        peft_name: as `peft_model.named_parameters()` has it; empty when PEFT has none.
        shape: as a tuple.
        before: requires_grad in the model that was given; None for an adapter.
        after: requires_grad in the rewritten graph; None when only PEFT has the parameter.
        peft_after: requires_grad in PEFT's model; None when only we have the parameter.
    """

    name: str
    peft_name: str
    shape: tuple[int, ...]
    before: bool | None
    after: bool | None
    peft_after: bool | None


@dataclass(frozen=True)
class Certificate:
    """The structural proof: two digests, and where they part.

    Attributes:
        ours, theirs: digests of the two canonical graphs; `theirs` is empty when PEFT's model
            could not be traced.
        equal: whether the graphs are the same computation.
        nodes: how many computing nodes our graph has.
        difference: the first computation of ours and of PEFT's the other lacks.
        problem: why there is no certificate.
    """

    ours: str
    theirs: str
    equal: bool
    nodes: int
    difference: tuple[str, str] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Deviation:
    """The largest difference of one tensor between the two runs.

    Attributes:
        name: which output, or whose gradient.
        equal: the same bits, NaN in the same places among them.
        largest: the largest difference; NaN where one side is NaN and the other a number, infinite
            where there is nothing to subtract.
        problem: why `largest` says no size: only one side has the tensor, say.
        nans: in how many places both sides are NaN, where nothing was compared.
    """

    name: str
    equal: bool
    largest: float
    problem: str = ""
    nans: int = 0


@dataclass(frozen=True)
class Comparison(Printed):
    """What comparing with PEFT found; prints as a report.

    Attributes:
        equal: nothing differs: parameters, certificate, and, where there are weights, bits.
        differences: every difference that no known divergence explains.
        divergences: where PEFT's own number or behaviour is known to be off, and by how much; the
            certificate and the run then compare PEFT with a graph that has its mistake built in.
        parameters: the parameter table.
        certificate: the structural proof.
        outputs, gradients: per tensor, from running both; empty where `not_run` says why.
        trainable, total: ours; `peft_trainable`, `peft_total` as print_trainable_parameters.
        plan: the plan that was compared.
        tree_before, tree_after: the modules on the way to a site, as PEFT wraps them.
        peft_version: the version compared with.
        notes: what the trace of the model says of itself (fixed sizes, one mode only).
        not_run: why there are no outputs and gradients; empty where there are.
    """

    equal: bool
    differences: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    certificate: Certificate
    outputs: tuple[Deviation, ...]
    gradients: tuple[Deviation, ...]
    trainable: int
    total: int
    peft_trainable: int
    peft_total: int
    plan: Plan = field(repr=False)
    tree_before: str = field(repr=False, default="")
    tree_after: str = field(repr=False, default="")
    peft_version: str = ""
    notes: tuple[str, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    not_run: str = ""

    @property
    def percent(self) -> float:
        """The trainable share in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain data, for JSON; a size that is no number is None."""
        from dataclasses import asdict

        out = {
            k: getattr(self, k)
            for k in (
                "equal", "trainable", "total", "percent", "peft_trainable", "peft_total",
                "peft_version", "not_run",
            )
        }  # fmt: skip
        out["differences"], out["notes"] = list(self.differences), list(self.notes)
        out["certificate"] = asdict(self.certificate)
        for k in ("parameters", "outputs", "gradients", "divergences"):
            out[k] = [_plain(asdict(row)) for row in getattr(self, k)]
        return out

    def _parts(self) -> Iterable[str]:
        from fxlora.report import comparison_parts

        return comparison_parts(self)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without NaN and infinity, for which JSON has no form."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def compare(
    model: nn.Module,
    config: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    run: bool | None = None,
) -> Comparison:
    """Compares the rewritten graph with what `peft.get_peft_model` makes of the same model.

    The model and the config are not changed: PEFT wraps a twin that shares the weights. Both sides
    draw their adapters under one seed; before they run, lora_B is filled with the same nonzero
    numbers on both sides, because with B = 0 almost every mistake computes the right output.

    Args:
        model: the model, on any device; on meta nothing is run.
        config: a `peft.LoraConfig`.
        args, kwargs: example inputs, as for `fxlora.trace`; built when left out.
        run: whether to run both models; by default when no parameter is on the meta device.

    Returns:
        A `Comparison`.

    Raises:
        ConfigError: as `fxlora.plan`.
        TraceError: when the model itself cannot be traced, or is a graph already.
        UnsupportedError: on meta, for an initialisation that is computed from the weights.
        Whatever peft raises, when it refuses what fxlora takes.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> result = fxlora.compare(model, LoraConfig(target_modules=["0"]), (torch.ones(2, 10),))
    >>> result.equal, result.trainable, result.total
    (True, 240, 565)
    """
    import peft

    from fxlora.example_inputs import for_model

    if isinstance(model, GraphModule) and KEY in model.meta:
        raise TraceError(
            "compare takes the model itself, which it traces and hands to peft, and this is the graph "
            "that fxlora made of one: fxlora.compare(model, config)"
        )
    args, kwargs = for_model(model, args, kwargs)
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        traced = trace(model, args, kwargs)
        plan = make_plan(traced, config)
        known = divergences(plan, model)
        _check_drawn(plan, traced)
        torch.manual_seed(SEED)
        ours = rewrite(traced, plan)
        as_peft = _as_peft(traced, plan, known, ours)
        with uncollected():
            peft_model = peft_side.wrap(model, config, SEED)
        theirs = peft_side.wrapped(peft_model)
        # In eval mode torch's fused encoder kernel runs past PEFT's adapters; what there is to
        # prove then is proved in train mode, and the divergence says the rest.
        mode = model.training or any(d.name == FAST_PATH for d in known)
        theirs.train(mode)
        as_peft.train(mode)
        table = _parameters(model, as_peft, peft_model)
        differences = [*_count_differences(plan, ours), *_table_differences(table, as_peft, theirs)]
        to_trace = _to_trace(model, config, plan, theirs).train(mode)
        certificate = _certificate(as_peft, to_trace, args, kwargs)
        outputs: tuple[Deviation, ...] = ()
        gradients: tuple[Deviation, ...] = ()
        dropped = False
        ran = _runnable(model) if run is None else run
        if ran:
            try:
                outputs, gradients, dropped = _run_both(as_peft, theirs, args, kwargs)
            except PeftRunError as e:
                differences.append(str(e))
            differences += _run_differences(outputs, gradients)
            known = _measured(known, traced, plan, (args, kwargs))
        differences += _certificate_differences(certificate, proved=ran and bool(outputs))
    peft_trainable, peft_total = peft_model.get_nb_trainable_parameters()
    return Comparison(
        equal=not differences and not any(d.when == "forward" for d in known),
        differences=tuple(differences),
        parameters=table,
        certificate=certificate,
        outputs=outputs,
        gradients=gradients,
        trainable=_counts(ours)[0],
        total=_counts(ours)[1],
        peft_trainable=peft_trainable,
        peft_total=peft_total,
        plan=plan,
        tree_before=_tree(model, plan),
        tree_after=_tree(theirs, plan),
        peft_version=peft.__version__,
        notes=(
            *info(traced).notes,
            *_unproved(certificate),
            *(_attention_notes(model, mode) if ran else ()),
            *((_DROPPED_MASK,) if dropped else ()),
        ),
        divergences=known,
        not_run="" if outputs else _why_not_run(ran, run),
    )


def _why_not_run(tried: bool, asked: bool | None) -> str:
    if tried:
        return "it failed, and the differences say how"
    return "run=False" if asked is False else "the weights are on the meta device"


def _check_drawn(plan: Plan, traced: GraphModule) -> None:
    """Refuses an initialisation peft computes from weights that are not there."""
    how = str(init_name(plan.config)).partition("_niter")[0]
    kasa = plan.config.kasa_config is not None
    if not kasa and how not in ("pissa", "olora", "mica"):
        return
    tensors = dict(traced.named_parameters(remove_duplicate=False))
    weights = [p.site.weight_name for p in plan.adapted]
    empty = [n for n in weights if n in tensors and tensors[n].device.type == "meta"]
    if empty:
        field = "kasa_config" if kasa else f"init_lora_weights={plan.config.init_lora_weights!r}"
        same = (
            "" if kasa else ", or compare with init_lora_weights=True, which gives the same graph"
        )
        raise UnsupportedError(
            f"{field} factors the base weights, and {empty[0]!r} is on the meta device, where peft "
            f"cannot draw the adapter. Compare with weights{same}"
        )


# ---- known divergences -------------------------------------------------------------------------


def _quirks(known: tuple[Divergence, ...]) -> frozenset[str]:
    return frozenset(d.name for d in known if d.when == "forward" and d.name != FAST_PATH)


def _as_peft(
    traced: GraphModule, plan: Plan, known: tuple[Divergence, ...], ours: GraphModule
) -> GraphModule:
    """Returns our graph, with PEFT's known mistakes built in where any bear on the plan."""
    if not _quirks(known):
        return ours
    torch.manual_seed(SEED)
    return rewrite_as_peft(traced, plan, _quirks(known))


def _measured(
    known: tuple[Divergence, ...], traced: GraphModule, plan: Plan, inputs: tuple[Any, Any]
) -> tuple[Divergence, ...]:
    """Returns the divergences with their sizes: each mistake alone, against none."""
    if all(d.when != "forward" for d in known):
        return known

    def outputs(quirks: frozenset[str]) -> list[torch.Tensor] | None:
        torch.manual_seed(SEED)
        graph = rewrite_as_peft(traced, plan, quirks)
        _perturb([dict(graph.named_parameters())], list(trained_values(graph, plan.adapter)))
        try:
            with _kept_buffers(graph):
                return _run(graph, {}, *inputs)[0]
        except RuntimeError:  # PEFT's mistake can leave shapes that do not add up
            return None

    right = outputs(frozenset())
    made = []
    for d in known:
        wrong = outputs(frozenset((d.name,))) if d.when == "forward" else None
        size = None if wrong is None or right is None else largest(right, wrong)
        made.append(replace(d, size=size))
    return tuple(made)


def _to_trace(model: nn.Module, config: Any, plan: Plan, theirs: nn.Module) -> nn.Module:
    """Returns PEFT's model to trace: one of its own where a forward swaps parameters.

    lora.MultiheadAttention takes its parameters out and puts new ones in at every call; after a
    trace these are fakes.
    """
    if all(p.kind != "MultiheadAttention" for p in plan.adapted):
        return theirs
    return peft_side.wrapped(peft_side.wrap(model, config, SEED))


# ---- parameters --------------------------------------------------------------------------------


def _parameters(model: nn.Module, ours: GraphModule, peft_model: Any) -> tuple[Parameter, ...]:
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    mine = dict(ours.named_parameters())
    prefix = "base_model.model."
    other = {
        peft_side.common_name(n.removeprefix(prefix)): (n, p)
        for n, p in peft_model.named_parameters()
    }
    rows = []
    for name in [*mine, *(n for n in other if n not in mine)]:
        p = mine.get(name)
        peft_name, q = other.get(name, ("", None))
        shown = p if p is not None else q
        rows.append(
            Parameter(
                name=name,
                peft_name=peft_name,
                shape=tuple(shown.shape),
                before=before.get(name),
                after=None if p is None else p.requires_grad,
                peft_after=None if q is None else q.requires_grad,
            )
        )
    return tuple(rows)


def _counts(ours: GraphModule) -> tuple[int, int]:
    """Returns how many parameters train, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in ours.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _count_differences(plan: Plan, ours: GraphModule) -> list[str]:
    """Says where the plan, which counts before anything is made, counts otherwise than the graph."""
    trainable, total = _counts(ours)
    if (plan.trainable, plan.total) == (trainable, total):
        return []
    return [
        f"the plan counts {plan.trainable:,} of {plan.total:,} parameters trainable, the graph has "
        f"{trainable:,} of {total:,}"
    ]


def _table_differences(
    table: tuple[Parameter, ...], ours: GraphModule, theirs: nn.Module
) -> list[str]:
    out = []
    other = {peft_side.common_name(n): p for n, p in theirs.named_parameters()}
    mine = dict(ours.named_parameters())
    for row in table:
        if not row.peft_name:
            out.append(f"parameter {row.name}: PEFT has none by that name")
        elif row.after is None:
            out.append(f"parameter {row.peft_name}: only PEFT has it")
        elif row.after != row.peft_after:
            out.append(f"parameter {row.name}: requires_grad {row.after}, PEFT {row.peft_after}")
        if row.name in mine and row.name in other:
            a, b = mine[row.name], other[row.name]
            if a.shape != b.shape or a.dtype != b.dtype:
                out.append(
                    f"parameter {row.name}: {tuple(a.shape)} {a.dtype}, "
                    f"PEFT {tuple(b.shape)} {b.dtype}"
                )
            elif _has_values(a) and not torch.equal(a, b) and distance(a, b) != 0:
                out.append(f"parameter {row.name}: drawn differently under the same seed")
    return out


def _has_values(p: torch.Tensor) -> bool:
    # A packed weight (torchao's) has no equality of its own; it is shared, never copied.
    return p.device.type != "meta" and type(p.data) is torch.Tensor


# ---- the certificate ---------------------------------------------------------------------------


def _certificate(
    ours: GraphModule, theirs: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Certificate:
    try:
        traced = trace(theirs, args, kwargs)
    except Exception as e:  # noqa: BLE001 - of PEFT's own forward, which may raise anything
        mine = canonical(ours)
        problem = str(e) if isinstance(e, TraceError) else f"{type(e).__name__}: {e}"
        return Certificate(mine.digest, "", False, len(mine.nodes), problem=problem)
    mode = info(traced).mode
    with uncollected():
        mine, other = canonical(ours, mode=mode), canonical(traced, peft_side.common_name, mode)
    return certify(mine, other)


def certify(mine: Canonical, other: Canonical) -> Certificate:
    """Compares two canonical graphs."""
    equal = mine.digest == other.digest
    return Certificate(
        ours=mine.digest,
        theirs=other.digest,
        equal=equal,
        nodes=len(mine.nodes),
        difference=None if equal else first_difference(mine, other),
    )


def _unproved(certificate: Certificate) -> list[str]:
    problem = certificate.problem
    return [f"no certificate: PEFT's model could not be traced. {problem}"] if problem else []


def _certificate_differences(certificate: Certificate, proved: bool) -> list[str]:
    """Returns how the certificate fails; none where there is none and a run stands in for it."""
    if certificate.equal or (certificate.problem and proved):
        return []
    if certificate.problem:
        return [f"no certificate: PEFT's wrapped model could not be traced. {certificate.problem}"]
    if certificate.difference is None:
        return ["the graphs differ in their parameters or effects only"]
    mine, other = certificate.difference
    return [f"the graphs part where ours computes {mine} and PEFT's {other}"]


# ---- running both ------------------------------------------------------------------------------


def _runnable(model: nn.Module) -> bool:
    return all(t.device.type != "meta" for t in (*model.parameters(), *model.buffers()))


def _run_both(
    ours: GraphModule, theirs: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Deviation, ...], tuple[Deviation, ...], bool]:
    """Runs both; returns outputs, gradients, and whether a mask of all ones was kept for PEFT."""
    mine = dict(ours.named_parameters())
    other = {peft_side.common_name(n): p for n, p in theirs.named_parameters()}
    drawn = trained_values(ours, info(ours).plan.adapter)
    _perturb([mine, other], [n for n in drawn if n in other])
    with _kept_buffers(ours, theirs):
        try:
            a, grads_a = _run(ours, mine, args, kwargs)
        except RuntimeError as e:
            # Only where PEFT's own mistake is built in: shapes that do not add up (a dilation lost).
            raise PeftRunError(f"what PEFT computes cannot run: {e}") from e
    with _kept_buffers(ours, theirs), _plain_attention(), _kept_masks() as masks:
        try:
            b, grads_b = _run(theirs, other, args, kwargs)
        except Exception as e:
            raise PeftRunError(f"PEFT's model fails when it runs: {type(e).__name__}: {e}") from e
    if not a:
        raise PeftRunError("nothing was compared: the output holds no floating tensor")
    if len(a) != len(b):
        raise PeftRunError(f"the graph returns {len(a)} floating tensors, PEFT's model {len(b)}")
    outputs = [_deviation(f"output {i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    names = [n for n in mine if n in grads_a or n in grads_b]
    gradients = [_deviation(n, grads_a.get(n), grads_b.get(n)) for n in names]
    return tuple(outputs), tuple(gradients), bool(masks)


_DROPPED_MASK = (
    "transformers drops an attention mask of all ones; the graph uses it, and so did PEFT's model here. "
    "Leave it out to compare what runs without one: it rounds otherwise, and where a model's mask says "
    "more than what is padding (PaliGemma's image and prefix) it computes something else"
)


@contextlib.contextmanager
def _kept_masks() -> Iterator[list[str]]:
    """Lets transformers use a mask of all ones that was passed in, as the graph does.

    Yields:
        The functions that would have dropped one; filled while the model runs.
    """
    masking = sys.modules.get("transformers.masking_utils")
    original = getattr(masking, "is_tracing", None)
    would: list[str] = []
    if original is None:
        yield would
        return

    def is_tracing(tensor: Any = None) -> bool:
        caller = sys._getframe(1)
        given = (caller.f_locals.get(n) for n in ("padding_mask", "attention_mask"))
        if not isinstance(tensor, torch.Tensor) or all(tensor is not g for g in given):
            return bool(original(tensor))
        if bool(tensor.all()):
            would.append(caller.f_code.co_name)
        return True

    with mock.patch.object(masking, "is_tracing", is_tracing):
        yield would


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Turns torch's fused attention for inference off: a graph computes the plain one.

    nn.MultiheadAttention takes it in eval mode when nothing it reads wants a gradient, and it rounds
    otherwise. What it does to adapters is a divergence of its own, FAST_PATH.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention_notes(model: nn.Module, mode: bool) -> list[str]:
    if mode or not any(isinstance(m, nn.MultiheadAttention) for m in model.modules()):
        return []
    return [
        "torch's fused attention for inference (torch.backends.mha) was off while PEFT's model ran; "
        "it rounds otherwise than the plain one, which is what the graph computes"
    ]


def _perturb(sides: list[dict[str, nn.Parameter]], names: list[str]) -> None:
    """Adds the same numbers to an adapter's parameters on every side, so that none is zero."""
    torch.manual_seed(SEED)
    for name in names:
        values = torch.randn(sides[0][name].shape, dtype=torch.float32) * 0.05
        for side in sides:
            p = side[name]
            p.data.copy_(p.data + values.to(p))


@contextlib.contextmanager
def _kept_buffers(*models: nn.Module) -> Iterator[None]:
    """Puts back what a run counts in place: both sides share the model's own buffers."""
    limited = [  # a lookup with max_norm rescales the weight in place
        e.weight.data
        for m in models
        for e in m.modules()
        if isinstance(e, nn.Embedding) and e.max_norm is not None
    ]
    kept = [(b, b.clone()) for b in [*limited, *(b for m in models for b in m.buffers())]]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, before in kept:
                if not torch.equal(b, before):
                    b.copy_(before)


def _run(
    model: nn.Module, parameters: dict[str, nn.Parameter], args: tuple[Any, ...], kwargs: Any
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(SEED)
    out = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    tensors = [t for t in _leaves(out) if t.is_floating_point()]
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    losses = [t.float().square().mean() for t in tensors if t.requires_grad]
    found: dict[str, torch.Tensor] = {}
    if losses and trained:
        grads = torch.autograd.grad(sum(losses), list(trained.values()), allow_unused=True)  # type: ignore[arg-type]
        found = {n: g for n, g in zip(trained, grads, strict=True) if g is not None}
    return [t.detach() for t in tensors], found


def _leaves(value: Any) -> list[torch.Tensor]:
    """Returns every tensor of an output, inside whatever object it came in."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _leaves(v)]
    return tensors_inside(value)


def _deviation(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> Deviation:
    if a is None or b is None:
        return Deviation(name, False, math.inf, "only one side has it")
    for what, x, y in (
        ("shape", tuple(a.shape), tuple(b.shape)),
        ("dtype", a.dtype, b.dtype),
    ):
        if x != y:
            return Deviation(name, False, math.inf, f"{what} {x}, PEFT {y}")
    if torch.equal(a, b):
        return Deviation(name, True, 0.0)
    size = distance(a, b)
    problem = "NaN on one side only" if math.isnan(size) else ""
    return Deviation(name, size == 0, size, problem, int((a.isnan() & b.isnan()).sum()))


def _run_differences(outputs: tuple[Deviation, ...], gradients: tuple[Deviation, ...]) -> list[str]:
    out = []
    for kind, rows in (("", outputs), ("gradient of ", gradients)):
        for d in rows:
            if d.problem:
                out.append(f"{kind}{d.name}: {d.problem}")
            elif not d.equal:
                out.append(f"{kind}{d.name}: differs by up to {d.largest:.3g}")
    return out


# ---- the module tree ---------------------------------------------------------------------------


def _tree(model: nn.Module, plan: Plan) -> str:
    """Returns the modules around the first adapted site, as `print(module)` shows them."""
    first = next((s for s in plan.adapted), None)
    if first is None:
        return ""
    owner = first.name if first.kind != "Parameter" else first.name.rpartition(".")[0]
    return f"({owner}): {model.get_submodule(owner)!r}"
