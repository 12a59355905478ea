"""Sites x LoraConfig -> a plan: a verdict with a reason for every site, before anything changes."""

from __future__ import annotations

import keyword
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora import advice, extras, layers, matching
from fxlora.config import init_name, resolved_copy
from fxlora.errors import (
    AdapterError,
    ConfigError,
    NoMatchError,
    UnsupportedError,
    did_you_mean,
)
from fxlora.extras import SavedModule, TokenRows
from fxlora.facts import info
from fxlora.freezing import bias_trains
from fxlora.html import Printed
from fxlora.layers import AdapterShape
from fxlora.reach import checked, one_call, with_slices
from fxlora.sites import Call, Places, Site, kind_of, sites
from fxlora.targets import AllLinear, model_type, resolve_targets
from fxlora.text import table
from fxlora.trace.bulk import uncollected
from fxlora.trace.shell import tree
from fxlora.trace.tracer import outline

ADAPTER = "default"


@dataclass(frozen=True)
class PlannedSite:
    """One site and what the configuration does to it.

    Attributes:
        site: the linear map.
        verdict: "adapted", "skipped" or "excluded".
        rule: the matching rule that decided (see `fxlora.matching.Match`).
        reason: one clause for a reader.
        r: rank of the adapter (0 when there is none); per expert for a 3-D parameter.
        lora_alpha: numerator of the scaling.
        scaling: the factor on B(A(x)).
        experts: the number of maps a 3-D parameter holds; 1 for everything else.
        prefix: where the adapter hangs, below the model.
        scopes: the names of the module during whose calls an adapter added to the weight is in
            effect; `scope` is the first of them.
        adapter: the parameters the adapter has; None when there is none.
        casts_branch: whether the branch is cast to the base's dtype before the sum.
        everywhere: whether every use of the weight is adapted, past the module too.
    """

    site: Site
    verdict: str
    rule: str
    reason: str
    r: int = 0
    lora_alpha: float = 0
    scaling: float = 0.0
    experts: int = 1
    prefix: str = ""
    scopes: tuple[str, ...] = ()
    adapter: AdapterShape | None = None
    casts_branch: bool = False
    everywhere: bool = False

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    @property
    def kind(self) -> str:
        """The kind of layer."""
        return self.site.kind

    @property
    def adapted(self) -> bool:
        """Whether the site gets an adapter."""
        return self.verdict == "adapted"

    @property
    def scope(self) -> str:
        """The first name of the module during whose calls an adapter of the weight is in effect."""
        return self.scopes[0] if self.scopes else ""

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The names by which the weight is read where its adapter is in effect."""
        below = self.site.weight_name.removeprefix(f"{self.scope}.")
        return tuple(f"{s}.{below}" for s in self.scopes)

    @property
    def rank(self) -> int:
        """The rank, as the papers call it."""
        return self.r

    @property
    def alpha(self) -> float:
        """The numerator of the scaling, as the papers call it."""
        return self.lora_alpha

    @property
    def bypassed(self) -> int:
        """How many calls read the weight where the adapter is not in effect, or where PEFT's is not."""
        if self.adapted:
            return sum(not self.reaches(c) for c in self.site.calls)
        return sum(not c.through_module for c in self.site.calls)

    def reaches(self, call: Call) -> bool:
        """Says whether the adapter is in effect at a call of the site's weight."""
        if self.everywhere:
            return True
        if self.form == "delta":
            return any(f.path in self.scopes for f in call.node.meta.get("module_stack", ()))
        # PEFT puts the adapter where the first name of a module stands: an alias keeps the base.
        return call.through_module and call.node.op == "call_module"

    @property
    def beyond_peft(self) -> str:
        """What of this site PEFT cannot represent; "" when it can."""
        if not self.adapted:
            return ""
        if self.site.rows:
            return f"{self.name} is a part of {self.site.owner}"
        if self.site.of:
            return f"{self.name} is one call of {self.site.owner}"
        more = [c for c in self.site.calls if not self._as_peft().reaches(c)]
        if self.everywhere and more:
            return f"{self.name} is adapted where PEFT does not reach it ({more[0].node.name})"
        return ""

    def _as_peft(self) -> PlannedSite:
        return replace(self, everywhere=False)

    @property
    def variant(self) -> str:
        """The variant of LoRA: "" for plain, "dora", "mica", "kasa", "bdlora..."."""
        return self.adapter.variant if self.adapter is not None else ""

    @property
    def form(self) -> str:
        """How the adapter is added: "branch", "rows" or "delta"."""
        return self.adapter.form if self.adapter is not None else ""

    @property
    def adapter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of lora_A (r, in) and lora_B (out, r)."""
        if self.adapter is None:
            return (), ()
        (_, a), (_, b), *_ = self.adapter.parameters
        return a, b

    def to_dict(self) -> dict[str, Any]:
        """Returns the site as plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "in_features": self.site.in_features,
            "out_features": self.site.out_features,
            "calls": len(self.site.calls),
            "bypassed": self.bypassed,
            "verdict": self.verdict,
            "rule": self.rule,
            "reason": self.reason,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "scaling": self.scaling,
            "variant": self.variant,
        }


