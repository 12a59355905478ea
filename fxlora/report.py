"""Plans and comparisons as plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fxlora.divergences import worst
from fxlora.text import count, human, open_indices, open_varied, table

if TYPE_CHECKING:
    from fxlora.compare import Comparison, Parameter
    from fxlora.effects import Effect
    from fxlora.plan import Plan, PlannedSite


def totals(trainable: int, total: int, percent: float) -> str:
    """Returns the line peft's print_trainable_parameters prints.

    >>> totals(220, 545, 100 * 220 / 545)
    'trainable params: 220 || all params: 545 || trainable%: 40.3670'
    """
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}"
    )


def plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Returns one row per kind of site: equal sites of repeated layers share a row."""
    groups: dict[tuple[object, ...], list[PlannedSite]] = {}
    for s in plan:
        # The layer's own name is in a reason ("names it: 'model.layers.0...'"); leave it open too.
        reason = (
            open_indices(s.reason.replace(s.name, open_indices(s.name))) if s.name else s.reason
        )
        calls = (len(s.site.calls), s.bypassed)
        key = (open_indices(s.name), s.kind, s.site.shape, s.verdict, reason, s.r, s.scaling, calls)
        groups.setdefault(key, []).append(s)
    rows: list[tuple[str, ...]] = []
    for group, members in groups.items():
        s = members[0]
        name = open_varied([m.name for m in members]) or "(the model)"
        note = str(group[4]) if len(members) > 1 else s.reason
        if s.adapted and not s.site.calls:
            note += "; never called"
        elif s.adapted and s.bypassed:
            note += f"; {s.bypassed} of {count(len(s.site.calls), 'call')} bypass it"
        rows.append(
            (
                name,
                f"x{len(members)}" if len(members) > 1 else "",
                s.kind,
                " x ".join(map(str, s.site.shape))
                if s.kind.startswith("Conv") and len(s.site.shape) > 2
                else f"{s.site.out_features} x {s.site.in_features}",
                "+".join(sorted({str(len(m.site.calls)) for m in members})),
                s.verdict,
                str(s.r) if s.adapted else "",
                f"{s.scaling:g}" if s.adapted else "",
                note,
            )
        )
    return rows


def plan_parts(plan: Plan) -> list[str]:
    """Returns a plan as a table with its totals and warnings."""
    head = ("site", "", "layer", "out x in", "calls", "verdict", "r", "scaling", "why")
    adapted = len(plan.adapted)
    calls = sum(sum(c.through_module for c in s.site.calls) for s in plan.adapted)
    lines = [
        f"{plan.model_class}: {adapted} of {count(len(plan), 'linear site')} adapted at "
        f"{count(calls, 'call')}",
        "",
        table(head, plan_rows(plan), right=(1, 4, 6, 7)),
        "",
        totals(plan.trainable, plan.total, plan.percent),
    ]
    lines += [
        f"trained as a whole: {s.name} ("
        + (f"the same copy as {s.same_as}" if s.same_as else f"{s.numel:,} parameters")
        + f"; {s.entry!r} is in modules_to_save or the task type's head)"
        for s in plan.saved
    ]
    lines += [
        f"rows that train: {len(t.indices)} of {t.name}"
        + (
            f", shared with {t.tied_to or t.same_as}"
            if t.tied_to or t.same_as
            else f" ({t.numel:,} numbers)"
        )
        for t in plan.tokens
    ]
    lines += [f"warning: {w}" for w in plan.warnings]
    return lines


def effects_parts(effects: Sequence[Effect]) -> list[str]:
    """Returns effects as a table: equal sites of repeated layers share a row."""
    groups: dict[tuple[str, ...], list[Effect]] = {}
    for e in effects:
        reason = re.sub(r"_\d+\b", "", e.reason)  # the nodes of layers are told apart by a number
        key = (open_indices(e.site), e.adapter, e.verdict, str(e.calls), reason)
        groups.setdefault(key, []).append(e)
    rows = []
    for (_, adapter, verdict, calls, reason), members in groups.items():
        alone = len(members) == 1
        rows.append(
            (
                open_varied([m.site for m in members]),
                "" if alone else f"x{len(members)}",
                adapter,
                verdict,
                calls,
                members[0].reason if alone else reason,
            )
        )
    live = sum(e.live for e in effects)
    head = ("site", "", "adapter", "verdict", "calls", "why")
    shown = table(head, rows, right=(1, 4))
    return [f"{live} of {count(len(effects), 'adapter')} live", "", shown]


