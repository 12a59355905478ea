"""The linter's words: a rule, what one check found, a folded finding, and the report of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fxlora.html import Printed


class Severity(IntEnum):
    """How bad a finding is; the names are SARIF's levels.

    >>> Severity.ERROR > Severity.WARNING > Severity.NOTE, str(Severity.NOTE)
    (True, 'note')
    """

    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class Hit:
    """One thing a check found, before suppressions and folding.

    Attributes:
        message: what is wrong, without the site's name.
        fix: what to change.
        site: the name of the culprit site; "" when it is about the configuration.
        subject: what it is about otherwise: an entry, a key, a module.
    """

    message: str
    fix: str
    site: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Rule:
    """One rule and everything its page says.

    Attributes:
        id: stable, such as `FXL201`; the hundreds are the subject.
        name: the same in words, such as `bypassed-adapter`.
        severity: of its findings, unless the settings say otherwise.
        check: takes the context of a run and yields hits.
        finds: what it finds, in one sentence.
        why: why that matters.
        example: Python that triggers it: it ends in `report = lint(...)`.
        fix: what to do.
        threads: public threads, as `owner/repository#number`.
        on: whether it runs when nothing is selected.
        needs: the option without which it has nothing to say; "" for most.
    """

    id: str
    name: str
    severity: Severity
    check: Callable[[Any], Iterator[Hit]]
    finds: str
    why: str
    example: str
    fix: str
    threads: tuple[str, ...] = ()
    on: bool = True
    needs: str = ""


@dataclass(frozen=True)
class Place:
    """A line of the model's own code, without the machine's folders."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        inside = f" in {self.function}" if self.function else ""
        return f"{self.file}:{self.line}{inside}"


@dataclass(frozen=True)
class Finding:
    """What is reported: equal hits of repeated layers are one finding.

    Attributes:
        rule: the rule's id.
        name: the rule's name.
        severity: as the settings have it.
        where: the site, with its layer indices left open where it stands for several; else the
            subject.
        message: what is wrong.
        fix: what to change.
        sites: the culprit sites.
        place: the line of the model's code that calls the first of them.
    """

    rule: str
    name: str
    severity: Severity
    where: str
    message: str
    fix: str
    sites: tuple[str, ...] = ()
    place: Place | None = None

    def __str__(self) -> str:
        times = f" (x{len(self.sites)})" if len(self.sites) > 1 else ""
        # A message about an entry quotes it already.
        said = not self.sites and repr(self.where) in self.message
        where = "" if said or not self.where else f"{self.where}{times}: "
        return f"{self.rule} {self.name}: {where}{self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the finding as plain data."""
        place = self.place
        return {
            "rule": self.rule,
            "name": self.name,
            "severity": str(self.severity),
            "where": self.where,
            "message": self.message,
            "fix": self.fix,
            "sites": list(self.sites),
            "file": place.file if place else None,
            "line": place.line if place else None,
        }


@dataclass(frozen=True)
class Report(Printed):
    """Everything one run found, worst first; iterates over its findings and prints them.

    Attributes:
        findings: the findings.
        rules: the rules that ran.
        model_class: the class of the model.
        suppressed: how many hits a suppression held back.
    """

    findings: tuple[Finding, ...]
    rules: tuple[Rule, ...]
    model_class: str
    suppressed: int = 0

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def count(self, severity: Severity) -> int:
        """Returns how many findings have a severity."""
        return sum(f.severity == severity for f in self.findings)

    def fails(self, fail_on: Severity | None) -> bool:
        """Says whether a finding is at least as severe as `fail_on`; None never fails."""
        return fail_on is not None and any(f.severity >= fail_on for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "model": self.model_class,
            "findings": [f.to_dict() for f in self.findings],
            "counts": {str(s): self.count(s) for s in sorted(Severity, reverse=True)},
            "suppressed": self.suppressed,
            "rules": [r.id for r in self.rules],
        }

    def sarif(self) -> dict[str, Any]:
        """Returns the report as a SARIF 2.1.0 log, for code scanning services."""
        from fxlora.lint.formats import sarif

        return sarif(self)

    def _parts(self) -> Iterable[str]:
        from fxlora.lint.formats import text

        return text(self).split("\n")


def open_name(name: str) -> str:
    """Returns a name with its layer indices left open.

    >>> open_name("model.layers.3.mlp.gate"), open_name("0")
    ('model.layers.*.mlp.gate', '0')
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
