"""An explanation as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fxlora.roles import place_of
from fxlora.text import Table, count, human, table

if TYPE_CHECKING:
    from fxlora.explain import Explanation

_SHOWN = 4  # of a list, before "and more"


def explanation_lines(e: Explanation) -> Iterator[str]:
    """Yields the lines of an explanation."""
    yield f"{e.name}: {e.verdict or 'not a site'}"
    yield f"  {e.is_a}"
    if e.steps:
        yield ""
        rows = [(s.rule, s.outcome, s.reason) for s in e.steps]
        head = "rule, for the fused layer" if e.what == "slice" else "rule, in PEFT's order"
        yield table((head, "says", "because"), rows).indented()
    if e.sites:
        yield ""
        yield _site_table(e.sites).indented()
    if e.entries:
        yield ""
        yield _entry_table(e).indented()
    if e.near and e.what == "site":
        yield f"  near, and not its name or suffix: {', '.join(map(repr, e.near))}"
    for p in e.patterns:
        yield f"  {p.field}[{p.key!r}] = {p.value} {p.status}: {p.reason}"
    yield from _work_lines(e)
    yield from _adapter_lines(e)
    yield from (f"  surprise: {s}" for s in e.surprises)
    yield from (f"  note: {a}" for a in e.advice)


def _entry_table(e: Explanation) -> Table:
    rows = []
    for x in e.entries:
        also = ", ".join(x.others[:2]) + (", ..." if x.takes > 3 else "")
        if x.renamed:
            also = f"none: PEFT takes it for the parameter {x.renamed}"
        if x.refused:
            also += f"; PEFT raises for {x.refused[0]}"
        rows.append((x.entry, "0" if x.renamed else str(x.takes), also))
    return table(("target that takes it", "sites", "others"), rows, right=(1,))


def _site_table(listed: Iterable[tuple[str, str, str]]) -> Table:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, verdict, reason in listed:
        place = place_of(name)
        kind = f"{place.container}.*.{place.target}" if place.layer is not None else name
        groups.setdefault((kind, verdict, reason.replace(name, kind)), []).append(name)
    rows = [
        (names[0] if len(names) == 1 else kind, f"x{len(names)}" if len(names) > 1 else "", v, why)
        for (kind, v, why), names in groups.items()
    ]
    return table(("site", "", "verdict", "why"), rows, right=(1,))


def _work_lines(e: Explanation) -> Iterator[str]:
    if e.what not in ("site", "slice"):
        return
    yield ""
    if not e.calls:
        yield "  never called on the traced path"
    for line in e.calls[:_SHOWN]:
        yield f"  call {line}"
    if len(e.calls) > _SHOWN:
        yield f"  ... and {count(len(e.calls) - _SHOWN, 'call')} more"
    if e.share_of_flops is not None and e.share_of_parameters is not None:
        yield (
            f"  {100 * e.share_of_parameters:.2f} % of the linear sites' parameters, "
            f"{100 * e.share_of_flops:.2f} % of their FLOPs"
        )


def _adapter_lines(e: Explanation) -> Iterator[str]:
    if e.adapter is None:
        return
    a = e.adapter
    variant = f", {a['variant']}" if a["variant"] else ""
    yield (
        f"  adapter: r={a['r']}, lora_alpha={a['lora_alpha']}, scaling {a['scaling']:g} "
        f"({a['formula']}){variant}"
    )
    for name, shape in a["parameters"].items():
        yield f"    {name}  {' x '.join(map(str, shape))}"
    yield (
        f"    {a['trainable']:,} parameters train ({100 * a['share_of_trainable']:.2f} % of all that "
        f"train); {100 * a['share_of_weight']:.2f} % of the weight's {human(_ratio(a))}"
    )
    if e.effect is not None:
        yield f"  effect: {e.effect['verdict']}: {e.effect['reason']}"
        witness = e.effect["witness"]
        if witness:
            shown = witness if len(witness) <= 6 else [*witness[:3], "...", *witness[-2:]]
            yield f"    witness, {count(len(witness), 'node')}: {' > '.join(shown)}"


def _ratio(a: Mapping[str, Any]) -> int:
    return round(a["numel"] / a["share_of_weight"]) if a["share_of_weight"] else 0
