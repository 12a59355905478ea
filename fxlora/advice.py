"""What a reader of a plan should know: targets that match nothing, layers that will not run, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fxlora import extras, matching
from fxlora.errors import did_you_mean
from fxlora.text import count, ranges

if TYPE_CHECKING:
    from fxlora.plan import PlannedSite
    from fxlora.sites import Site

_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_ON_MAMBA = ("out_proj", "conv1d")


def warnings_of(
    asked: tuple[str, ...],
    config: Any,
    planned: Sequence[PlannedSite],
    saved: Sequence[extras.SavedModule],
    model_type: str | None,
    parts: Callable[[], list[Site]],
) -> Iterator[str]:
    """Yields one sentence for everything a reader should know before training.

    Args:
        asked: target_modules as the user wrote them.
        config: the resolved configuration.
        planned: every site with its verdict.
        saved: the modules trained as a whole.
        model_type: of a transformers model.
        parts: finds the parts of fused layers, which reach="slices" makes sites.
    """
    names = [n for p in planned if p.kind != "Parameter" for n in _known_as(p)]
    last = sorted({n.rpartition(".")[2] for n in names})
    for target in asked:
        hit = any(n == target or n.endswith(f".{target}") for n in names)
        renamed = config.target_modules is not None and target not in config.target_modules
        if not hit and not renamed:
            near = part_hint(target, parts()) or did_you_mean(target, last)
            yield f"target_modules entry {target!r} matches nothing.{near}"
    for which in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, which):
            hit = any(
                matching.pattern_value({key: 1}, n, 0)[0]
                for p in planned
                if p.adapted
                for n in _known_as(p)
            )
            if not hit:
                yield f"{which} key {key!r} matches no adapted site"
    for entry in extras.missing_entries(config, saved):
        yield f"modules_to_save entry {entry!r} matches no module, and PEFT says nothing of it"
    if config.inference_mode:
        yield (
            "inference_mode=True: no adapter trains. A configuration saved beside an adapter says so; "
            "set config.inference_mode = False to train"
        )
    yield from _whole_modules(saved)
    yield from _odd_layers(planned)
    yield from _called_by_keyword(planned)
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
    for p in planned:
        # The wrapper has a `weight` of its own: the base layer's.
        known = p.name.rpartition(".")[2] == "weight"
        if p.adapted and p.kind == "Parameter" and p.bypassed and not (p.everywhere or known):
            yield (
                f"{p.name} is read outside its module's own calls: PEFT puts a wrapper in the module's "
                "place that does not have it, so PEFT's model fails when it runs. Leave it out, or read "
                "it in the forward of the module that holds it"
            )


def first_name_hint(target: str, planned: Sequence[PlannedSite]) -> str:
    """Returns a sentence where an entry is another name of a module; "" where it is not."""
    for p in planned:
        for alias in p.site.aliases:
            if alias == target or alias.endswith(f".{target}"):
                return (
                    f" {alias!r} is another name of {p.name!r}, and PEFT sees a module by its first "
                    f"name only: write {p.name!r}."
                )
    return ""


def part_hint(target: str, parts: list[Site]) -> str:
    """Returns a sentence where an entry names a part of a fused layer; "" where it does not."""
    for part in parts:
        if any(n == target or n.endswith(f".{target}") for n in (part.name, *part.aliases)):
            first, last = part.rows[0].start, part.rows[-1].stop
            rows = (
                f"{first}:{last}" if len(part.rows) == 1 else f"interleaved by head, {first}:{last}"
            )
            return (
                f" {target!r} is a part of {part.owner!r} (rows {rows}): target that, or plan with "
                "reach='slices'."
            )
    return ""


def _known_as(planned: PlannedSite) -> tuple[str, ...]:
    """Returns what a target may call a site: a part by either name, a single call by its layer's."""
    site = planned.site
    if site.rows:
        return (site.name.partition(".call_")[0], *site.aliases)
    return (site.owner,)


def _whole_modules(saved: Sequence[extras.SavedModule]) -> Iterator[str]:
    """Names an entry that hits several modules: an entry is a suffix of the name, without a dot."""
    hits: dict[str, list[str]] = {}
    for s in saved:
        if not s.same_as:
            hits.setdefault(s.entry, []).append(s.name)
    for entry, names in hits.items():
        if len(names) > 1:
            numel = sum(s.numel for s in saved if s.entry == entry)
            yield (
                f"modules_to_save entry {entry!r} trains {len(names)} modules as a whole "
                f"({numel:,} parameters): {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            )


def _odd_layers(planned: Sequence[PlannedSite]) -> Iterator[str]:
    """Finds adapted layers whose forward is not the linear map of their weight.

    A subclass of nn.Linear may return a tuple or another shape; PEFT's wrapper fails there when it
    runs, and so would ours.
    """
    for p in planned:
        if not p.adapted or p.kind not in ("Linear", "Conv1D") or p.site.rows:
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


def _called_by_keyword(planned: Sequence[PlannedSite]) -> Iterator[str]:
    """Finds adapted layers whose input is named: PEFT's wrappers call it `x` and want it first."""
    for p in planned:
        calls = [c.node for c in p.site.calls if p.adapted and p.reaches(c)]
        named = next((n for n in calls if n.op == "call_module" and not n.args and n.kwargs), None)
        if named is not None:
            word = next(iter(named.kwargs))
            yield (
                f"{p.name} is called with its input by keyword, {word}=: PEFT's wrapper takes it by "
                "position only, so PEFT's model fails when it runs. Call the layer with its input first"
            )


def no_match(
    config: Any, asked: tuple[str, ...], planned: Sequence[PlannedSite],
    parts: Callable[[], list[Site]],
) -> str:  # fmt: skip
    """Returns the message for a configuration that adapts nothing: what there was, and what is near."""
    names = [p.name for p in planned]
    shown = config.target_modules if isinstance(config.target_modules, str) else asked
    if config.target_parameters and not config.target_modules:
        return (
            f"target_parameters={list(config.target_parameters)!r} selected no parameter; an entry "
            f"is a parameter's name or a dotted suffix of it. The sites are {names[:12]}"
        )
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
        near = part_hint(shown[0], parts()) or did_you_mean(shown[0], [*last, *names])
    elif isinstance(shown, str) and shown in last:
        near = f" A string is one pattern for the whole name; write [{shown!r}] for a suffix."
    limited = [p for p in planned if p.rule == "layer"]
    why = f" {limited[0].reason}" if limited else ""
    if limited:  # the names are right then
        found = (matching.layer_index(config.layers_pattern, p.name) for p in limited)
        numbers = sorted({i for i in found if i is not None})
        why += f"; those it names are in layers {ranges(numbers)}." if numbers else "."
        near = ""
    elif not isinstance(shown, str) and shown:
        near = next((h for t in shown if (h := first_name_hint(t, planned))), near)
    return (
        f"target_modules={shown!r} selected none of the {len(names)} linear sites {listed}."
        f"{why}{near}"
    )
