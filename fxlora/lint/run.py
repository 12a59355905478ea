"""One run of the linter: plan, check, suppress, fold, sort."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule

from fxlora.errors import ConfigError, NoMatchError
from fxlora.facts import check_plain, info
from fxlora.lint.catalog import RULES, UNUSED, rule
from fxlora.lint.context import Context
from fxlora.lint.finding import Finding, Hit, Place, Report, Rule, Severity, open_name
from fxlora.lint.settings import Settings
from fxlora.lint.suppressions import Suppressions, place
from fxlora.plan import Plan
from fxlora.plan import plan as make_plan

_OF_THE_RUN = ("FXL001", "FXL100")


def lint(traced: GraphModule, config: Any = None, settings: Settings | None = None) -> Report:
    """Checks what a LoRA configuration does to a model for what goes wrong later.

    Args:
        traced: what `fxlora.trace` returned, or a rewritten graph, whose adapters are then checked
            with the values they have; read, never changed.
        config: a `peft.LoraConfig` or what `fxlora.plan` returned; may be left out for a rewritten
            graph.
        settings: which rules run and how; the defaults when None.

    Returns:
        The findings, worst first.

    Raises:
        ConfigError: when the configuration cannot be planned, or there is none, and when the
            settings leave no rule to run.
        UnsupportedError: for a graph that was optimized.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    >>> report = lint(fxlora.trace(model), LoraConfig(r=8, lora_alpha=0, target_modules=["0"]))
    >>> [f.rule for f in report]
    ['FXL401']
    """
    check_plain(traced, "lint")
    settings = settings or Settings()
    severities = settings.severities()
    if not severities:
        raise ConfigError(
            f"no rule is left to run: select={list(settings.select)}, ignore={list(settings.ignore)}. "
            "Select some, such as DEFAULT, and ignore fewer"
        )
    active = tuple(r for r in RULES if r.id in severities and _has_its_option(r, settings))
    try:
        context = _context(traced, config, settings)
    except NoMatchError as e:
        found = [(rule("FXL100"), Hit(str(e), "name a layer the model has"))]
        found = [(r, h) for r, h in found if r in active]
        return Report(tuple(_fold(found, severities, None)), active, info(traced).model_class)
    held = Suppressions(context, settings)
    kept, hidden = [], 0
    for r in active:
        for hit in r.check(context):
            if held.hides(r, hit):
                hidden += 1
            else:
                kept.append((r, hit))
    if UNUSED in active:
        ran = frozenset(r.id for r in active)
        kept += [(UNUSED, h) for h in held.unused(ran)]
    findings = sorted(_fold(kept, severities, context), key=lambda f: (-f.severity, f.rule))
    return Report(tuple(findings), active, context.plan.model_class, hidden)


def _has_its_option(r: Rule, settings: Settings) -> bool:
    return not r.needs or getattr(settings.options, r.needs) not in ("", "none")


def _context(traced: GraphModule, config: Any, settings: Settings) -> Context:
    facts = info(traced)
    if config is None and facts.plan is None:
        raise ConfigError("lint needs a LoraConfig or a plan beside a traced graph")
    base = facts.base if facts.base is not None else traced
    own = facts.adapters.values()
    if config is None:
        config = facts.plan
    given = any(config is p for p in own) and config.adapter in facts.active
    if isinstance(config, Plan):
        return Context(base, config, settings.options, traced if given else None)
    return Context(base, make_plan(base, config), settings.options, original=config)


def _fold(
    found: Iterable[tuple[Rule, Hit]], severities: dict[str, Severity], context: Context | None
) -> list[Finding]:
    """Makes one finding of equal hits at the same layer of repeated blocks."""
    groups: dict[tuple[str, ...], list[tuple[Rule, Hit]]] = {}
    for r, hit in found:
        key = (
            r.id, open_name(hit.site) or hit.subject, _open(hit.message),
            _open(hit.fix),
        )  # fmt: skip
        groups.setdefault(key, []).append((r, hit))
    return [_finding(rows, severities, context) for rows in groups.values()]


def _open(text: str) -> str:
    """Leaves open the layer indices of every name in a text."""
    return " ".join(_open_word(w) for w in text.split(" "))


def _open_word(word: str) -> str:
    bare = word.strip("'\"[](){},:;")
    number = bare.replace(".", "").isdigit()
    return word if number or "." not in bare else word.replace(bare, open_name(bare))


def _finding(
    rows: list[tuple[Rule, Hit]], severities: dict[str, Severity], context: Context | None
) -> Finding:
    r, hit = rows[0]
    alone = len(rows) == 1
    return Finding(
        r.id, r.name, severities[r.id],
        (hit.site if alone else open_name(hit.site)) or hit.subject,
        hit.message if alone else _open(hit.message),
        hit.fix if alone else _open(hit.fix),
        tuple(h.site for _, h in rows if h.site),
        _place(hit, context),
    )  # fmt: skip


def _place(hit: Hit, context: Context | None) -> Place | None:
    if context is None or not hit.site:
        return None
    site = next((s for s in context.sites if s.name == hit.site), None)
    return None if site is None else place(context, site)
