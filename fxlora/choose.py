"""The smallest `target_modules` that takes exactly the sites one wants, and a regex that does too.

An entry of `target_modules` is a dotted suffix, so what it takes is a subtree of the names read
from their end: the sets are nested or disjoint, never crossing. On such a tree the smallest list of
targets and exclusions is found exactly, in one walk from the leaves up. Whatever comes out is put
before peft's own matching, and says so if that disagrees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora import matching
from fxlora.errors import ConfigError, did_you_mean
from fxlora.facts import info
from fxlora.flops import example_sizes, site_flops
from fxlora.html import Printed
from fxlora.patterns import language, segments, smallest_regex
from fxlora.plan import plan
from fxlora.roles import ROLES, place_of, role_of
from fxlora.sites import Site, sites
from fxlora.suffixes import Lists, Name, smallest_lists, solved, tree_of
from fxlora.targets import resolve_targets
from fxlora.text import count

Wanted = str | Iterable[str] | Callable[[Site], bool]


@dataclass(frozen=True)
class Choice(Printed):
    """Fields of a LoraConfig that take the wanted sites, and no others.

    Attributes:
        wanted: the sites asked for, in the order of the model.
        target_modules: names and dotted suffixes; the regex where no list can say it.
        exclude_modules: names and suffixes, or one regex; empty where the targets do without.
        layers_to_transform: layer indices; empty where the targets do without.
        target_parameters: for bare parameters (MoE experts and routers).
        regex: one pattern for `target_modules` that takes the same modules; "" without modules.
        exact: whether peft, asked, takes these sites and no others; on some models it renames
            targets first, and a note says what comes of it.
        regex_exact: the same of the regex.
        notes: what a reader should know.
    """

    wanted: tuple[str, ...]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    target_parameters: tuple[str, ...] = ()
    regex: str = ""
    exact: bool = True
    regex_exact: bool = True
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """How many entries the lists have together; a regex and a list of layers count as one."""
        return Lists(
            self.target_modules, self.exclude_modules, self.layers_to_transform
        ).entries + len(self.target_parameters)

    def fields(self) -> dict[str, Any]:
        """Returns the fields as `peft.LoraConfig` takes them; those that are not needed left out."""
        out: dict[str, Any] = {"target_modules": _listed(self.target_modules)}
        for name in ("exclude_modules", "layers_to_transform", "target_parameters"):
            if getattr(self, name):
                out[name] = _listed(getattr(self, name))
        return out

    def regex_fields(self) -> dict[str, Any]:
        """Returns the fields with the regex in place of lists and exclusions."""
        out: dict[str, Any] = {"target_modules": self.regex or []}
        if self.target_parameters:
            out["target_parameters"] = list(self.target_parameters)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Returns the choice as plain data, for JSON."""
        return {
            **self.fields(),
            "regex": self.regex,
            "exact": self.exact,
            "regex_exact": self.regex_exact,
            "wanted": list(self.wanted),
            "notes": list(self.notes),
        }

    def _parts(self) -> Iterable[str]:
        layers = " (the list of layers counts as one)" if self.layers_to_transform else ""
        lines = [f"{count(len(self.wanted), 'site')}, {self.entries} to write{layers}:"]
        lines += [f"  {name}={value!r}" for name, value in self.fields().items()]
        if self.regex and self.regex_exact and self.regex != self.target_modules:
            lines.append(f"  or as one regex: target_modules={self.regex!r}")
        return [*lines, *(f"note: {n}" for n in self.notes)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, str) else list(value)