def _flag(value: bool | None) -> str:
    return "-" if value is None else str(value)


def parameter_parts(rows: tuple[Parameter, ...], limit: int | None = None) -> list[str]:
    """Returns the parameter table: names on both sides, shapes, flags before and after."""
    head = ("parameter", "in PEFT", "shape", "before", "after", "PEFT")
    cells = [
        (
            r.name,
            "same" if r.peft_name.endswith(r.name) else r.peft_name or "-",
            " x ".join(map(str, r.shape)),
            _flag(r.before),
            _flag(r.after),
            _flag(r.peft_after),
        )
        for r in (rows if limit is None else rows[:limit])
    ]
    parts: list[str] = [table(head, cells)]
    if limit is not None and len(rows) > limit:
        parts.append(f"... and {len(rows) - limit:,} more; --json has them all")
    return parts


def comparison_parts(c: Comparison, limit: int = 24) -> list[str]:
    """Returns a comparison as a report."""
    verdict = "equal" if c.equal else "NOT equal"
    names = sum(1 for r in c.parameters if r.after is not None and r.after == r.peft_after)
    lines = [
        f"{c.plan.model_class}: fxlora and peft {c.peft_version} are {verdict}",
        "",
        f"  fxlora  {totals(c.trainable, c.total, c.percent)}",
        f"  peft    "
        f"{totals(c.peft_trainable, c.peft_total, 100 * c.peft_trainable / max(c.peft_total, 1))}",
        f"  parameters   {names:,} of {len(c.parameters):,} agree in name, shape and requires_grad",
        f"  certificate  {_certificate_line(c)}",
        *_run_lines(c),
        *(f"  note         {n}" for n in c.notes),
    ]
    if c.differences:
        lines += ["", f"{count(len(c.differences), 'difference')}:"]
        lines += [f"  - {d}" for d in c.differences[:limit]]
        if len(c.differences) > limit:
            lines.append(f"  ... and {len(c.differences) - limit:,} more; --json has them all")
    if c.divergences:
        lines += [
            "",
            "known divergences of PEFT's, in what it computes, merges, saves or starts as:",
        ]
        lines += [f"  - [{d.when}] {d}" for d in c.divergences]
    if c.tree_before:
        lines += ["", "before", _indent(c.tree_before), "after, as peft wraps it"]
        lines += [_indent(c.tree_after)]
    return [*lines, "", *parameter_parts(c.parameters, limit)]


def _certificate_line(c: Comparison) -> str:
    if c.certificate.equal:
        return (
            f"the two graphs are the same computation "
            f"({c.certificate.nodes:,} nodes, digest {c.certificate.ours[:12]})"
        )
    if c.certificate.problem:
        return "none: PEFT's wrapped model could not be traced"
    return f"the graphs differ ({c.certificate.ours[:12]}, PEFT {c.certificate.theirs[:12]})"


def _run_lines(c: Comparison) -> list[str]:
    if not c.outputs:
        return [f"  run          not run: {c.not_run}"]
    out = []
    for name, rows in (("outputs", c.outputs), ("gradients", c.gradients)):
        same = sum(d.equal for d in rows)
        size = worst(d.largest for d in rows)
        nans = sum(d.nans for d in rows)
        out.append(
            f"  {name:<12} {same:,} of {len(rows):,} bit-equal, largest difference {size:.3g}"
            + (f"; NaN on both sides in {count(nans, 'place')}" if nans else "")
        )
    return out


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def headline(plan: Plan) -> str:
    """Returns the totals the way a title says them."""
    return f"{human(plan.trainable)} of {human(plan.total)} train ({plan.percent:.2f} %)"
