"""One name explained: which of PEFT's rules took or left it, what would take it, what it then does.

The rules are asked in PEFT's order, one by one, and each says what it saw; the first that decides
decides. What a name is not (a layer of its own, a module at all) is said as well, with what is near.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora import matching
from fxlora.divergences import divergences
from fxlora.effects import effects
from fxlora.errors import FxloraError, NoMatchError
from fxlora.facts import info
from fxlora.flops import distinct_calls, example_sizes, site_flops, whole_out_features
from fxlora.fused import fused_advice, slice_names, slices_named
from fxlora.html import Printed
from fxlora.ladder import Step, hits_of, how_it_hits, ladder
from fxlora.patterns import smallest_regex
from fxlora.plan import Plan, PlannedSite
from fxlora.rewrite import rewrite
from fxlora.roles import place_of, role_of
from fxlora.sites import kind_of, sites
from fxlora.slices import Slice, slices
from fxlora.targets import model_type
from fxlora.text import count, share_of

SHOWN = 4  # of a list, before "and more"


@dataclass(frozen=True)
class Entry:
    """A target_modules entry that would take a name.

    Attributes:
        entry: the name or suffix.
        takes: how many sites it takes.
        others: some of the other modules it takes, the first few.
        refused: modules among them that LoRA cannot adapt, for which PEFT raises.
        renamed: the parameter PEFT takes it for, on models whose experts were fused since v4.
    """

    entry: str
    takes: int
    others: tuple[str, ...]
    refused: tuple[str, ...]
    renamed: str = ""


@dataclass(frozen=True)
class PatternKey:
    """A rank_pattern or alpha_pattern key and what it does to a name.

    Attributes:
        field: "rank_pattern" or "alpha_pattern".
        key: the key.
        value: its value.
        status: "applies", "shadowed" (an earlier key applies) or "nearly" (it does not match).
        reason: one clause.
    """

    field: str
    key: str
    value: Any
    status: str
    reason: str


@dataclass(frozen=True)
class Explanation(Printed):
    """Everything known of one name under a plan; prints as text.

    Attributes:
        name: the name asked for.
        what: "site", "slice", "container", "module", "parameter" or "entry" (no module's name, but
            the end of some).
        is_a: what the name stands for, in words.
        verdict: "adapted", "skipped" or "excluded"; "" where there is none.
        rule: the rule that decided (`fxlora.matching.Match.rule`).
        steps: every rule in PEFT's order, with what it said.
        entries: the suffixes that would take it, shortest first, those that differ in what they take.
        near: near names: of sites where the name is none, else of targets that missed it.
        patterns: rank and alpha keys that apply or nearly do.
        calls: one line for each call.
        bypassed: how many calls an adapter here does not reach.
        adapter: rank, scaling, shapes and counts; empty where there is none.
        share_of_flops, share_of_parameters: of all linear sites.
        effect: what a backward pass says; empty where there is no adapter.
        surprises: where PEFT's behaviour here is not what one expects.
        sites: (name, verdict, reason) of the sites below a container, or that an entry takes.
        advice: further sentences.
    """

    name: str
    what: str
    is_a: str
    verdict: str = ""
    rule: str = ""
    steps: tuple[Step, ...] = ()
    entries: tuple[Entry, ...] = ()
    near: tuple[str, ...] = ()
    patterns: tuple[PatternKey, ...] = ()
    calls: tuple[str, ...] = ()
    bypassed: int = 0
    adapter: Mapping[str, Any] | None = None
    share_of_flops: float | None = None
    share_of_parameters: float | None = None
    effect: Mapping[str, Any] | None = None
    surprises: tuple[str, ...] = ()
    sites: tuple[tuple[str, str, str], ...] = ()
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the explanation as plain data, for JSON."""
        return asdict(self)

    def _parts(self) -> Iterable[str]:
        from fxlora.explain_report import explanation_lines

        return explanation_lines(self)


def explain_text(traced: GraphModule, plan: Plan, name: str) -> str:
    """Returns `explain` as text."""
    return str(explain(traced, plan, name))


def explain_dict(traced: GraphModule, plan: Plan, name: str) -> dict[str, Any]:
    """Returns `explain` as plain data."""
    return explain(traced, plan, name).to_dict()


