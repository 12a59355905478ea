"""Suppressions: comments in the model's own code, and the settings' table of sites; each is counted."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from fxlora.errors import ConfigError
from fxlora.facts import info
from fxlora.lint.catalog import selected
from fxlora.lint.context import Context
from fxlora.lint.definitions import definition
from fxlora.lint.finding import Hit, Place, Rule
from fxlora.lint.settings import Settings
from fxlora.sites import Site

_COMMENT = re.compile(r"#\s*fxlora:\s*ignore\b(?:\[([^\]]*)\])?")


@dataclass(frozen=True)
class Suppression:
    """One suppression.

    Attributes:
        where: what a reader finds it by: a line of code, or the pattern.
        rules: the ids it names; None for all.
        wrong: what it names that is no rule.
    """

    where: str
    rules: frozenset[str] | None
    wrong: tuple[str, ...] = ()

    def holds(self, rule: Rule) -> bool:
        """Whether it is about a rule."""
        return self.rules is None or rule.id in self.rules


class Suppressions:
    """Every suppression that could bear on a run, and which of them did."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._table = [
            (pattern, Suppression(f"sites[{pattern!r}]", _ids(rules)[0]))
            for pattern, rules in settings.sites.items()
        ]
        self._by_site = {
            p.name: tuple(_comments(context, p.site)) for p in context.plan if p.adapted
        }
        self._context = context
        self._used: set[str] = set()

    def hides(self, rule: Rule, hit: Hit) -> bool:
        """Says whether a hit is suppressed, and remembers by what."""
        found = [s for pattern, s in self._table if fnmatchcase(hit.site or hit.subject, pattern)]
        if hit.site:
            if hit.site not in self._by_site:
                site = next((s for s in self._context.sites if s.name == hit.site), None)
                self._by_site[hit.site] = tuple(_comments(self._context, site)) if site else ()
            found += self._by_site[hit.site]
        hiding = [s for s in found if s.holds(rule)]
        self._used.update(s.where for s in hiding)
        return bool(hiding)

    def unused(self, active: frozenset[str]) -> Iterator[Hit]:
        """Yields a hit for every suppression that hid nothing, of rules that ran."""
        every = [s for _, s in self._table]
        every += [s for found in self._by_site.values() for s in found]
        for s in {s.where: s for s in every}.values():
            for word in s.wrong:
                yield Hit(
                    f"the suppression names {word!r}, which is no rule",
                    "fxlora lint --list-rules names them", subject=s.where,
                )  # fmt: skip
            ran = s.rules is None or bool(s.rules & active)
            if s.where not in self._used and ran and not (s.wrong and not s.rules):
                what = "every rule" if s.rules is None else ", ".join(sorted(s.rules))
                yield Hit(
                    f"the suppression of {what} held nothing back", "take it away",
                    subject=s.where,
                )  # fmt: skip


def _ids(words: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    ids: set[str] = set()
    wrong = []
    for word in words:
        try:
            ids |= {r.id for r in selected(word)}
        except ConfigError:
            wrong.append(word)
    return frozenset(ids), tuple(wrong)


def _comments(context: Context, site: Site) -> Iterator[Suppression]:
    for file, line in _lines(context, site):
        found = _COMMENT.search(linecache.getline(file, line))
        if found is None:
            continue
        where = f"{short_file(file)}:{line}"
        if found[1] is None:
            yield Suppression(where, None)
        else:
            words = tuple(w for w in (p.strip() for p in found[1].split(",")) if w)
            ids, wrong = _ids(words)
            yield Suppression(where, ids, wrong)


def _lines(context: Context, site: Site) -> Iterator[tuple[str, int]]:
    """Yields the lines a comment may stand on: of the calls, and of the layer's definition."""
    for call in site.calls:
        source = call.node.meta.get("source")
        if source is not None:
            yield source.file, source.line
    defined = definition(info(context.traced).model, site.name)
    if defined is not None:
        file, first, last = defined
        for line in range(first, last + 1):
            yield file, line


# ---- where a site is -----------------------------------------------------------------------------


def place(context: Context, site: Site) -> Place | None:
    """Returns the line that calls a site, else the one that defines it."""
    files = _files(frozenset(type(m) for m in context.model.modules()))
    # Of a call without code of the model's own, such as nn.Sequential's, the line is the trace's.
    lines = [c.node.meta["source"] for c in site.calls if "source" in c.node.meta]
    source = next((s for s in lines if s.file in files), None)
    defined = definition(info(context.traced).model, site.name)
    # A bare parameter is multiplied in a helper many models share; its own line says more.
    if source is None or (site.kind == "Parameter" and defined is not None):
        return None if defined is None else Place(short_file(defined[0]), defined[1], "__init__")
    return Place(short_file(source.file), source.line, source.function)


def short_file(file: str) -> str:
    """Returns a file's name without the machine's folders: below the package, or the project."""
    file = file.replace("\\", "/")
    if "site-packages/" in file:
        return file.rpartition("site-packages/")[2]
    try:
        return Path(file).resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return file.rpartition("/")[2]


@lru_cache(maxsize=16)
def _files(classes: frozenset[type]) -> frozenset[str]:
    """Returns the files the classes of a model are written in, those of torch left out."""
    found = set()
    for cls in (c for made in classes for c in made.__mro__):
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            found.add(inspect.getsourcefile(cls))
        except (OSError, TypeError):
            continue
    return frozenset(f for f in found if f is not None)
