"""The page of a rule: what it finds, why it matters, an example, the fix, the threads."""

from __future__ import annotations

from fxlora.lint.catalog import RULES, SUBJECTS
from fxlora.lint.finding import Rule

HEADER = """\
from collections import OrderedDict

import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora.lint import Options, Settings, lint
"""


def page(rule: Rule) -> str:
    """Returns the page of a rule as Markdown."""
    state = f"severity {rule.severity}" + ("" if rule.on else ", off unless selected")
    if rule.needs:
        state += f", silent without `--{rule.needs.replace('_', '-')}`"
    lines = [
        f"# {rule.id} {rule.name}",
        "",
        f"*{state}*",
        "",
        "## What it finds",
        "",
        rule.finds,
        "",
        "## Why it matters",
        "",
        rule.why,
        "",
        "## An example that triggers it",
        "",
        "```python",
        HEADER,
        rule.example,
        "```",
        "",
        "## The fix",
        "",
        rule.fix,
        "",
    ]
    if rule.threads:
        lines += ["## Threads", "", *(f"- [{t}]({_link(t)})" for t in rule.threads), ""]
    return "\n".join(lines)


def _link(thread: str) -> str:
    repository, _, number = thread.partition("#")
    return f"https://github.com/{repository}/issues/{number}"


def index() -> str:
    """Returns the table of all rules as Markdown."""
    lines = []
    for digit, subject in SUBJECTS.items():
        lines += [
            f"### {digit}xx {subject}",
            "",
            "| rule | severity | what it finds |",
            "|---|---|---|",
        ]
        for r in RULES:
            if r.id[3] == digit:
                off = "" if r.on else ", off"
                finds = r.finds.replace("|", "\\|").replace("(../", "(")
                lines.append(f"| [{r.id}](lint/{r.id}.md) {r.name} | {r.severity}{off} | {finds} |")
        lines.append("")
    return "\n".join(lines)


def listing() -> str:
    """Returns the rules as plain text, one a line."""
    rows = []
    for r in RULES:
        state = str(r.severity) if r.on else f"{r.severity}, off"
        if r.needs:
            state += f", with --{r.needs.replace('_', '-')}"
        rows.append((r.id, r.name, state))
    width = max(len(n) for _, n, _ in rows)
    return "\n".join(f"{i}  {n.ljust(width)}  {s}" for i, n, s in rows)
