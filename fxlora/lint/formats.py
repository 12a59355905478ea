"""A report as text, as JSON and as SARIF 2.1.0."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fxlora.lint.finding import Severity
from fxlora.text import count

if TYPE_CHECKING:
    from fxlora.lint.finding import Finding, Report, Rule

FORMATS = ("text", "json", "sarif")


def written(report: Report, form: str, artifact: str = "") -> str:
    """Returns a report in one of `FORMATS`.

    Args:
        report: the report.
        form: the format.
        artifact: for SARIF, the file findings without a line of code are about.
    """
    if form == "json":
        return json.dumps(report.to_dict(), indent=2)
    if form == "sarif":
        return json.dumps(sarif(report, artifact), indent=2)
    return text(report)


def text(report: Report) -> str:
    """Returns a report for a terminal: two or three lines a finding, and a summary."""
    lines: list[str] = []
    for f in report:
        lines.append(f"{f.severity}: {f}")
        if f.fix:
            lines.append(f"  fix: {f.fix}")
        if f.place is not None:
            lines.append(f"  at {f.place}")
        lines.append("")
    return "\n".join([*lines, _summary(report)])


def _summary(report: Report) -> str:
    held = f"; {report.suppressed} suppressed" if report.suppressed else ""
    if not len(report):
        return f"{report.model_class}: no findings ({count(len(report.rules), 'rule')}{held})"
    parts = [
        count(report.count(s), str(s)) for s in sorted(Severity, reverse=True) if report.count(s)
    ]
    return f"{report.model_class}: {', '.join(parts)}{held}"


# ---- SARIF -------------------------------------------------------------------------------------

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report, artifact: str = "") -> dict[str, Any]:
    """Returns a SARIF 2.1.0 log with one run (OASIS, sections 3.14 to 3.28)."""
    from fxlora import __version__

    rules = {r.id: i for i, r in enumerate(report.rules)}
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "fxlora",
                        "version": __version__,
                        "rules": [_descriptor(r) for r in report.rules],
                    }
                },
                "results": [_result(f, rules[f.rule], artifact) for f in report],
                "columnKind": "unicodeCodePoints",
            }
        ],
    }


def _descriptor(r: Rule) -> dict[str, Any]:
    from fxlora.lint.pages import page

    return {
        "id": r.id,
        "name": r.name,
        "shortDescription": {"text": r.name.replace("-", " ")},
        "fullDescription": {"text": r.finds},
        "help": {"text": r.fix, "markdown": page(r)},
        "defaultConfiguration": {"level": str(r.severity), "enabled": r.on},
    }


def _result(f: Finding, index: int, artifact: str) -> dict[str, Any]:
    message = str(f).partition(": ")[2]
    result: dict[str, Any] = {
        "ruleId": f.rule,
        "ruleIndex": index,
        "level": str(f.severity),
        "message": {"text": f"{message}. Fix: {f.fix}" if f.fix else message},
        "partialFingerprints": {"fxlora/v1": _fingerprint(f)},
    }
    location = _location(f, artifact)
    if location:
        result["locations"] = [location]
    return result


def _location(f: Finding, artifact: str) -> dict[str, Any]:
    location: dict[str, Any] = {}
    if f.place is not None:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": quote(f.place.file)},
            "region": {"startLine": f.place.line},
        }
    elif artifact:
        location["physicalLocation"] = {"artifactLocation": {"uri": quote(artifact)}}
    if f.sites:
        location["logicalLocations"] = [
            {"fullyQualifiedName": s, "name": s.rpartition(".")[2], "kind": "member"}
            for s in f.sites
        ]
    return location


def _fingerprint(f: Finding) -> str:
    # Of what stays the same when lines move: the rule, the layer, what is wrong.
    words = "\n".join((f.rule, f.where, f.message))
    return hashlib.sha256(words.encode()).hexdigest()[:32]
