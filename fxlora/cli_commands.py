"""The commands: each takes the arguments, prints, and returns the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fxlora.cli_values import SAID_BY_CONFIG, build, config_of, given, names, planned, refuse
from fxlora.errors import FxloraError, UsageError

_CONFIG = {**SAID_BY_CONFIG, "config": "--config"}
# What says which layers a configuration is about.
_NAMING = {"target_modules": "-t", "target_parameters": "--target-parameters", "config": "--config"}
# What a lint run takes, and a page about its rules does not.
_LINT = {
    "model": "MODEL", "architecture": "--architecture", **_CONFIG, "json": "--json",
    "select": "--select", "ignore": "--ignore", "severity": "--severity", "fail_on": "--fail-on",
    "format": "--format", "output": "-o", "settings": "--settings",
    "gradient_checkpointing": "--gradient-checkpointing",
    "input_require_grads": "--input-require-grads", "dtype": "--dtype",
    "trained_b": "--trained-b", "serve": "--serve", "max_lora_rank": "--max-lora-rank",
}  # fmt: skip

EXIT_OK, EXIT_DIFFERS, EXIT_USAGE, EXIT_ERROR = 0, 1, 2, 3


def run_plan(a: argparse.Namespace) -> int:
    """Prints a plan, or the answer to a question about one."""
    questions = {"explain": "--explain", "effects": "--effects", "cover": "--cover"}
    if a.choose is not None:
        unused = {**_CONFIG, "reach": "--reach", **questions}
        refuse(a, unused, "--choose", "it looks for the targets itself")
        return _choose(a)
    if a.explain is not None:
        del questions["explain"]
        refuse(a, questions, "--explain", "it answers one question")
    further = a.explain is not None or a.effects or a.cover or a.json
    traced, plan = planned(a, whole=further)
    if a.explain is not None:
        from fxlora.explain import explain_dict, explain_text

        if a.json:
            print(json.dumps(explain_dict(traced, plan, a.explain), indent=2))
        else:
            print(explain_text(traced, plan, a.explain))
        return EXIT_OK
    effects = covered = None
    if a.effects:
        import fxlora

        effects = fxlora.effects(fxlora.rewrite(traced, plan))
    if a.cover:
        from fxlora.coverage import coverage

        covered = coverage(traced, plan)
    if a.json:
        _print_plan_json(traced, plan, effects, covered)
        return EXIT_OK
    print(plan)
    if effects is not None:
        print(f"\n{effects}")
    if covered is not None:
        print(f"\n{covered.text(ascii_only=not _takes_blocks())}")
    elif plan.targets:
        from fxlora.fused import fused_advice

        for note in fused_advice(traced, plan):
            if "match nothing" not in note:  # the warnings above say that
                print(f"note: {note}")
    return EXIT_OK


def _print_plan_json(traced: Any, plan: Any, effects: Any, covered: Any) -> None:
    from fxlora.facts import info

    facts = info(traced)
    out = plan.to_dict()
    if effects is not None:
        out["effects"] = [e.to_dict() for e in effects]
    if covered is not None:
        out["coverage"] = covered.to_dict()
    out["trace"] = {"sizes": facts.sizes, "guards": facts.guards, "notes": facts.notes}
    print(json.dumps(out, indent=2))


def _takes_blocks() -> bool:
    """Says whether the terminal can print the signs of a bar."""
    try:
        "█▒░".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _choose(a: argparse.Namespace) -> int:
    import fxlora
    from fxlora.choose import choose

    model, (args, kwargs) = build(a.model, architecture=a.architecture)
    choice = choose(fxlora.trace(model, args, kwargs), a.choose)
    print(json.dumps(choice.to_dict(), indent=2) if a.json else choice)
    return EXIT_OK if choice.exact else EXIT_DIFFERS


def run_draw(a: argparse.Namespace) -> int:
    """Writes a picture."""
    import fxlora

    try:
        import fxlora_viz
    except ImportError as e:
        raise FxloraError(f"drawing needs the fxlora_viz package: {e}") from e
    columns = a.columns.split(",")
    if columns not in (["before"], ["after"], ["before", "after"]):
        raise UsageError(f"--columns {a.columns!r} is none of before, after and before,after")
    try:
        fxlora_viz.files.suffix_of(a.output)  # before a large model is traced
        options = fxlora_viz.Options(
            depth=a.depth, fold=not a.unfolded, focus=a.focus, detail=a.detail,
            direction=a.direction, theme=a.theme, engine=a.engine,
        )  # fmt: skip
    except ValueError as e:
        raise UsageError(str(e)) from e
    traced, plan = planned(a)
    graphs = {"before": traced, "after": fxlora.rewrite(traced, plan)}
    first, second = graphs[columns[0]], graphs[columns[1]] if columns[1:] else None
    try:
        fxlora_viz.draw(first, second, options).save(a.output)
    except ValueError as e:  # a module that is not there, a sheet nobody could read
        raise UsageError(str(e)) from e
    except OSError as e:
        raise _unwritable(a.output, e) from None
    except RuntimeError as e:  # no engine
        raise FxloraError(f"{a.output}: {e}") from e
    if a.json:
        print(json.dumps({"output": a.output, **plan.to_dict()}, indent=2))
    else:
        from fxlora.report import headline

        print(f"{a.output}: {plan.model_class}, {headline(plan)}")
    return EXIT_OK


def run_compare(a: argparse.Namespace) -> int:
    """Prints a comparison with peft."""
    import fxlora

    config = config_of(a)
    model, (args, kwargs) = build(a.model, architecture=a.architecture)
    try:
        result = fxlora.compare(model, config, args, kwargs)
    except FxloraError:
        raise
    except Exception as e:
        raise FxloraError(f"peft refused this: {type(e).__name__}: {e}") from e
    print(json.dumps(result.to_dict(), indent=2) if a.json else result)
    return EXIT_OK if result.equal else EXIT_DIFFERS


def run_lint(a: argparse.Namespace) -> int:
    """Prints or writes what the linter finds."""
    from fxlora.errors import ConfigError, ModelSpecError
    from fxlora.lint.catalog import rule
    from fxlora.lint.formats import written
    from fxlora.lint.pages import listing, page
    from fxlora.lint.run import lint

    if a.list_rules:
        unused = {**_LINT, "explain_rule": "--explain-rule"}
        refuse(a, unused, "--list-rules", "it lists the rules there are")
        print(listing())
        return EXIT_OK
    if a.explain_rule is not None:
        refuse(a, _LINT, "--explain-rule", "it prints the page of a rule")
        print(page(rule(a.explain_rule)))
        return EXIT_OK
    if a.model is None:
        raise ModelSpecError("fxlora lint needs a MODEL, --explain-rule RULE or --list-rules")
    if a.json and a.format not in (None, "json"):
        raise ConfigError(f"--json and --format {a.format}: say one of them")
    settings, config = _lint_settings(a), config_of(a)
    import fxlora

    model, (args, kwargs) = build(a.model, architecture=a.architecture)
    report = lint(fxlora.trace(model, args, kwargs), config, settings)
    form = "json" if a.json else a.format or "text"
    text = written(report, form, _artifact(a))
    if a.output is None:
        print(text)
    else:
        _write(a.output, f"{text}\n")
        print(f"{a.output}: {str(report).splitlines()[-1]}", file=sys.stderr)
    return EXIT_DIFFERS if report.fails(settings.threshold) else EXIT_OK


def _artifact(a: argparse.Namespace) -> str:
    """Returns the file a finding without a line of code is about, as it was given."""
    import os

    files = [p for p in (a.config, a.model) if p is not None and os.path.isfile(p)]
    return os.path.relpath(files[0]).replace(os.sep, "/") if files else ""


def _lint_settings(a: argparse.Namespace) -> Any:
    from pathlib import Path

    from fxlora.errors import ConfigError
    from fxlora.lint.settings import Settings, discover, load, overridden

    found = discover(Path.cwd()) if a.settings is None else load(a.settings)
    severity = {}
    for pair in a.severity or ():
        name, equals, level = pair.partition("=")
        if not equals:
            raise ConfigError(f"--severity {pair!r}: write RULE=LEVEL, such as FXL201=warning")
        severity[name] = level
    # An empty --ignore takes back what the file of settings says.
    select, ignore = names(a.select, "--select"), names(a.ignore)
    changes = {
        "select": None if select is None else tuple(select),
        "ignore": None if ignore is None else tuple(ignore),
        "severity": severity or None,
        "fail_on": a.fail_on,
    }
    said = ("gradient_checkpointing", "input_require_grads", "dtype", "trained_b", "serve")
    options = {name: getattr(a, name) for name in (*said, "max_lora_rank")}
    return overridden(found or Settings(), changes, options)


def _write(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    from fxlora.writing import write_whole

    try:
        write_whole(path, text.encode())
    except OSError as e:
        raise _unwritable(path, e) from None


def _unwritable(path: str, error: OSError) -> UsageError:
    from pathlib import Path

    folder = Path(path).parent
    try:
        why = "" if folder.is_dir() else f": there is no folder {str(folder)!r}"
    except OSError:
        why = ""
    return UsageError(f"-o {path!r} cannot be written: {error.strerror or error}{why}")


def run_memory(a: argparse.Namespace) -> int:
    """Prints what a training step holds."""
    from fxlora.memory import at_sizes, sweep_text
    from fxlora.memory_sweep import configured, sweep

    alone = a.sweep and not given(a, _NAMING)
    if alone:
        others = {k: v for k, v in {**SAID_BY_CONFIG, "reach": "--reach"}.items() if k != "rank"}
        why = "the configurations it compares take -r alone, and yours needs -t"
        refuse(a, others, "--sweep without -t", why)
    config = config_of(a)
    model, (args, kwargs) = build(a.model, a.dtype, a.architecture)
    import fxlora

    traced = fxlora.trace(model, args, kwargs)
    args, kwargs = at_sizes(traced, args, kwargs, batch=a.batch, length=a.length)
    reach = names(a.reach, "--reach") or ()
    found = []
    if not alone:
        mark = "yours: " if a.sweep else ""
        found = [configured(traced, config, reach, args, kwargs, a.optimizer, mark)]
    if a.sweep:
        found += sweep(traced, config, args, kwargs, a.optimizer)
    if a.json:
        print(json.dumps([m.to_dict() for m in found], indent=2))
    else:
        print(sweep_text(found) if a.sweep else found[0])
    return EXIT_OK


def run_check(a: argparse.Namespace) -> int:
    """Prints which tensor of an adapter lands where."""
    import fxlora
    from fxlora.check import check_tensors
    from fxlora.checkpoint import find, read_config, read_reach, read_shapes

    folder = find(a.adapter)
    config, shapes = read_config(folder), read_shapes(folder)
    model, (args, kwargs) = build(a.base, architecture=a.architecture)
    traced = fxlora.trace(model, args, kwargs)
    lora = fxlora.rewrite(traced, config, reach=read_reach(folder))
    report = check_tensors(lora, "default", shapes, config)
    if a.json:
        print(json.dumps(report.to_dict(), indent=2))
        return EXIT_OK if report.fits else EXIT_DIFFERS
    for row in report.rows:
        if row.status == "fits":
            print(f"{row.key} -> {row.name}")
    print(f"{folder}: {report}")
    return EXIT_OK if report.fits else EXIT_DIFFERS
