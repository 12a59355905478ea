"""Sites x LoraConfig -> a plan: a verdict with a reason for every site, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora import matching
from fxlora.config import resolved_copy
from fxlora.errors import ConfigError, NoMatchError, UnsupportedError, did_you_mean
from fxlora.facts import info
from fxlora.sites import Site, kind_of, sites
from fxlora.text import count, table

ADAPTER = "default"
REWRITTEN = ("Linear", "Conv1D", "Parameter")
SEQ_CLS_HEADS = ("score", "classifier")  # peft.utils.constants.SEQ_CLS_HEAD_NAMES


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
    def rank(self) -> int:
        """The rank, as the papers call it."""
        return self.r

    @property
    def alpha(self) -> float:
        """The numerator of the scaling, as the papers call it."""
        return self.lora_alpha

    @property
    def bypassed(self) -> int:
        """How many calls read the weight where the adapter is not in effect."""
        return sum(not c.through_module for c in self.site.calls)

    @property
    def adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A (r, in) and lora_B (out, r)."""
        inner = self.r * self.experts
        return (inner, self.site.in_features), (self.site.out_features, inner)

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
        }


@dataclass(frozen=True)
class Plan:
    """What a LoraConfig does to a traced model; a value, nothing is changed yet.

    Iterates over its sites; prints as a table.

    Attributes:
        sites: every site with its verdict.
        config: the resolved copy of the configuration.
        trainable: parameters that train after the rewrite.
        total: all parameters after the rewrite, tied ones once.
        warnings: what a reader should know (targets that matched nothing, ...).
        model_class: the class of the traced model.
    """

    sites: tuple[PlannedSite, ...]
    config: Any
    trainable: int
    total: int
    warnings: tuple[str, ...] = ()
    model_class: str = ""
    targets: tuple[str, ...] = field(default=())

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
            "sites": [s.to_dict() for s in self.sites],
        }

    def __str__(self) -> str:
        from fxlora.report import plan_text

        return plan_text(self)


def plan(traced: GraphModule, config: Any) -> Plan:
    """Decides, for every site of a traced model, what a LoraConfig does to it.

    Args:
        traced: what `fxlora.trace` returned; read, never changed.
        config: a `peft.LoraConfig`; read, never changed.

    Returns:
        The plan: a verdict and a reason for every site.

    Raises:
        NoMatchError: when nothing would be adapted, with the candidates.
        UnsupportedError: names the field or the layer that is not supported.
        ConfigError: names the bad value.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> p = fxlora.plan(fxlora.trace(model), LoraConfig(r=4, target_modules=["0"]))
    >>> [(s.name, s.verdict) for s in p]
    [('0', 'adapted'), ('1', 'skipped')]
    """
    facts = info(traced)
    if facts.plan is not None:
        raise ConfigError(
            "this graph is already rewritten; a second adapter on it is not supported yet. Plan "
            "from the traced graph: fxlora.plan(fxlora.trace(model, args, kwargs), config)"
        )
    settings = resolved_copy(config)
    asked = _asked(settings)
    linear = _resolve_targets(settings, facts.model)
    planned = [_planned(s, settings, linear) for s in _all_sites(traced, settings)]
    _check_other_layers(settings, facts.module_types)
    planned = _nest_parameters(planned)
    if not any(p.adapted for p in planned):
        raise NoMatchError(_no_match(settings, asked, planned))
    trainable, total = _count(traced, planned, settings)
    return Plan(
        sites=tuple(planned),
        config=settings,
        trainable=trainable,
        total=total,
        warnings=tuple(_warnings(asked, settings, planned, _model_type(facts.model))),
        model_class=facts.model_class,
        targets=asked,
    )


# ---- targets -----------------------------------------------------------------------------------


def _asked(config: Any) -> tuple[str, ...]:
    targets = config.target_modules
    if targets is None or isinstance(targets, str):
        return ()
    return tuple(sorted(targets))


@dataclass(frozen=True)
class _AllLinear:
    """What "all-linear" came to: the layer it leaves out, as the model's output layer."""

    head: str | None