def explain(traced: GraphModule, plan: Plan, name: str) -> Explanation:
    """Says which rule took or left a name, what would take it, and what an adapter there does.

    Args:
        traced: what `fxlora.trace` returned; read.
        plan: for that graph.
        name: of a site, a slice of a fused one (`self_attn.q_proj` where there is a `qkv_proj`), a
            parameter, any module, or the end of some sites' names.

    Raises:
        NoMatchError: when the model has nothing of that name; names what is near.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    >>> traced = fxlora.trace(model, (torch.randn(2, 10),))
    >>> made = explain(traced, fxlora.plan(traced, LoraConfig(r=4, target_modules=["0"])), "2")
    >>> made.verdict, [(s.rule, s.outcome) for s in made.steps]
    ('skipped', [('exclude_modules', 'not set'), ('modules_to_save', 'not set'), \
('target_modules', 'leaves'), ('layers_to_transform', 'not set')])
    """
    model = info(traced).model
    modules = dict(model.named_modules(remove_duplicate=False))
    planned = _planned(plan, name)
    if planned is not None:
        return _site(traced, plan, planned, name)
    cut = slices_named(traced, name)
    if name in modules and name:
        below = [p for p in plan if p.name.startswith(f"{name}.")]
        return _module(plan, model, name, below)
    if len({s.name for s in cut}) == 1:
        return _slice(traced, plan, name, cut[0])
    own = [p for p in plan if p.name == name or p.name.endswith(f".{name}")]
    if own or cut:
        return _entry(traced, plan, name, own, cut)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if name in parameters:
        return _parameter(plan, name)
    raise NoMatchError(_unknown(traced, plan, name, [*modules, *parameters]))


def _planned(plan: Plan, name: str) -> PlannedSite | None:
    for p in plan:
        if name in (p.name, *p.site.aliases, p.site.weight_name):
            return p
    return None


def _unknown(traced: GraphModule, plan: Plan, name: str, every: list[str]) -> str:
    names = [n for p in plan for n in (p.name, *p.site.aliases) if n]
    for s in slices(traced):  # by what they are called where they are not fused
        names += [f"{s.site.rpartition('.')[0]}.{n}" for n in slice_names(s.part)[:1]]
    near = _near(name, names, every)
    listed = f" The nearest: {', '.join(map(repr, near))}." if near else ""
    tops = list(dict.fromkeys(n.partition(".")[0] for n in every if n))
    return (
        f"{name!r} is no module, parameter or slice of {plan.model_class}, and the end of none of "
        f"its {len(plan)} linear sites' names.{listed} The names begin with {', '.join(tops[:8])}"
    )


