"""PEFT's matching rules in PEFT's order, and what each says of one name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fxlora import matching

SHOWN = 4  # of a list, before "and more"


@dataclass(frozen=True)
class Step:
    """What one rule says of a name.

    Attributes:
        rule: the rule, by its field: "exclude_modules", "modules_to_save", "target_modules",
            "layers_to_transform", "target_parameters", or "attention".
        outcome: "not set", "passes" (it leaves the decision to the next), "takes", "leaves" or
            "not asked" (one before it decided).
        reason: one clause.
        entry: the entry or the pattern that hit; None where none did.
        hit: the part of the name it hit.
    """

    rule: str
    outcome: str
    reason: str
    entry: str | None = None
    hit: str = ""


def how_it_hits(entry: str, name: str) -> str:
    """Says in which way an entry hits a name it hits."""
    return "is its name" if entry == name else "is a dotted suffix of its name"


def ladder(config: Any, name: str) -> list[Step]:
    """Asks every rule about the module `name`, in the order of PEFT's check_target_module_exists.

    Args:
        config: a LoraConfig whose targets are resolved.
        name: a module's first name.

    Returns:
        Four steps; those behind the one that decided are "not asked".
    """
    steps: list[Step] = []
    why = ""
    for rule in (_exclude_step, _save_step, _target_step, _layer_step):
        step = rule(config, name)
        if why:
            unset = step.outcome == "not set"
            step = Step(step.rule, step.outcome if unset else "not asked", "" if unset else why)
        elif step.outcome in ("leaves", "takes"):
            exact = step.rule == "target_modules" and step.outcome == "takes"
            why = "an exact name or a pattern is past it" if exact else "decided before"
        steps.append(step)
    if steps[-1].outcome == "not set" and steps[-2].outcome == "passes":
        # Without a layer filter a suffix has the last word.
        steps[-2] = replace(steps[-2], outcome="takes")
    return steps


def _exclude_step(config: Any, name: str) -> Step:
    excluded = config.exclude_modules
    if not excluded:
        return Step("exclude_modules", "not set", "")
    if isinstance(excluded, str):
        return _pattern_step("exclude_modules", excluded, name, "leaves", "passes")
    hits = hits_of(excluded, name)
    if hits:
        return Step(
            "exclude_modules",
            "leaves",
            f"{hits[0]!r} {how_it_hits(hits[0], name)}",
            hits[0],
            hits[0],
        )
    return Step(
        "exclude_modules", "passes",
        f"none of its {len(excluded)} entries is the name or a dotted suffix",
    )  # fmt: skip


def hits_of(entries: Iterable[str], name: str) -> list[str]:
    """Returns the entries that are a name or a dotted suffix of it."""
    """Returns the entries that are the name, or a dotted suffix of it; the exact one first."""
    found = sorted(e for e in entries if name == e or name.endswith(f".{e}"))
    return sorted(found, key=lambda e: e != name)


def _pattern_step(rule: str, pattern: str, name: str, hit: str, miss: str) -> Step:
    if re.fullmatch(pattern, name):
        return Step(rule, hit, f"the pattern {pattern!r} matches its whole name", pattern, name)
    inner = re.search(pattern, name)
    if inner is not None and inner[0]:
        fixed = rf".*\.{pattern}" if inner.end() == len(name) else pattern
        why = (
            f"the pattern {pattern!r} matches only {inner[0]!r} of it, and must match the whole "
            "name" + (f": write {fixed!r}" if fixed != pattern else "")
        )
        return Step(rule, miss, why, pattern, inner[0])
    return Step(rule, miss, f"the pattern {pattern!r} does not match it", pattern)


def _save_step(config: Any, name: str) -> Step:
    saved = config.modules_to_save
    if not saved:
        return Step("modules_to_save", "not set", "")
    for entry in saved:
        found = re.match(rf"(^|.*\.){entry}($|\..*)", name)
        if found is not None:
            hit = name[found.end(1) : len(name) - len(found[found.re.groups])]
            return Step(
                "modules_to_save", "leaves",
                f"{entry!r} is trained as a whole, with everything below {hit!r}", entry, hit,
            )  # fmt: skip
    return Step("modules_to_save", "passes", f"not in or below {list(saved)}")


def _target_step(config: Any, name: str) -> Step:
    targets = config.target_modules
    if targets is None:
        return Step("target_modules", "leaves", "no target_modules are set")
    if isinstance(targets, str):
        return _pattern_step("target_modules", targets, name, "takes", "leaves")
    hits = hits_of(targets, name)
    if not hits:
        return Step(
            "target_modules", "leaves",
            f"none of its {len(targets)} entries is the name or a dotted suffix",
        )  # fmt: skip
    if hits[0] == name:
        return Step("target_modules", "takes", f"exact: {name!r} is its name", name, name)
    also = f" (so is {', '.join(map(repr, hits[1:]))})" if len(hits) > 1 else ""
    # A suffix passes it on to the layer filter.
    why = f"suffix: {hits[0]!r} is a dotted suffix of its name{also}"
    return Step("target_modules", "passes", why, hits[0], hits[0])


def _layer_step(config: Any, name: str) -> Step:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return Step("layers_to_transform", "not set", "")
    index = matching.layer_index(config.layers_pattern, name)
    where = f" behind layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
    if index is None:
        return Step("layers_to_transform", "leaves", f"its name holds no layer index{where}")
    listed = [wanted] if isinstance(wanted, int) else wanted
    said = f"layer {index} is {'' if index in listed else 'not '}in {list(listed)!r}"
    return Step(
        "layers_to_transform",
        "takes" if index in listed else "leaves",
        said,
        str(index),
        str(index),
    )