def choose(traced: GraphModule, wanted: Wanted, sizes: Mapping[str, int] | None = None) -> Choice:
    r"""Finds the smallest targets that take exactly the wanted sites, by peft's rules.

    The fewest entries in `target_modules`, `exclude_modules` and `layers_to_transform` together,
    then the fewest exclusions, then the shortest text. So an exclusion appears where the targets
    alone cannot say it, or only at greater length.

    Args:
        traced: what `fxlora.trace` returned; read.
        wanted: names of sites; a predicate on a `Site`; or words, see `wanted_sites`.
        sizes: input sizes where the words speak of FLOPs.

    Raises:
        ConfigError: when nothing is wanted, or a name or a word is unknown.

    >>> import torch, fxlora
    >>> block = lambda: torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in "qkv"})
    >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block(), block()])})
    >>> model.forward = lambda x: sum(b["q"](x) for b in model["layers"])
    >>> traced = fxlora.trace(model, (torch.randn(2, 4),))
    >>> choice = choose(traced, lambda site: site.name.endswith("q"))
    >>> choice.target_modules, choice.regex
    (('q',), '.*\\.q')
    """
    model = info(traced).model
    found = {s.name: s for s in sites(traced)}
    names = wanted_sites(traced, wanted, sizes)
    parameters = [n for n in names if found[n].kind == "Parameter"]
    carried = _carried(names, found)
    modules = [n for n in names if found[n].kind != "Parameter" and n not in carried]
    universe = [n for n, _ in model.named_modules() if n]
    if "" in modules:
        raise ConfigError("the model itself is wanted, and PEFT never adapts the root; wrap it")
    chosen, regex = _modules(universe, modules)
    made = Choice(
        wanted=tuple(names),
        target_modules=chosen.targets,
        exclude_modules=chosen.excluded,
        layers_to_transform=chosen.layers,
        target_parameters=_parameters(model, parameters),
        regex=regex,
        notes=tuple(_notes(chosen, names, carried, found)),
    )
    return _checked(made, model, set(modules), set(parameters), universe)


def _carried(names: Iterable[str], found: Mapping[str, Site]) -> set[str]:
    """Returns the output projections that an adapted nn.MultiheadAttention takes with it."""
    own = {n for n in names if found[n].kind == "MultiheadAttention"}
    return {f"{n}.out_proj" for n in own}


def _notes(
    chosen: Lists, names: list[str], carried: set[str], found: Mapping[str, Site]
) -> Iterator[str]:
    more = sorted((carried & set(found)) - set(names))
    if more:
        yield f"{', '.join(more[:3])} is adapted with its attention, as PEFT has it"
    dead = sorted(
        n for n in names if n not in carried and n.endswith(".out_proj") and _is_attention(n, found)
    )
    if dead:
        yield f"an adapter on {dead[0]} alone has no effect: attention reads its weight directly"
    if isinstance(chosen.targets, str):
        yield "no list of suffixes can tell these names apart; target_modules is a regex"


def _is_attention(name: str, found: Mapping[str, Site]) -> bool:
    outer = found.get(name.rpartition(".")[0])
    return outer is not None and outer.kind == "MultiheadAttention"


# ---- what is wanted ----------------------------------------------------------------------------


def wanted_sites(
    traced: GraphModule, wanted: Wanted, sizes: Mapping[str, int] | None = None
) -> list[str]:
    """Returns the names of the sites that are wanted, in the order of the model.

    Words are terms joined by ` + ` and ` - `, from left to right; ` @ ` and layers behind a term
    keep those of it: `all-linear - router`, `head + mlp @ 0-15`. A term is a role (`attention`,
    `mlp`, `experts`, `router`, `embedding`, `head`, `conv`), `all-linear` (what peft takes for it),
    a share of the work (`60% flops`, `60% parameters`: the fewest kinds of linear layers that make
    up at least that much, the largest first), or a site's name or dotted suffix.

    Args:
        traced: what `fxlora.trace` returned; read.
        wanted: words, names, or a predicate on a `Site`.
        sizes: input sizes for FLOPs.

    Raises:
        ConfigError: for a word that selects nothing, with the candidates.
    """
    every = sites(traced)
    if isinstance(wanted, str):
        taken = _by_words(traced, every, wanted, sizes)
    elif callable(wanted):
        taken = {s.name for s in every if wanted(s)}
    else:
        taken = set(wanted)
        for name in sorted(taken - {s.name for s in every}):
            raise ConfigError(
                f"wanted={name!r} is none of the {len(every)} sites."
                + did_you_mean(name, [s.name for s in every])
            )
    if not taken:
        raise ConfigError(f"nothing is wanted: {wanted!r} selects none of {len(every)} sites")
    return [s.name for s in every if s.name in taken]


def _by_words(
    traced: GraphModule, every: tuple[Site, ...], text: str, sizes: Mapping[str, int] | None
) -> set[str]:
    tokens = re.split(r"\s+([+-])\s+", text.strip())
    taken = _term(traced, every, tokens[0], sizes)
    for sign, term in zip(tokens[1::2], tokens[2::2], strict=True):
        more = _term(traced, every, term, sizes)
        taken = taken | more if sign == "+" else taken - more
    return taken