def _near(name: str, names: Iterable[str], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns near names: with the same end first, then by likeness, whole or by last part."""
    names = list(dict.fromkeys(names))
    last = name.rpartition(".")[2]
    lasts: dict[str, str] = {}
    for n in names:
        lasts.setdefault(n.rpartition(".")[2], n)
    found = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if not found:  # one of every kind whose last part is near
        found = [lasts[n] for n in difflib.get_close_matches(last, list(lasts), n=2, cutoff=0.6)]
    found += difflib.get_close_matches(name, [m for m in more if m], n=2, cutoff=0.75)
    return tuple(dict.fromkeys(found))[:3]


# ---- one site ----------------------------------------------------------------------------------


def _site(traced: GraphModule, plan: Plan, p: PlannedSite, name: str) -> Explanation:
    model = info(traced).model
    flops, numbers = _totals(traced)
    target = name if name in p.site.aliases else p.name
    return Explanation(
        name=name,
        what="site",
        is_a=_is_a(p, name, model, traced),
        verdict=p.verdict,
        rule=p.rule,
        steps=tuple(_steps(plan, p)),
        entries=()
        if p.kind == "Parameter" or not p.name or p.site.of
        else tuple(_entries(plan, model, p.name)),
        near=() if p.adapted else _near_targets(plan, target),
        patterns=tuple(_patterns(plan.config, p)),
        calls=tuple(_call_lines(p)),
        bypassed=p.bypassed,
        adapter=_adapter(plan, p) if p.adapted else None,
        share_of_flops=share_of(site_flops(p.site, example_sizes(traced)), flops),
        share_of_parameters=share_of(_numel(p), numbers),
        effect=_effect(traced, plan, p),
        surprises=tuple(_surprises(traced, plan, p, name)),
    )


def _numel(p: PlannedSite) -> int:
    return math.prod(p.site.shape) * p.site.out_features // whole_out_features(p.site)


def _totals(traced: GraphModule) -> tuple[int, int]:
    """Returns the operations and the parameters of all linear sites, each weight once."""
    sizes = example_sizes(traced)
    tied: dict[int, int] = {}
    flops = 0
    for site in sites(traced):
        weight = info(traced).model
        for part in site.weight_name.split("."):
            weight = getattr(weight, part, None)
        tied[id(weight)] = math.prod(site.shape)
        flops += site_flops(site, sizes)
    return flops, sum(tied.values())


def _is_a(p: PlannedSite, name: str, model: nn.Module, traced: GraphModule) -> str:
    s = p.site
    what = f"a {s.type_name}, {s.out_features} x {s.in_features}"
    if s.kind == "Parameter":
        what = f"a bare parameter of shape {'x'.join(map(str, s.shape))}"
    role = role_of(s, model)
    parts = [x for x in slices(traced) if x.site == p.name]
    fused = ", fused: " + ", ".join(f"{x.part} {x.where}" for x in parts) if parts else ""
    alias = f"; another name of {p.name}" if name in s.aliases else ""
    if name == s.weight_name and name != p.name:
        alias = f"; {name} is its weight"
    place = place_of(p.name)
    where = f", layer {place.layer}" if place.layer is not None else ""
    return (
        f"{what} ({role}{where}){fused}{alias}"
        if role != "other" or where
        else what + fused + alias
    )


def _steps(plan: Plan, p: PlannedSite) -> list[Step]:
    config = plan.config
    if p.kind == "Parameter":
        return [_parameter_step(config, p)]
    if not p.name:
        return [Step("target_modules", "leaves", "it is the model itself, which PEFT never adapts")]
    if p.rule == "attention":
        outer = p.name.rpartition(".")[0]
        return [Step("attention", "takes", f"{p.reason}: ask for {outer!r} to see why", outer)]
    names = [p.name, *(p.site.aliases if p.site.rows else ())]
    if p.site.of and not p.site.rows:  # a single call goes by its layer's name
        names = [p.site.of]
    # A part goes by either of its names: the one a target hits, where one does.
    ladders = [ladder(config, n) for n in names]
    steps = next((x for x in ladders if x[2].outcome in ("takes", "passes")), ladders[0])
    every = any(q.reason.startswith("all-linear") for q in plan)
    return [_said_all_linear(s, p) if every and s.rule == "target_modules" else s for s in steps]


def _said_all_linear(step: Step, p: PlannedSite) -> Step:
    if step.outcome in ("takes", "leaves"):
        return replace(step, reason=p.reason, entry="all-linear", hit="")
    return step


def _parameter_step(config: Any, p: PlannedSite) -> Step:
    targets = config.target_parameters
    if not targets:
        return Step(
            "target_parameters", "not set",
            "a bare parameter, which target_modules never takes; name it in target_parameters",
        )  # fmt: skip
    entry = matching.parameter_match(targets, p.name)
    if entry is None:
        return Step(
            "target_parameters", "leaves",
            f"none of {sorted(targets)} is its name or its dotted suffix",
        )  # fmt: skip
    return Step(
        "target_parameters", "takes", f"{entry!r} {how_it_hits(entry, p.name)}", entry, entry
    )


def _entries(plan: Plan, model: nn.Module, name: str) -> Iterator[Entry]:
    """Yields the suffixes that take a name, shortest first; one for each set of sites taken."""
    modules = [n for n, _ in model.named_modules() if n]
    known = {p.name for p in plan if p.kind != "Parameter"}
    parts = name.split(".")
    before: set[str] | None = None
    new = _new_names(model).get(parts[-1], "")
    for i in range(len(parts) - 1, -1, -1):
        entry = ".".join(parts[i:])
        taken = {n for n in modules if n == entry or n.endswith(f".{entry}")}
        if taken == before:
            continue
        before = taken
        sites_taken = [n for n in modules if n in taken and n in known]
        refused = [n for n in modules if n in taken and n not in known]
        others = [n for n in sites_taken if n != name]
        yield Entry(entry, len(sites_taken), tuple(others[:SHOWN]), tuple(refused[:SHOWN]), new)


def _new_names(model: nn.Module) -> Mapping[str, str]:
    """Returns v4's names of expert layers -> the parameter peft takes them for on this model."""
    kind = model_type(model)
    if kind is None:
        return {}
    from peft.utils import transformers_weight_conversion as conversion

    base = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    table_of = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return dict(table_of.get(base) or {})


def _near_targets(plan: Plan, name: str) -> tuple[str, ...]:
    """Returns the target entries that resemble the end of a name and miss it."""
    names = [n for p in plan for n in (p.name, *p.site.aliases)]
    # One that takes other sites is no slip of the pen.
    targets = [t for t in plan.targets if not any(hits_of([t], n) for n in names)]
    parts = name.split(".")
    ends = {".".join(parts[i:]) for i in range(len(parts))}
    found: list[str] = []
    for end in sorted(ends, key=len):
        found += difflib.get_close_matches(end, [t for t in targets if t not in ends], n=2)
    return tuple(dict.fromkeys(found))[:3]


def _patterns(config: Any, p: PlannedSite) -> Iterator[PatternKey]:
    for which in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, which) or {}
        _, first = matching.pattern_value(pattern, p.name, None)
        for key, value in pattern.items():
            if key == first:
                how = "the first key that matches the end of its name"
                yield PatternKey(which, key, value, "applies", how)
            elif re.match(rf"(.*\.)?({key})$", p.name):
                yield PatternKey(which, key, value, "shadowed", f"{first!r} stands before it")
            else:
                why = _nearly(key, p.name)
                if why:
                    yield PatternKey(which, key, value, "nearly", why)