def _resolve_targets(config: Any, model: nn.Module) -> _AllLinear | None:
    """Fills in `target_modules` where it is None or "all-linear"; says so when it was the latter."""
    _moe_names(config, model)
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = _by_model_type(model)
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != "all-linear":
        return None
    # peft.tuners.tuners_utils._maybe_include_all_linear_layers
    names = {n for n, m in model.named_modules() if kind_of(type(m)) in ("Linear", "Conv1D")}
    head = _output_layer(config, model)
    config.target_modules = names - {head}
    return _AllLinear(head)


def _moe_names(config: Any, model: nn.Module) -> None:
    """Renames v4 MoE targets as PEFT does on transformers 5, with PEFT's own table."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils import transformers_weight_conversion as conversion

    convert = getattr(conversion, "convert_peft_config_for_transformers", None)
    if convert is None:
        return
    try:
        convert(config, model=model, conversions=None)
    except ValueError as e:
        raise ConfigError(f"{e} (target_modules={config.target_modules!r})") from None


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _by_model_type(model: nn.Module) -> set[str] | str:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    model_type = _model_type(model)
    found = KNOWN.get(model_type)
    if found is None:
        what = f"model type {model_type!r}" if model_type else f"a {type(model).__name__}"
        raise ConfigError(
            f"target_modules is not set and PEFT has no default for {what}. "
            'Name the modules, or say target_modules="all-linear"'
        )
    return found if isinstance(found, str) else set(found)


def _output_layer(config: Any, model: nn.Module) -> str | None:
    from fxlora.trace.examples import is_transformers

    if not is_transformers(model):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None and str(getattr(config.task_type, "value", config.task_type)) == "SEQ_CLS":
        head = next((h for n in SEQ_CLS_HEADS if (h := getattr(model, n, None))), None)
    if head is None:
        return None
    return next((n for n, m in model.named_modules() if m is head), None)


# ---- verdicts ----------------------------------------------------------------------------------


def _all_sites(traced: GraphModule, config: Any) -> list[Site]:
    """Returns the sites, and every parameter target_parameters names, called or not."""
    found = list(sites(traced))
    if not config.target_parameters:
        return found
    known = {s.weight_name for s in found if s.kind == "Parameter"}
    owners = {s.name: s for s in found if s.kind != "Parameter"}
    for name, p in traced.named_parameters():
        if name in known or matching.parameter_match(config.target_parameters, name) is None:
            continue
        if p.dim() not in (2, 3):
            raise ConfigError(
                f"target_parameters selects {name!r}, which has {p.dim()} dimensions; "
                "an adapter needs 2 or 3"
            )
        owner = owners.get(name.rpartition(".")[0])
        _check_owner(name, owner, config)
        shape = tuple(p.shape)
        calls = owner.calls if owner is not None else ()
        found.append(Site(name, "Parameter", "Parameter", shape[1], shape[0], shape, False, calls))
    order = {name: i for i, (name, _) in enumerate(traced.named_parameters())}
    modules = [s for s in found if s.kind != "Parameter"]
    bare = [_as_peft_sees(s, traced) for s in found if s.kind == "Parameter"]
    return modules + sorted(bare, key=lambda s: order[s.name])


def _check_owner(name: str, owner: Site | None, config: Any) -> None:
    """Refuses a parameter of a layer that is adapted itself, or that is no plain linear layer."""
    if owner is None:
        return
    if matching.match(config, owner.name).taken:
        raise ConfigError(
            f"target_parameters selects {name!r} and target_modules its layer {owner.name!r}; "
            "name it once"
        )
    if owner.type_name != "Linear":
        raise UnsupportedError(
            f"target_parameters selects {name!r}, the weight of a {owner.type_name}; name the layer "
            f"in target_modules instead: {owner.name!r}"
        )


def _as_peft_sees(site: Site, traced: GraphModule) -> Site:
    """Returns a parameter site with its features counted as peft's ParamWrapper counts them.

    A 3-D parameter is (experts, out, in), or (experts, in, out) where the module that owns it
    says `is_transposed`.
    """
    from dataclasses import replace

    if len(site.shape) == 2:
        return replace(site, in_features=site.shape[1], out_features=site.shape[0])
    _, a, b = site.shape
    owner = info(traced).model.get_submodule(site.name.rpartition(".")[0])
    if getattr(owner, "is_transposed", False):
        return replace(site, in_features=a, out_features=b)
    return replace(site, in_features=b, out_features=a)


def _planned(site: Site, config: Any, linear: _AllLinear | None) -> PlannedSite:
    if site.kind == "Parameter":
        return _planned_parameter(site, config)
    if not site.name:
        return PlannedSite(
            site, "skipped", "root", "it is the model itself, which PEFT never adapts"
        )
    found = matching.match(config, site.name)
    if not found.taken:
        reason = found.reason
        if linear is not None and found.rule == "none":
            reason = "all-linear takes nn.Linear and Conv1D only"
            if site.name == linear.head:
                reason = "all-linear leaves the output layer out"
        verdict = "excluded" if found.rule in ("excluded", "modules_to_save") else "skipped"
        return PlannedSite(site, verdict, found.rule, reason)
    if site.kind not in REWRITTEN:
        raise UnsupportedError(
            f"{site.name!r} is targeted ({found.reason}) and is a {site.type_name}; fxlora adapts "
            f"{', '.join(REWRITTEN)} so far. Leave it out with exclude_modules=[{site.name!r}]"
        )
    reason = "all-linear takes it" if linear is not None else found.reason
    return _adapted(site, found.rule, reason, config, 1, site.name)


def _planned_parameter(site: Site, config: Any) -> PlannedSite:
    entry = matching.parameter_match(config.target_parameters or (), site.name)
    if entry is None:
        return PlannedSite(
            site, "skipped", "none", "a bare parameter, and target_parameters does not name it"
        )
    owner = site.name.rpartition(".")[0]
    if not owner:
        raise ConfigError(
            f"target_parameters selects {site.name!r}, a parameter of the model itself; PEFT "
            "cannot wrap that. Put it in a submodule"
        )
    for name in ("lora_dropout", "fan_in_fan_out", "lora_bias"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} does not go with target_parameters "
                f"(here {site.name!r}): the adapter is added to the weight, there is no input to "
                "act on"
            )
    reason = f"target_parameters has {entry!r}"
    experts = site.shape[0] if len(site.shape) == 3 else 1
    return _adapted(site, "parameter", reason, config, experts, owner)


def _adapted(
    site: Site, rule: str, reason: str, config: Any, experts: int, prefix: str
) -> PlannedSite:
    r, r_key = matching.pattern_value(config.rank_pattern, site.name, config.r)
    alpha, alpha_key = matching.pattern_value(config.alpha_pattern, site.name, config.lora_alpha)
    if r_key is not None:
        reason += f"; rank_pattern[{r_key!r}] gives r={r}"
    if alpha_key is not None:
        reason += f"; alpha_pattern[{alpha_key!r}] gives lora_alpha={alpha}"
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return PlannedSite(site, "adapted", rule, reason, r, alpha, scaling, experts, prefix)


def _check_other_layers(config: Any, types: dict[str, type]) -> None:
    """Refuses a target that is no layer at all, as PEFT does, before anything is changed."""
    seen: set[str] = set()
    for name, module_type in types.items():
        if not name or name in seen or kind_of(module_type) is not None:
            continue
        seen.add(name)
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
    from dataclasses import replace

    per_owner: dict[str, list[int]] = {}
    for i, p in enumerate(planned):
        if p.adapted and p.kind == "Parameter":
            per_owner.setdefault(p.prefix, []).append(i)
    out = list(planned)
    for owner, indices in per_owner.items():
        for depth, i in enumerate(reversed(indices)):
            out[i] = replace(planned[i], prefix=owner + ".base_layer" * depth)
    return out


# ---- totals, warnings, errors ------------------------------------------------------------------


def _count(traced: GraphModule, planned: list[PlannedSite], config: Any) -> tuple[int, int]:
    from fxlora.freezing import bias_trains

    adapters = 0
    for p in planned:
        if p.adapted:
            (r, n), (m, _) = p.adapter_shapes
            adapters += r * n + m * r + (m if config.lora_bias else 0)
    adapted = {p.name for p in planned if p.adapted}
    base = list(traced.named_parameters())
    biases = sum(p.numel() for n, p in base if bias_trains(n, config.bias, adapted))
    return adapters + biases, adapters + sum(p.numel() for _, p in base)


_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_ON_MAMBA = ("out_proj", "conv1d")


def _warnings(
    asked: tuple[str, ...], config: Any, planned: list[PlannedSite], model_type: str | None
) -> Iterator[str]:
    names = [p.name for p in planned if p.kind != "Parameter"]
    last = sorted({n.rpartition(".")[2] for n in names})
    for target in asked:
        hit = any(n == target or n.endswith(f".{target}") for n in names)
        renamed = config.target_modules is not None and target not in config.target_modules
        if not hit and not renamed:
            yield f"target_modules entry {target!r} matches nothing.{did_you_mean(target, last)}"
    for which in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, which):
            hit = any(matching.pattern_value({key: 1}, p.name, 0)[0] for p in planned if p.adapted)
            if not hit:
                yield f"{which} key {key!r} matches no adapted site"
    yield from _odd_layers(planned)
    # peft.tuners.tuners_utils._check_lora_target_modules_mamba
    refused = [p.name for p in planned if p.adapted and p.name.rpartition(".")[2] in _NOT_ON_MAMBA]
    if model_type in _MAMBA and refused:
        yield (
            f"peft refuses {refused[0].rpartition('.')[2]!r} on {model_type} models (its kernels "
            f"read the weight directly): leave out {', '.join(map(repr, _NOT_ON_MAMBA))}"
        )
    uncalled = [p.name for p in planned if p.adapted and not p.site.calls]
    if uncalled:
        yield f"{count(len(uncalled), 'adapted site')} never called on the traced path: " + (
            ", ".join(uncalled[:3]) + (", ..." if len(uncalled) > 3 else "")
        )
    bypassed = [p.name for p in planned if p.adapted and p.bypassed]
    if bypassed:
        yield f"{count(len(bypassed), 'adapted site')} read without going through the module: " + (
            ", ".join(bypassed[:3]) + (", ..." if len(bypassed) > 3 else "")
        )


def _odd_layers(planned: list[PlannedSite]) -> Iterator[str]:
    """Finds adapted layers whose forward is not the linear map of their weight.

    A subclass of nn.Linear may return a tuple or another shape; PEFT's wrapper fails there when it
    runs, and so would ours.
    """
    for p in planned:
        if not p.adapted or p.kind == "Parameter":
            continue
        for call in p.site.calls:
            x = next(iter(call.node.all_input_nodes), None)
            given = None if x is None else x.meta.get("shape")
            if call.node.op != "call_module" or given is None:
                continue
            expected = (*given[:-1], p.site.out_features)
            got = call.node.meta.get("shape")
            if got != expected:
                what = "a tuple" if got is None else f"shape {got}"
                yield (
                    f"{p.name} is a {p.site.type_name} that returns {what} where a linear layer "
                    f"gives {expected}: the adapted model fails when it runs, in PEFT too. "
                    f"Leave it out with exclude_modules=[{p.name!r}]"
                )
                break


def _no_match(config: Any, asked: tuple[str, ...], planned: list[PlannedSite]) -> str:
    names = [p.name for p in planned]
    shown = config.target_modules if isinstance(config.target_modules, str) else asked
    last = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    listed = str(last[:12])[:-1] + (", ...]" if len(last) > 12 else "]")
    if not names:
        return "the model has no linear site at all, so there is nothing to adapt"
    if names == [""]:
        return (
            f"target_modules={shown!r} selected nothing: the model itself is the linear layer, and "
            "PEFT never adapts the root. Wrap it and name it: nn.Sequential(OrderedDict(linear=...))"
        )
    excluded = [p.name for p in planned if p.verdict == "excluded"]
    if excluded and len(excluded) == len(names):
        return f"all {len(names)} linear sites are excluded: {planned[0].reason}"
    near = ""
    if not isinstance(shown, str) and shown:
        near = did_you_mean(shown[0], [*last, *names])
    elif isinstance(shown, str) and shown in last:
        near = f" A string is one pattern for the whole name; write [{shown!r}] for a suffix."
    limited = [p.reason for p in planned if p.rule == "layer"]
    why = f" {limited[0]}." if limited else ""
    return (
        f"target_modules={shown!r} selected none of the {len(names)} linear sites {listed}."
        f"{why}{near}"
    )


def describe(planned: PlannedSite) -> str:
    """Returns everything the plan knows of one site, as text."""
    rows = [(k, str(v)) for k, v in planned.to_dict().items()]
    return table(("field", "value"), rows)