def _layer_list(text: str) -> set[int]:
    out: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise ConfigError(f"layers {text!r}: {part!r} is no index and no range; write 0,8-11")
        out |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return out


def _term(
    traced: GraphModule, every: tuple[Site, ...], term: str, sizes: Mapping[str, int] | None
) -> set[str]:
    term, at, layers = term.partition(" @ ")
    found = _plain_term(traced, every, term.strip(), sizes)
    if not at:
        return found
    kept = _layer_list(layers)
    return {n for n in found if place_of(n).layer in kept}


def _plain_term(
    traced: GraphModule, every: tuple[Site, ...], term: str, sizes: Mapping[str, int] | None
) -> set[str]:
    model = info(traced).model
    if term in ROLES:
        return {s.name for s in every if role_of(s, model) == term}  # of none, if it has none
    if term.lower() == "all-linear":
        found = _all_linear(traced)
    elif share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%\s*(?:of\s+)?(flops|param\w*)", term.lower()):
        numbers = example_sizes(traced, sizes) if share[2] == "flops" else None
        found = _largest(every, float(share[1]) / 100, numbers)
    else:
        found = {s.name for s in every if s.name == term or s.name.endswith(f".{term}")}
    if not found:
        last = [s.name.rpartition(".")[2] for s in every]
        raise ConfigError(
            f"{term!r} selects no site; a term is one of {', '.join(ROLES[:-1])}, all-linear, "
            f"'60% flops', '60% parameters' or a name.{did_you_mean(term, [*ROLES, *last])}"
        )
    return found


def _all_linear(traced: GraphModule) -> set[str]:
    from peft import LoraConfig

    return {p.name for p in plan(traced, LoraConfig(target_modules="all-linear")).adapted}


def _largest(every: tuple[Site, ...], share: float, sizes: Mapping[str, int] | None) -> set[str]:
    """Returns the fewest kinds of linear layers with that share; the largest first is the fewest."""
    amounts: dict[str, int] = {}
    members: dict[str, set[str]] = {}
    total = 0
    for s in every:
        amount = math.prod(s.shape) if sizes is None else site_flops(s, sizes)
        total += amount
        if s.kind in ("Linear", "Conv1D", "Parameter") and s.name:
            kind = s.name.rpartition(".")[2]
            amounts[kind] = amounts.get(kind, 0) + amount
            members.setdefault(kind, set()).add(s.name)
    taken: set[str] = set()
    have = 0
    for kind in sorted(amounts, key=lambda k: (-amounts[k], k)):
        if have >= share * total:
            return taken
        taken |= members[kind]
        have += amounts[kind]
    if have >= share * total:
        return taken
    raise ConfigError(
        f"{100 * share:g} % is more than all linear layers have together: "
        f"{100 * have / max(total, 1):.1f} %"
    )


# ---- modules -----------------------------------------------------------------------------------


def _modules(universe: list[str], wanted: list[str]) -> tuple[Lists, str]:
    if not wanted:
        return Lists(()), ""
    regex = smallest_regex(universe, wanted)
    ways = [w for w in _ways(universe, wanted) if w is not None]
    return (min(ways, key=lambda w: w.rank) if ways else Lists(regex)), regex


def _ways(universe: list[str], wanted: list[str]) -> Iterator[Lists | None]:
    yield smallest_lists(universe, wanted)
    yield _by_layers(universe, wanted)
    yield _but_for(universe, wanted)


def _by_layers(universe: list[str], wanted: list[str]) -> Lists | None:
    """Says it with layers_to_transform, where the wanted names are in some layers only.

    Outside of these layers a suffix takes nothing; an exact name still does.
    """
    index = {n: matching.layer_index(None, n) for n in universe}
    kept = {i for n in wanted if (i := index[n]) is not None}
    if not kept or kept == {i for i in index.values() if i is not None}:
        return None
    take = set(wanted)
    found = solved(tree_of({n: Name(n in take, by_suffix=index[n] in kept) for n in universe}))
    return None if found is None else found._replace(layers=tuple(sorted(kept)))