@dataclass(frozen=True)
class Plan(Printed):
    """What a LoraConfig does to a traced model; a value, nothing is changed yet.

    Iterates over its sites; prints as a table.

    Attributes:
        sites: every site with its verdict.
        config: the resolved copy of the configuration.
        trainable: parameters that train after the rewrite.
        total: all parameters after the rewrite, tied ones once.
        warnings: what a reader should know (targets that matched nothing, ...).
        model_class: the class of the traced model.
        targets: target_modules as the user wrote them.
        adapter: the adapter's name.
        saved: modules trained as a whole (modules_to_save).
        tokens: rows of embeddings that train (trainable_token_indices).
        reach: what is adapted that PEFT cannot: names out of `fxlora.reach.REACH`.
    """

    sites: tuple[PlannedSite, ...]
    config: Any
    trainable: int
    total: int
    warnings: tuple[str, ...] = ()
    model_class: str = ""
    targets: tuple[str, ...] = field(default=())
    adapter: str = ADAPTER
    saved: tuple[SavedModule, ...] = ()
    tokens: tuple[TokenRows, ...] = ()
    reach: tuple[str, ...] = ()

    @property
    def beyond_peft(self) -> tuple[str, ...]:
        """What of this plan PEFT cannot represent, a clause for every such site."""
        return tuple(s.beyond_peft for s in self.sites if s.beyond_peft)

    def __iter__(self) -> Iterator[PlannedSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def adapted(self) -> tuple[PlannedSite, ...]:
        """The sites that get an adapter."""
        return tuple(s for s in self.sites if s.adapted)

    @property
    def percent(self) -> float:
        """The trainable share in percent, as PEFT prints it."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __getitem__(self, name: str) -> PlannedSite:
        """Returns a site by name."""
        for s in self.sites:
            if s.name == name:
                return s
        names = [s.name for s in self.sites]
        raise KeyError(f"{name!r} is none of the {len(names)} sites.{did_you_mean(name, names)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, for JSON."""
        return {
            "model": self.model_class,
            "trainable": self.trainable,
            "total": self.total,
            "percent": self.percent,
            "adapted": len(self.adapted),
            "warnings": list(self.warnings),
            "modules_to_save": [s.name for s in self.saved],
            "trainable_tokens": {t.name: list(t.indices) for t in self.tokens},
            "sites": [s.to_dict() for s in self.sites],
        }

    def _parts(self) -> Iterable[str]:
        from fxlora.report import plan_parts

        return plan_parts(self)


@uncollected()
def plan(
    traced: GraphModule | nn.Module,
    config: Any,
    adapter: str = ADAPTER,
    *,
    reach: str | Iterable[str] = (),
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Plan:
    """Decides, for every site of a traced model, what a LoraConfig does to it.

    Args:
        traced: what `fxlora.trace` returned, or a rewritten graph that shall get another adapter;
            read, never changed. Of a model itself only the calls in its current mode are traced: for
            a plan to look at. To rewrite, trace first and plan from the graph.
        config: a `peft.LoraConfig`; read, never changed.
        adapter: the name of the adapter.
        reach: what to adapt that PEFT cannot: "uses" (every use of a matched weight), "slices"
            (parts of fused layers may be named: q, k, v, gate, up) and "calls" (an adapter of its
            own for every call of a shared layer); one or several. None of them is PEFT's reach.
        args, kwargs: example inputs, for a model; as for `fxlora.trace`.

    Returns:
        The plan: a verdict and a reason for every site.

    Raises:
        NoMatchError: when nothing would be adapted, with the candidates.
        UnsupportedError: names the field or the layer that is not supported.
        ConfigError: names the bad value.
        AdapterError: when the graph has an adapter of that name.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> p = fxlora.plan(fxlora.trace(model), LoraConfig(r=4, target_modules=["0"]))
    >>> [(s.name, s.verdict) for s in p]
    [('0', 'adapted'), ('1', 'skipped')]
    """
    if not isinstance(traced, GraphModule) and isinstance(traced, nn.Module):
        traced = outline(traced, args, kwargs)
    facts = info(traced)
    if adapter in facts.adapters:
        raise AdapterError(
            f"this graph has an adapter {adapter!r} already; give the new one another name with "
            f"fxlora.adapters.add(graph, config, name), or plan from the traced graph"
        )
    _check_name(adapter)
    base = facts.base if facts.base is not None else traced
    settings = resolved_copy(config)
    extras.shield(settings)
    asked = _asked(settings)
    linear = resolve_targets(settings, facts.model)
    further = checked(reach)
    found = _all_sites(base, settings)
    if "slices" in further:
        found = with_slices(found, base)

    def parts() -> list[Site]:
        return [] if "slices" in further else [s for s in with_slices(found, base) if s.rows]

    planned = _each(found, settings, linear, base)
    layers.check_parameters(
        [p.name for p in planned if p.adapted and p.kind == "Parameter"],
        settings,
        corrected_fan_in_fan_out(planned, settings),
    )
    planned = _whole_before_parts(_with_projections(planned))
    planned = _nest_parameters(planned)
    planned = _reaching(planned, further, settings)
    _check_other_layers(settings, facts.model, facts.module_types)
    names = [p.name for p in planned if p.adapted and p.kind != "Parameter"]
    saved = extras.saved_modules(settings, facts.model, names)
    tokens = extras.token_rows(settings, facts.model, names, saved)
    if not any(p.adapted for p in planned):
        raise NoMatchError(advice.no_match(settings, asked, planned, parts))
    trainable, total = _count(base, planned, settings, saved, tokens)
    warned = advice.warnings_of(asked, settings, planned, saved, model_type(facts.model), parts)
    return Plan(
        sites=tuple(planned),
        config=settings,
        trainable=trainable,
        total=total,
        warnings=tuple(warned),
        model_class=facts.model_class,
        targets=asked,
        adapter=adapter,
        saved=saved,
        tokens=tokens,
        reach=further,
    )


def corrected_fan_in_fan_out(planned: Iterable[PlannedSite], config: Any) -> bool:
    """Returns the field as PEFT leaves it: each Linear and Conv1D it wraps corrects it.

    Source: `dispatch_default`, peft/tuners/lora/layer.py. So the last layer's class is what counts,
    for the parameters, which come after the layers, and for what is saved.
    """
    lines = [p.kind for p in planned if p.adapted and p.kind in ("Linear", "Conv1D")]
    return lines[-1] == "Conv1D" if lines else bool(config.fan_in_fan_out)


def _check_name(adapter: Any) -> None:
    taken = {*dir(nn.ModuleDict), *dir(nn.ParameterDict)}
    odd = not isinstance(adapter, str) or not adapter or len(adapter) > 100
    if odd or set(adapter) & set("./\\") or keyword.iskeyword(adapter) or adapter in taken:
        raise AdapterError(
            f"adapter={adapter!r}: a name such as 'default', without dots and slashes (it names a "
            "folder and an attribute), no Python keyword and no method of a module"
        )


def _asked(config: Any) -> tuple[str, ...]:
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return ()
    return tuple(sorted(targets))


# ---- verdicts ----------------------------------------------------------------------------------


def _all_sites(traced: GraphModule, config: Any) -> list[Site]:
    """Returns the sites, and every parameter target_parameters names, called or not."""
    found = list(sites(traced))
    if not config.target_parameters:
        return found
    known = {s.weight_name for s in found if s.kind == "Parameter"}
    owners = {s.name: s for s in found if s.kind != "Parameter"}
    own = dict(_own_parameters(traced))
    places = Places(dict(tree(info(traced).model)))
    held = dict(tree(traced))
    called = {
        id(held.get(str(n.target))) for n in traced.graph.nodes if n.op == "call_module"
    }  # of an outline some that it calls are not there
    for name, p in own.items():
        if matching.parameter_match(config.target_parameters, name) is None:
            continue
        if name.rpartition(".")[0] not in owners:
            _check_whole(name, held, called)
        if name in known:
            continue
        if p.dim() not in (2, 3):
            raise ConfigError(
                f"target_parameters selects {name!r}, which has {p.dim()} dimensions; "
                "an adapter needs 2 or 3"
            )
        above = name.rpartition(".")[0]
        owner = owners.get(above)
        _check_owner(name, owner, owners, config)
        shape = tuple(p.shape)
        calls = owner.calls if owner is not None else ()
        made = Site(name, "Parameter", "Parameter", shape[1], shape[0], shape, False, calls)
        found.append(replace(made, reached=places.reached(above)))
    order = {name: i for i, name in enumerate(own)}
    modules = [s for s in found if s.kind != "Parameter"]
    bare = [_as_peft_sees(s, traced) for s in found if s.kind == "Parameter"]
    return modules + sorted(bare, key=lambda s: order[s.name])


def _own_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters PEFT walks: of every module by its first name, tied ones each time."""
    for name, module in tree(root, remove_duplicate=True):
        for last, p in module.named_parameters(recurse=False):
            yield (f"{name}.{last}" if name else last), p


def _check_owner(name: str, owner: Site | None, owners: dict[str, Site], config: Any) -> None:
    """Refuses a parameter of a layer that is adapted itself, or that is no plain linear layer."""
    if owner is None:
        return
    if matching.match(config, owner.name).taken:
        above, _, last = owner.name.rpartition(".")
        attention = above in owners and owners[above].kind == "MultiheadAttention"
        if attention and last == "out_proj" and matching.match(config, above).taken:
            raise _both_targeted(above, owner.name)
        raise ConfigError(
            f"target_parameters selects {name!r} and target_modules its layer {owner.name!r}; "
            "name it once"
        )
    if owner.type_name != "Linear":
        raise UnsupportedError(
            f"target_parameters selects {name!r}, the weight of a {owner.type_name}; name the layer "
            f"in target_modules instead: {owner.name!r}"
        )


def _check_whole(name: str, held: dict[str, nn.Module], called: set[int]) -> None:
    """Refuses a parameter of a module that is one call of the graph: nothing reads it there.

    Args:
        name: of the parameter.
        held: the modules of the graph by path.
        called: the ids of those it calls.
    """
    above = name
    while above := above.rpartition(".")[0]:
        module = held[above]
        if id(module) in called:
            raise UnsupportedError(
                f"target_parameters selects {name!r}, a parameter of {above!r}, a "
                f"{type(module).__name__} that torch computes as a whole: an adapter can be added to "
                "a parameter only where a forward in Python reads it. Leave it out"
            )


def _as_peft_sees(site: Site, traced: GraphModule) -> Site:
    """Returns a parameter site with its features counted as peft's ParamWrapper counts them.

    A 3-D parameter is (experts, out, in), or (experts, in, out) where the module that owns it
    says `is_transposed`.
    """
    if len(site.shape) == 2:
        return replace(site, in_features=site.shape[1], out_features=site.shape[0])
    _, a, b = site.shape
    owner = info(traced).model.get_submodule(site.name.rpartition(".")[0])
    if getattr(owner, "is_transposed", False):
        return replace(site, in_features=a, out_features=b, transposed=True)
    return replace(site, in_features=b, out_features=a)


def _planned(site: Site, config: Any, linear: AllLinear | None, base: GraphModule) -> PlannedSite:
    if site.kind == "Parameter":
        return _planned_parameter(site, config)
    if not site.name:
        return PlannedSite(
            site, "skipped", "root", "it is the model itself, which PEFT never adapts"
        )
    found = _match(config, site)
    if not found.taken:
        reason = found.reason
        if linear is not None and found.rule == "none":
            reason = "all-linear takes nn.Linear and Conv1D only"
            if site.name == linear.head:
                reason = "all-linear leaves the output layer out"
        verdict = "excluded" if found.rule in ("excluded", "modules_to_save") else "skipped"
        return PlannedSite(site, verdict, found.rule, reason)
    reason = "all-linear takes it" if linear is not None else found.reason
    module = info(base).model.get_submodule(site.owner)
    layers.check_quantized(site, module, config)
    made = _adapted(site, found.rule, reason, config, module)
    return replace(made, casts_branch=layers.casts_branch(module, info(base).model))


def _each(
    found: list[Site], config: Any, linear: AllLinear | None, base: GraphModule
) -> list[PlannedSite]:
    """Returns the verdict on every site; of grouped convolutions all that refuse are named at once."""
    planned: list[PlannedSite] = []
    unfit: dict[str, tuple[int, int]] = {}
    for site in found:
        try:
            planned.append(_planned(site, config, linear, base))
        except layers.GroupsError as e:
            unfit |= e.layers
    if unfit:
        raise layers.GroupsError(unfit)
    return planned


def _match(config: Any, site: Site) -> matching.Match:
    """Matches a site's name; a part of a fused layer also goes by the name beside its layer."""
    found = matching.match(config, site.name)
    if not site.rows or found.taken or found.rule == "excluded":
        return found
    return next((m for a in site.aliases if (m := matching.match(config, a)).rule != "none"), found)


def _planned_parameter(site: Site, config: Any) -> PlannedSite:
    entry = matching.parameter_match(config.target_parameters or (), site.name)
    if entry is None:
        return PlannedSite(
            site, "skipped", "none", "a bare parameter, and target_parameters does not name it"
        )
    if not site.name.rpartition(".")[0]:
        raise ConfigError(
            f"target_parameters selects {site.name!r}, a parameter of the model itself; PEFT "
            "cannot wrap that. Put it in a submodule"
        )
    return _adapted(site, "parameter", f"target_parameters has {entry!r}", config, None)


def _adapted(site: Site, rule: str, reason: str, config: Any, module: Any) -> PlannedSite:
    r, r_key = _pattern(config.rank_pattern, site, config.r)
    alpha, alpha_key = _pattern(config.alpha_pattern, site, config.lora_alpha)
    if r_key is not None:
        reason += f"; rank_pattern[{r_key!r}] gives r={r}"
    if alpha_key is not None:
        reason += f"; alpha_pattern[{alpha_key!r}] gives lora_alpha={alpha}"
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    bare = site.kind == "Parameter"
    experts = site.shape[0] if bare and len(site.shape) == 3 else 1
    prefix = site.name.rpartition(".")[0] if bare else site.name
    scopes = site.reached or (prefix if bare else site.owner,)
    adapter = layers.adapter_shape(site, module, config, r, experts)
    return PlannedSite(
        site, "adapted", rule, reason, r, alpha, scaling, experts, prefix, scopes, adapter
    )


def _pattern(pattern: dict[str, Any], site: Site, default: Any) -> tuple[Any, str | None]:
    """Looks a site up in a pattern by its name, and a part by the name beside its layer."""
    for name in (site.name, *(site.aliases if site.rows else ())):
        value, key = matching.pattern_value(pattern, name, default)
        if key is not None:
            return value, key
    return default, None


def _both_targeted(attention: str, projection: str) -> UnsupportedError:
    return UnsupportedError(
        f"{attention!r} and its {projection!r} are both targeted by target_modules; the adapter "
        f"covers both projections. Leave one out with exclude_modules=[{projection!r}]"
    )


def _with_projections(planned: list[PlannedSite]) -> list[PlannedSite]:
    """Adapts the out_proj of every adapted nn.MultiheadAttention with it, as PEFT does.

    Its own forward is never called: attention reads its weight, so the adapter is added to that.
    """
    attention = {
        p.name: p for p in planned if p.adapted and p.kind == "MultiheadAttention" and not p.site.of
    }
    out = []
    for p in planned:
        outer = attention.get(p.name.rpartition(".")[0])
        if outer is None or p.name != f"{outer.name}.out_proj":
            out.append(p)
            continue
        if p.adapted:
            raise _both_targeted(outer.name, p.name)
        assert outer.adapter is not None
        (r, _), _ = outer.adapter_shapes
        shape = AdapterShape(
            "delta", "",
            (("lora_A.{}.weight", (r, p.site.in_features)),
             ("lora_B.{}.weight", (p.site.out_features, r)),
             *((n, (p.site.out_features,)) for n, _ in outer.adapter.parameters[2:])),
            outer.adapter.frozen,
        )  # fmt: skip
        reason = f"the output projection of {outer.name!r}, which is targeted"
        out.append(
            replace(
                outer, site=p.site, rule="attention", reason=reason, prefix=p.name,
                adapter=shape,
            )
        )  # fmt: skip
    return out


def _whole_before_parts(planned: list[PlannedSite]) -> list[PlannedSite]:
    """Leaves the parts of a layer alone that is adapted as a whole."""
    whole = {p.name for p in planned if p.adapted and not p.site.of}
    reason = "its layer is adapted as a whole"
    return [
        PlannedSite(p.site, "skipped", "whole", reason) if p.adapted and p.site.of in whole else p
        for p in planned
    ]


def _reaching(planned: list[PlannedSite], reach: tuple[str, ...], config: Any) -> list[PlannedSite]:
    """Extends what is adapted to every use of its weight, and parts a shared layer's calls."""
    out: list[PlannedSite] = []
    for p in planned:
        if p.adapted and "uses" in reach:
            past = [c for c in p.site.calls if not p.reaches(c)]
            if past:
                layers.check_past(p.site, [c.node for c in past], p.variant, bool(config.lora_bias))
            p = replace(p, everywhere=True)
        calls = [c for c in p.site.calls if p.adapted and p.reaches(c)]
        if "calls" not in reach or len(calls) < 2 or p.form == "delta":
            out.append(p)
            continue
        layers.check_part(p.site, f"one of {len(calls)} calls of it", p.variant, init_name(config))
        for i, call in enumerate(calls):
            site = one_call(p.site, i, call)
            reason = f"{p.reason}; call {i + 1} of {len(calls)} has its own adapter"
            out.append(replace(p, site=site, prefix=site.name, reason=reason))
    return out


def _check_other_layers(config: Any, model: nn.Module, types: dict[str, type]) -> None:
    """Refuses a target that is no layer at all, as PEFT does, before anything is changed.

    PEFT walks the modules by their first names: a second name that matches is none of its targets.
    """
    for name, _ in tree(model, remove_duplicate=True):
        module_type = types.get(name)
        if not name or module_type is None or kind_of(module_type) is not None:
            continue
        found = matching.match(config, name)
        if found.taken:
            raise UnsupportedError(
                f"{name!r} is targeted ({found.reason}) and is a {module_type.__name__}, which "
                "LoRA cannot adapt (PEFT raises ValueError). Name the linear layers inside it"
            )


def _nest_parameters(planned: list[PlannedSite]) -> list[PlannedSite]:
    """Gives each of several parameters of one module the place PEFT's nesting gives it.

    PEFT wraps once per parameter: the first registered one is innermost, below `base_layer`.
    """
    per_owner: dict[str, list[int]] = {}
    for i, p in enumerate(planned):
        if p.adapted and p.kind == "Parameter":
            per_owner.setdefault(p.prefix, []).append(i)
    out = list(planned)
    for owner, indices in per_owner.items():
        for depth, i in enumerate(reversed(indices)):
            out[i] = replace(planned[i], prefix=owner + ".base_layer" * depth)
    return out


def _count(
    traced: GraphModule,
    planned: list[PlannedSite],
    config: Any,
    saved: tuple[SavedModule, ...],
    tokens: tuple[TokenRows, ...],
) -> tuple[int, int]:
    shapes = [p.adapter for p in planned if p.adapter is not None]
    copied = sum(s.numel for s in saved)
    added = sum(s.numel for s in shapes) + copied + sum(t.numel for t in tokens)
    trains = sum(s.trainable for s in shapes) + (0 if config.inference_mode else copied)
    trains += sum(t.numel for t in tokens if t.trains)
    base = list(traced.named_parameters())
    whole = tuple(f"{s.name}." for s in saved)
    adapted = adapted_modules(planned)
    biases = [p.numel() for n, p in base if bias_trains(n, config.bias, adapted, whole)]
    added += sum(_parted(traced, planned, config))
    return trains + sum(biases), added + sum(p.numel() for _, p in base)


def _parted(traced: GraphModule, planned: list[PlannedSite], config: Any) -> Iterator[int]:
    """Yields the sizes of tied weights of which an initialisation gives an adapted layer one apart."""
    how = str(init_name(config)).partition("_niter")[0]
    if how not in ("pissa", "olora") and config.kasa_config is None:
        return
    changed: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for p in planned:
        if p.form == "branch":
            owner, _, last = p.site.weight_name.rpartition(".")
            weight: Any = getattr(traced.get_submodule(owner), last)
            changed[id(weight)] = changed.get(id(weight), 0) + 1
            sizes[id(weight)] = weight.numel()
    held = Counter(id(p) for m in traced.modules() for p in m._parameters.values())
    for key, times in changed.items():
        if held[key]:  # none holds a weight that is computed anew
            yield (times - (held[key] == times)) * sizes[key]


def adapted_modules(planned: Iterable[PlannedSite]) -> set[str]:
    """Returns the names of the modules PEFT wraps, for which `bias="lora_only"` holds."""
    return {p.scope if p.rule == "parameter" else p.site.owner for p in planned if p.adapted}


def describe(planned: PlannedSite) -> str:
    """Returns everything the plan knows of one site, as text."""
    rows = [(k, str(v)) for k, v in planned.to_dict().items()]
    return table(("field", "value"), rows)