def _nearly(key: str, name: str) -> str:
    inner = re.search(key, name)
    if inner is not None and inner[0]:
        where = "inside a part of" if inner.end() == len(name) else "in the middle of"
        return (
            f"it matches {inner[0]!r} {where} the name; a key must match whole parts up to the end"
        )
    parts = name.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    near = difflib.get_close_matches(key, ends, n=1, cutoff=0.9)
    return f"it is near {near[0]!r}" if near else ""


def _call_lines(p: PlannedSite) -> Iterator[str]:
    for call in distinct_calls(p.site):
        source = call.node.meta.get("source")
        line = f" at {source.short}" if source is not None else ""
        shape = call.node.meta.get("shape")
        out = f" -> {'x'.join(map(str, shape))}" if shape is not None else ""
        past = "" if call.through_module else "; reads the weight past the module"
        if past and p.adapted and p.reaches(call):
            past += ", and is adapted all the same"
        if call.path not in (p.name, p.scope, p.name.rpartition(".")[0]):
            past += f"; called as {call.path or 'the model itself'}"
        yield f"{call.node.name}{out}{line}{past}"


def _adapter(plan: Plan, p: PlannedSite) -> dict[str, Any]:
    assert p.adapter is not None
    scale = "alpha / sqrt(r)" if plan.config.use_rslora else "alpha / r"
    return {
        "r": p.r,
        "lora_alpha": p.lora_alpha,
        "scaling": p.scaling,
        "formula": scale,
        "variant": p.variant,
        "form": p.form,
        "prefix": p.prefix,
        "parameters": {n.format(plan.adapter): list(shape) for n, shape in p.adapter.parameters},
        "numel": p.adapter.numel,
        "trainable": p.adapter.trainable,
        "share_of_trainable": share_of(p.adapter.trainable, plan.trainable),
        "share_of_weight": share_of(p.adapter.numel, _numel(p)),
    }