def _but_for(universe: list[str], wanted: list[str]) -> Lists | None:
    """Says it with one pattern for whole parts of the model to leave out, such as a vision tower."""
    take = set(wanted)
    inside = {p for n in wanted for p in _prefixes(n)}
    apart = {n: next((p for p in _prefixes(n) if p not in inside), None) for n in universe}
    free = [n for n in universe if n not in take and apart[n] not in (None, n)]
    found = smallest_lists(universe, wanted, free)
    if found is None or found.excluded:
        return None
    config = _Config(found.targets)
    hit = {str(apart[n]) for n in free if matching.match(config, n).taken}
    if not hit:
        return None
    pattern = f"{language(segments(hit), segments(set(map(str, filter(None, apart.values()))) | inside))}\\..*"
    return found._replace(excluded=pattern)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        yield ".".join(parts[:i])


@dataclass
class _Config:
    """The fields peft's matching reads."""

    target_modules: Any
    exclude_modules: Any = None
    layers_to_transform: Any = None
    modules_to_save: Any = None
    target_parameters: Any = None
    layers_pattern: Any = None


# ---- parameters --------------------------------------------------------------------------------


def _parameters(model: nn.Module, wanted: list[str]) -> tuple[str, ...]:
    """Returns the fewest target_parameters entries for these parameters; nothing excludes there."""
    if not wanted:
        return ()
    every = parameter_names(model)
    take = set(wanted)
    out: list[str] = []
    todo = list(wanted)
    while todo:
        name = todo[0]
        parts = name.split(".")
        suffixes = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        entry = next((s for s in suffixes if _named(s, every) <= take), None)
        if entry is None:
            raise ConfigError(
                f"target_parameters cannot name {name!r} alone: "
                f"{min(_named(name, every) - take)!r} ends with it"
            )
        out.append(entry)
        todo = [n for n in todo if n not in _named(entry, every)]
    return tuple(sorted(out))


def parameter_names(model: nn.Module) -> list[str]:
    """Returns the names of the parameters peft walks for target_parameters."""
    return [
        f"{name}.{last}" if name else last
        for name, module in model.named_modules()
        for last, _ in module.named_parameters(recurse=False)
    ]


def _named(entry: str, names: Iterable[str]) -> set[str]:
    return {n for n in names if n == entry or n.endswith(f".{entry}")}


# ---- what peft says ----------------------------------------------------------------------------


def _checked(
    choice: Choice, model: nn.Module, modules: set[str], parameters: set[str], universe: list[str]
) -> Choice:
    """Returns the choice with peft's word on it: whether it takes these sites and no others."""
    problem = _problem(choice.fields(), model, modules, parameters, universe)
    with_regex = _problem(choice.regex_fields(), model, modules, parameters, universe)
    notes = [*choice.notes]
    if problem:
        notes.append(f"not what peft makes of it: {problem}")
    elif with_regex:
        notes.append(f"a regex cannot say it on this model: {with_regex}")
    return replace(choice, exact=not problem, regex_exact=not with_regex, notes=tuple(notes))


def _problem(
    fields: dict[str, Any],
    model: nn.Module,
    modules: set[str],
    parameters: set[str],
    universe: list[str],
) -> str:
    from peft import LoraConfig

    config = LoraConfig(**fields)
    try:
        resolve_targets(config, model)  # on some models peft renames targets first
    except ConfigError as e:
        return str(e)
    got = taken_by_peft(config, universe)
    owned = parameter_names(model) if config.target_parameters else []
    also = {n for n in owned if matching.parameter_match(config.target_parameters, n)}
    extra = sorted((got - modules) | (also - parameters))
    missing = sorted((modules - got) | (parameters - also))
    if not extra and not missing:
        return ""
    renamed = _listed(fields["target_modules"]) != _listed(config.target_modules)
    return " and ".join(
        f"peft {verb} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for verb, names in (("leaves out", missing), ("takes", extra))
        if names
    ) + (" (it renames the targets of this model's type)" if renamed and missing else "")


def taken_by_peft(config: Any, names: Iterable[str]) -> set[str]:
    """Returns the names peft's own matching takes.

    Args:
        config: a LoraConfig whose targets are resolved.
        names: names of modules.
    """
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    out = set()
    for name in names:
        found = check_target_module_exists(config, name)
        if found and not isinstance(found, _ExcludedModule):
            out.add(name)
    return out
