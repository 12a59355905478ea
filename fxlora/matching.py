"""PEFT's name matching, one rule at a time, each with the reason a reader needs.

The order is that of peft.tuners.tuners_utils.check_target_module_exists: exclude, modules_to_save,
target, then the layer filter. `fxlora` decides by dataflow; which names PEFT takes is still a
question of names, and here it is answered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple


class Match(NamedTuple):
    """Whether PEFT targets a module, by which rule, and why.

    Attributes:
        taken: whether it is targeted.
        rule: "excluded", "modules_to_save", "exact", "suffix", "regex", "layer", or "none".
        reason: one clause for a reader.
    """

    taken: bool
    rule: str
    reason: str


def match(config: Any, key: str) -> Match:
    """Says what PEFT does with the module named `key`.

    Args:
        config: a LoraConfig whose `target_modules` is resolved (not None, not "all-linear").
        key: the module's first name, relative to the base model.
    """
    for rule in (_excluded, _saved):
        found = rule(config, key)
        if found is not None:
            return found
    targets = config.target_modules
    if targets is None:
        return Match(False, "none", "no target_modules are set")
    if isinstance(targets, str):
        return _by_regex(targets, key)
    if key in targets:
        return Match(True, "exact", f"target_modules names it: {key!r}")
    suffix = _suffix(key, targets)
    if suffix is None:
        return Match(False, "none", "no target_modules entry is its name or its dotted suffix")
    return _by_layer(config, key, suffix)


def _suffix(key: str, names: Collection[str]) -> str | None:
    # By the key's own suffixes: "all-linear" holds one name a site, and a loop over them for every
    # module is quadratic. The smallest, so that the reason does not follow the order of a set.
    parts = key.split(".")
    return min(
        (n for n in (".".join(parts[i:]) for i in range(1, len(parts))) if n in names), default=None
    )


def _excluded(config: Any, key: str) -> Match | None:
    excluded = config.exclude_modules
    if not excluded:
        return None
    if isinstance(excluded, str):
        if re.fullmatch(excluded, key):
            return Match(False, "excluded", f"exclude_modules={excluded!r} matches its name")
        return None
    if key in excluded:
        return Match(False, "excluded", f"exclude_modules names it: {key!r}")
    suffix = _suffix(key, excluded)
    if suffix is not None:
        return Match(False, "excluded", f"exclude_modules has {suffix!r}, a suffix of its name")
    return None


def _saved(config: Any, key: str) -> Match | None:
    for name in config.modules_to_save or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", key):
            return Match(
                False,
                "modules_to_save",
                f"modules_to_save has {name!r}: trained as a whole, so never adapted",
            )
    return None


def _by_regex(pattern: str, key: str) -> Match:
    if re.fullmatch(pattern, key):
        return Match(True, "regex", f"target_modules={pattern!r} matches its whole name")
    return Match(
        False, "none", f"target_modules={pattern!r} is one pattern and must match the whole name"
    )


def _by_layer(config: Any, key: str, suffix: str) -> Match:
    taken = Match(True, "suffix", f"target_modules has {suffix!r}, a suffix of its name")
    wanted = config.layers_to_transform
    # PEFT takes an empty list for none, and no other empty value.
    if wanted is None or wanted == []:
        return taken
    index = layer_index(config.layers_pattern, key)
    if index is None:
        return Match(
            False, "layer", "layers_to_transform is set and its name holds no layer index there"
        )
    if index == wanted if isinstance(wanted, int) else index in wanted:
        return Match(True, "suffix", f"{taken.reason}, and layer {index} is in layers_to_transform")
    return Match(False, "layer", f"layer {index} is not in layers_to_transform={wanted!r}")


def layer_index(pattern: Any, key: str) -> int | None:
    """Returns the layer index that layers_to_transform is compared with; None where there is none.

    Args:
        pattern: layers_pattern.
        key: a module's name.

    Source: peft.tuners.tuners_utils.check_target_module_exists.

    >>> layer_index(None, "model.layers.3.mlp.up"), layer_index("blocks", "model.layers.3.mlp.up")
    (3, None)
    """
    if not pattern:
        # The first numbered segment: in "layers.1.experts.0.w1" the layer, not the expert.
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", key)
        return int(found["idx"]) if found else None
    for p in [pattern] if isinstance(pattern, str) else pattern:
        found = re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", key)
        if found:
            return int(found["idx"])
    return None


def pattern_value(pattern: dict[str, Any], key: str, default: Any) -> tuple[Any, str | None]:
    """Returns the value of the first rank_pattern or alpha_pattern entry that matches `key`.

    Returns:
        The value and the pattern that gave it; `(default, None)` when none matches
        (peft.utils.other.get_pattern_key).

    >>> pattern_value({"down": 4, "mlp.down": 2}, "layers.0.mlp.down", 8)
    (4, 'down')
    """
    for entry, value in pattern.items():
        if re.match(rf"(.*\.)?({entry})$", key):
            return value, entry
    return default, None


def parameter_match(targets: Iterable[str], key: str) -> str | None:
    """Returns the target_parameters entry that names the parameter `key`, if one does."""
    for name in sorted(targets):
        if key == name or key.endswith(f".{name}"):
            return name
    return None