def _effect(traced: GraphModule, plan: Plan, p: PlannedSite) -> dict[str, Any] | None:
    """Returns what a backward pass does at one site, from a rewrite that adapts it alone.

    Other adapters do not change whether this one is reached; without them it takes no time.
    """
    if not p.adapted:
        return None
    outer = p.name.rpartition(".")[0] if p.rule == "attention" else p.name
    kept = {outer, f"{outer}.out_proj"} if p.form == "delta" and p.kind != "Parameter" else {p.name}
    alone = [
        q
        if q.name in kept or (p.kind == "Parameter" and q.prefix.startswith(p.scope) and q.adapted)
        else replace(q, verdict="skipped", adapter=None)
        for q in plan
    ]
    try:
        made = effects(rewrite(traced, replace(plan, sites=tuple(alone), saved=(), tokens=())))
    except FxloraError as e:
        return {"verdict": "unknown", "reason": str(e), "witness": []}
    found = next(e for e in made if e.site == p.name)
    return {"verdict": found.verdict, "reason": found.reason, "witness": list(found.witness)}


# ---- surprises ---------------------------------------------------------------------------------


def _surprises(traced: GraphModule, plan: Plan, p: PlannedSite, name: str) -> Iterator[str]:
    model = info(traced).model
    if p.adapted:
        whole = tuple(q for q in plan if not q.site.of)  # what PEFT can represent
        for d in divergences(replace(plan, sites=whole), model):
            if p.name in d.sites:
                thread = f" ({d.thread})" if d.thread else ""
                yield f"{d.name} [{d.when}]: {d.what}{thread}"
    if p.beyond_peft:
        yield f"beyond PEFT: {p.beyond_peft}"
    if p.site.rows:
        pass
    elif name in p.site.aliases:
        yield (
            f"PEFT sees a module by its first name only: a target that names {name!r} matches "
            f"nothing; write {p.name!r}"
        )
    elif p.adapted and p.site.aliases and p.bypassed:
        yield (
            f"the module has another name, {p.site.aliases[0]!r}; PEFT replaces it under its first "
            "name, so calls by the other are not adapted"
        )
    yield from _renamings(plan, p, model)
    if p.adapted and p.kind == "Parameter" and len(p.site.shape) == 3:
        yield (
            f"one adapter of rank {p.r} for each of {p.experts} experts: lora_A has "
            f"{p.r * p.experts} rows"
        )
    if p.adapted and role_of(p.site, model) == "router":
        yield "it is a router: an adapter here changes which experts are asked"
    if p.adapted and not p.site.calls:
        yield "it is never called on the traced path, so the adapter does not train"
    if p.rule == "modules_to_save" and p.name not in {s.name for s in plan.saved}:
        yield "it is inside a module that is trained as a whole, so all of its weight trains"


def _renamings(plan: Plan, p: PlannedSite, model: nn.Module) -> Iterator[str]:
    new = _new_names(model)
    last = p.name.rpartition(".")[2]
    if p.kind != "Parameter" and last in new:
        yield (
            f"on this model type PEFT takes every target that ends in {last!r} for v4's name of an "
            f"expert layer and makes it target_parameters={new[last]!r}: no target reaches this "
            "layer (huggingface/peft#3711)"
        )
    old = sorted(o for o, n in new.items() if p.name.endswith(f".{n}"))
    if p.adapted and p.kind == "Parameter" and old and p.r != plan.config.r:
        yield (
            f"{' and '.join(old)} were layers of their own in transformers 4: PEFT makes them this "
            f"parameter and gives it r={p.r}, {len(old)} times the {plan.config.r} asked for"
        )


# ---- what is not a site ------------------------------------------------------------------------


def _module(plan: Plan, model: nn.Module, name: str, below: list[PlannedSite]) -> Explanation:
    module = model.get_submodule(name)
    kind = type(module).__name__
    steps = ladder(plan.config, name)
    what = "container" if below else "module"
    numbers = sum(p.numel() for p in module.parameters())
    words = f"a {kind}, {count(numbers, 'parameter')}"
    words += f", {count(len(below), 'linear site')} below" if below else ", no linear site"
    advice = []
    if not below:
        advice.append(
            f"LoRA adapts linear layers, convolutions, embeddings and attention; a {kind} is none "
            f"of them. Named in target_modules PEFT raises ValueError; modules_to_save=[{name!r}] "
            "trains it as a whole"
        )
    elif kind_of(type(module)) is None:
        last = list(dict.fromkeys(p.name.rpartition(".")[2] for p in below))
        advice.append(
            f"its own name as a target is refused, in PEFT too; name the layers inside it: "
            f"{', '.join(last[:8])}" + _regex_for(model, below)
        )
    return Explanation(
        name=name, what=what, is_a=words, verdict=_together(below), rule="",
        steps=tuple(s for s in steps if below == [] or s.outcome != "not set"),
        sites=tuple((p.name, p.verdict, p.reason) for p in below),
        advice=tuple(advice),
    )  # fmt: skip


