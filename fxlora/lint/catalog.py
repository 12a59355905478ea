"""Every rule by its id, and the selectors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxlora.errors import ConfigError, did_you_mean
from fxlora.lint import (
    rules_effects,
    rules_merging,
    rules_serving,
    rules_shapes,
    rules_targets,
    rules_training,
)
from fxlora.lint.finding import Hit, Rule, Severity


def _by_the_run(_: Any) -> Iterator[Hit]:
    """FXL001: reported by the run, which knows what was suppressed."""
    yield from ()


UNUSED = Rule(
    "FXL001", "unused-suppression", Severity.NOTE, _by_the_run,
    finds="A suppression that held nothing back: a `# fxlora: ignore[...]` comment at an adapted "
    "layer, or an entry of the settings' `sites` table; or one that names no rule.",
    why="It hides the next finding of that rule at that place, which nobody has looked at.",
    example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8)))
settings = Settings(sites={"up": ("FXL106",)})
report = lint(fxlora.trace(model), LoraConfig(r=2, target_modules=["up"]), settings)""",
    fix="Take the suppression away.",
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    UNUSED,
    *rules_targets.RULES,
    *rules_effects.RULES,
    *rules_shapes.RULES,
    *rules_training.RULES,
    *rules_merging.RULES,
    *rules_serving.RULES,
)
SUBJECTS = {
    "0": "the linter itself",
    "1": "targets: what the configuration names",
    "2": "effects: what reaches an output",
    "3": "shapes: ranks and sizes",
    "4": "training: scalings, modes, checkpointing",
    "5": "merging",
    "6": "serving (only with --serve)",
}


def rule(name: str) -> Rule:
    """Returns a rule by its id or name.

    Raises:
        ConfigError: when there is none, with the nearest.

    >>> rule("bypassed-adapter").id
    'FXL201'
    """
    for r in RULES:
        if name.upper() == r.id or name.lower() == r.name:
            return r
    names = [n for r in RULES for n in (r.id, r.name)]
    raise ConfigError(
        f"{name!r} is no lint rule.{did_you_mean(name, names)} fxlora lint --list-rules names them"
    )


def selected(selector: str) -> tuple[Rule, ...]:
    """Returns the rules a selector names: an id, a name, the start of an id, ALL or DEFAULT.

    Raises:
        ConfigError: when it names none.

    >>> [r.id for r in selected("FXL3")]
    ['FXL301', 'FXL302']
    """
    word = selector.strip().upper()
    if word == "ALL":
        return RULES
    if word == "DEFAULT":
        return tuple(r for r in RULES if r.on)
    if word.startswith("FXL") and len(word) < 6:
        found = tuple(r for r in RULES if r.id.startswith(word))
        if found:
            return found
    return (rule(selector.strip()),)