def _regex_for(model: nn.Module, below: list[PlannedSite]) -> str:
    inside = [p.name for p in below if p.kind != "Parameter"]
    if not inside:
        return ""
    pattern = smallest_regex([n for n, _ in model.named_modules() if n], inside)
    return f"; a regex for these alone is {pattern!r}"


def _together(members: Iterable[PlannedSite]) -> str:
    verdicts = {p.verdict for p in members}
    return (
        verdicts.pop() if len(verdicts) == 1 else "partly adapted" if "adapted" in verdicts else ""
    )


def _slice(traced: GraphModule, plan: Plan, name: str, cut: Slice) -> Explanation:
    owner = next(p for p in plan if p.site.owner == cut.site)
    inner = _site(traced, plan, owner, cut.site)
    rows = ", ".join(f"{r.start}:{r.stop}" for r in cut.rows[:SHOWN])
    more = f" and {len(cut.rows) - SHOWN} more ranges" if len(cut.rows) > SHOWN else ""
    share = share_of(cut.out_features, owner.site.out_features)
    leaf = cut.site.rpartition(".")[2]
    state = (
        f"{cut.site} is adapted as a whole, this slice with it"
        if owner.adapted
        else f"an entry for {name.rpartition('.')[2]!r} matches nothing: the layer is {leaf!r}"
    )
    return replace(
        inner, name=name, what="slice",
        is_a=(
            f"no layer of its own: rows {rows}{more} of {cut.site} "
            f"({cut.out_features} of {owner.site.out_features}), its {cut.part!r} part"
        ),
        share_of_flops=(inner.share_of_flops or 0) * share,
        share_of_parameters=(inner.share_of_parameters or 0) * share,
        advice=(state, *_advice_on(leaf, fused_advice(traced, plan))),
    )  # fmt: skip


def _advice_on(leaf: str, advice: Iterable[str]) -> Iterator[str]:
    """Keeps of the advice what is about one fused layer, and the alternatives."""
    return (a for a in advice if " nothing: " not in a or f" of {leaf} (" in a)


def _entry(
    traced: GraphModule, plan: Plan, name: str, own: list[PlannedSite], cut: tuple[Slice, ...]
) -> Explanation:
    advice: list[str] = []
    if cut and not own:
        leaf = list(dict.fromkeys(s.site.rpartition(".")[2] for s in cut))
        advice.append(
            f"as a target {name!r} matches nothing: it names {count(len(cut), 'slice')} of "
            f"{', '.join(leaf)} (rows {cut[0].where} of {cut[0].site})"
        )
        advice += _advice_on(leaf[0], fused_advice(traced, plan))
    modules = [p for p in own if p.kind != "Parameter"]
    if own:
        advice.append(
            f"as a target_modules entry {name!r} takes {count(len(modules), 'site')}"
            if modules
            else f"as a target_parameters entry {name!r} takes {count(len(own), 'parameter')}"
        )
    return Explanation(
        name=name, what="entry", is_a="no module's name, but the end of some",
        verdict=_together(own), sites=tuple((p.name, p.verdict, p.reason) for p in own),
        advice=tuple(advice),
    )  # fmt: skip


def _parameter(plan: Plan, name: str) -> Explanation:
    owner, _, last = name.rpartition(".")
    trains = any(name.startswith(f"{s.name}.") for s in plan.saved)
    return Explanation(
        name=name, what="parameter", is_a=f"the parameter {last!r} of {owner or 'the model'}",
        advice=(
            "it trains: its module is trained as a whole (modules_to_save)"
            if trains
            else f"no linear function of its own reads it; bias={plan.config.bias!r} decides about "
            "biases, modules_to_save about the rest",
        ),
    )  # fmt: skip
