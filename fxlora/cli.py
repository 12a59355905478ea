"""The command line: `fxlora plan | draw | compare | lint | check`, the outermost layer."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fxlora.errors import FxloraError, NoMatchError

EXIT_OK, EXIT_DIFFERS, EXIT_USAGE, EXIT_ERROR = 0, 1, 2, 3

_DESCRIPTION = """\
What a LoRA configuration does to a model, before a weight is loaded.

MODEL is one of
  config.json          a transformers config, or a directory that holds one
  llama                a transformers model type, with its default config
  package.module:make  a callable that returns a torch.nn.Module (or the module itself)
"""

_EPILOG = """\
examples
  fxlora plan llama -r 16 -t q_proj,k_proj,v_proj,o_proj
  fxlora plan path/to/config.json -t all-linear --explain model.layers.3.mlp.gate_proj
  fxlora draw llama -t all-linear -o lora.svg
  fxlora compare mymodels:tiny -t 0,2 --json
  fxlora lint llama -r 16 -t all-linear --format sarif -o lora.sarif
  fxlora check path/to/adapter --base llama

exit codes
  0  done (compare: the two sides are equal; lint: nothing found; check: the adapter fits)
  1  compare: they differ; lint: a finding at or above --fail-on; check: it does not fit
  2  the command line, the configuration or the model is wrong; the message says how
  3  the model cannot be traced, or peft refused it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.

    Returns:
        The exit code: 0 done, 1 differs or found, 2 a wrong argument, 3 a model that cannot be
        followed.
    """
    arguments = _parser().parse_args(argv)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries; ours are part of what is printed
    try:
        return int(arguments.run(arguments))
    except FxloraError as e:
        return _failed(e, arguments)
    except BrokenPipeError:
        return EXIT_OK


def _failed(error: FxloraError, arguments: argparse.Namespace) -> int:
    from fxlora.errors import CheckpointError, ConfigError, ModelSpecError

    if arguments.json or getattr(arguments, "format", None) == "json":
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    print(f"fxlora: {error}", file=sys.stderr)
    return (
        EXIT_USAGE
        if isinstance(error, (CheckpointError, ConfigError, ModelSpecError))
        else EXIT_ERROR
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxlora",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from fxlora import __version__

    parser.add_argument("--version", action="version", version=f"fxlora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("plan", _plan, "a verdict and a reason for every linear site; nothing is changed"),
        ("draw", _draw, "before and after as a picture, requires_grad on every node"),
        ("compare", _compare, "the rewritten graph against what peft makes of the model"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"fxlora {name}: {text}.\n\n{_DESCRIPTION}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        _add_config(command)
        command.set_defaults(run=run)
        if name == "plan":
            command.add_argument("--explain", metavar="NAME", help="everything about one site")
            command.add_argument(
                "--effects", action="store_true",
                help="whether each adapter's gradient arrives: live, bypassed, inert, cut, dead",
            )  # fmt: skip
        if name == "draw":
            command.add_argument(
                "-o", "--output", default="lora.svg", metavar="FILE",
                help="by its suffix: .svg .dot .html .png .pdf (default: lora.svg)",
            )  # fmt: skip
    _add_lint(commands)
    _add_check(commands)
    return parser


def _add_lint(commands: Any) -> None:
    text = "what goes wrong later with this configuration, before a GPU hour is spent"
    command = commands.add_parser(
        "lint", help=text, description=f"fxlora lint: {text}.\n\n{_DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_config(command, optional=True)
    add = command.add_argument
    add("--select", metavar="RULES", help="ids, names, starts of ids (FXL2), DEFAULT or ALL; comma-separated")  # fmt: skip
    add("--ignore", metavar="RULES", help="the same, of rules that do not run")
    add("--severity", metavar="RULE=LEVEL", action="append", help="error, warning or note; may be given again")  # fmt: skip
    add("--fail-on", metavar="LEVEL", choices=("error", "warning", "note", "never"), help="exit with 1 from this severity on (default: warning)")  # fmt: skip
    add("--format", choices=("text", "json", "sarif"), help="default: text")
    add("-o", "--output", metavar="FILE", help="write the report there instead of printing it")
    add("--settings", metavar="FILE", help="a .toml or .json file (default: fxlora.toml or pyproject.toml, from here up)")  # fmt: skip
    add("--gradient-checkpointing", choices=("none", "reentrant", "non-reentrant"), help="how the training checkpoints its blocks")  # fmt: skip
    add("--input-require-grads", action="store_true", default=None, help="the training calls model.enable_input_require_grads()")  # fmt: skip
    add("--dtype", metavar="DTYPE", help="what merged weights are stored in: bfloat16, float16 or float32")  # fmt: skip
    add("--trained-b", type=float, metavar="RMS", help="size of a trained lora_B, for the merge drift (default: 0.01)")  # fmt: skip
    add("--serve", metavar="ENGINE", help="the serving engine: vllm")
    add("--max-lora-rank", type=int, metavar="N", help="its largest rank (default: 16)")
    add("--explain-rule", metavar="RULE", help="print the page of a rule")
    add("--list-rules", action="store_true", help="print every rule")
    command.set_defaults(run=_lint)


def _add_check(commands: Any) -> None:
    text = "which tensor of a peft adapter directory lands on which site of a model"
    command = commands.add_parser(
        "check", help=text, description=f"fxlora check: {text}; nothing is loaded.\n\n{_DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER_DIR", help="a folder as peft's save_pretrained leaves it")  # fmt: skip
    command.add_argument("--base", required=True, metavar="MODEL", help="the model, named as above")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_check)


def _add_config(command: argparse.ArgumentParser, optional: bool = False) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", nargs="?" if optional else None, help="a config file or directory, a model type, module:callable")  # fmt: skip
    add("-t", "--target-modules", metavar="NAMES", help="comma-separated names or suffixes, all-linear, or a regex with --regex")  # fmt: skip
    add("--regex", action="store_true", help="read --target-modules as one regular expression")
    add("-r", "--rank", type=int, default=None, help="rank (default: 8)")
    add("-a", "--alpha", type=float, default=None, help="lora_alpha (default: 8, as peft)")
    add("--dropout", type=float, default=None, help="lora_dropout (default: 0)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    add("--exclude-modules", metavar="NAMES", help="comma-separated names or suffixes")
    add("--layers", metavar="INDICES", help="layers_to_transform, such as 0,1,8-11")
    add("--bias", default=None, choices=("none", "all", "lora_only"), help="which biases train")
    add("--target-parameters", metavar="NAMES", help="comma-separated parameter names")
    add("--modules-to-save", metavar="NAMES", help="comma-separated modules trained as a whole")
    add("--dora", action="store_true", help="use_dora")
    add("--init", metavar="HOW", default=None, help="init_lora_weights, such as pissa or gaussian")
    add("--task-type", metavar="TYPE", help="peft's task type, such as CAUSAL_LM or SEQ_CLS")
    add("--config", metavar="FILE", help="a peft adapter_config.json instead of the flags above")
    add("--json", action="store_true", help="print JSON")


# ---- arguments to values -----------------------------------------------------------------------


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [n.strip() for n in text.split(",") if n.strip()]


def layers(text: str | None) -> list[int] | None:
    """Returns layer indices from text.

    >>> layers("0,2-4")
    [0, 2, 3, 4]
    """
    from fxlora.errors import ConfigError

    if text is None:
        return None
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            out += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigError(
                f"--layers {text!r}: {part!r} is no index and no range; write 0,1,8-11"
            ) from None
    return out


# What --config already says, by attribute and option.
_SAID_BY_CONFIG = {
    "target_modules": "-t", "regex": "--regex", "rank": "-r", "alpha": "-a", "dropout": "--dropout",
    "rslora": "--rslora", "exclude_modules": "--exclude-modules", "layers": "--layers",
    "bias": "--bias", "target_parameters": "--target-parameters",
    "modules_to_save": "--modules-to-save", "dora": "--dora", "init": "--init",
    "task_type": "--task-type",
}  # fmt: skip


def _config(a: argparse.Namespace) -> Any:
    from peft import LoraConfig

    from fxlora.errors import ConfigError

    if a.config is not None:
        # Not `in (None, False)`: a dropout of 0.0 is equal to False, and was given.
        values = {option: getattr(a, name) for name, option in _SAID_BY_CONFIG.items()}
        given = [o for o, v in values.items() if v is not None and v is not False]
        if given:
            raise ConfigError(
                f"--config {a.config} and {', '.join(given)}: the file says all of it. Leave "
                f"{'it' if len(given) == 1 else 'them'} out, or change the file"
            )
        return _config_file(a.config)
    targets: Any = a.target_modules
    if targets is not None and not a.regex and targets.lower() != "all-linear":
        targets = _names(targets)
    try:
        return LoraConfig(
            r=8 if a.rank is None else a.rank,
            lora_alpha=8 if a.alpha is None else int(a.alpha) if a.alpha.is_integer() else a.alpha,
            lora_dropout=0.0 if a.dropout is None else a.dropout,
            use_rslora=a.rslora,
            target_modules=targets,
            exclude_modules=_names(a.exclude_modules),
            layers_to_transform=layers(a.layers),
            target_parameters=_names(a.target_parameters),
            bias="none" if a.bias is None else a.bias,
            task_type=a.task_type,
            modules_to_save=_names(a.modules_to_save),
            use_dora=a.dora,
            init_lora_weights=True if a.init is None else a.init,
        )
    except (ValueError, TypeError) as e:
        raise ConfigError(str(e)) from None


def _config_file(path: str) -> Any:
    import dataclasses
    from pathlib import Path

    from peft import LoraConfig

    from fxlora.errors import ConfigError

    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"--config {path}: not a readable JSON file: {e}") from None
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"--config {path}: peft's LoraConfig has no field {unknown[0]!r}")
    settings["inference_mode"] = False  # a saved config says True; the question is training
    settings.pop("auto_mapping", None)
    try:
        return LoraConfig(**settings)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"--config {path}: {e}") from None


def _inputs(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from fxlora.errors import TraceError
    from fxlora.example_inputs import for_model

    try:
        return for_model(model, (), None)
    except TraceError:
        return (), {}


def _build(spec: str) -> Any:
    """Builds the model, and says whose fault it is when the user's own code raises."""
    from fxlora import models
    from fxlora.errors import ModelSpecError

    try:
        return models.build(spec)
    except FxloraError:
        raise
    except Exception as e:
        where = _last_line(e)
        raise ModelSpecError(f"{spec!r} raised {type(e).__name__}{where}: {e}") from e


def _last_line(error: Exception) -> str:
    """Returns the file and line that raised, without the machine's folders."""
    import traceback
    from pathlib import Path

    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


# ---- commands ----------------------------------------------------------------------------------


def _planned(a: argparse.Namespace) -> tuple[Any, Any]:
    import fxlora

    config = _config(a)
    model = _build(a.model)
    traced = fxlora.trace(model, *_inputs(model))
    return traced, fxlora.plan(traced, config)


def _plan(a: argparse.Namespace) -> int:
    from fxlora.facts import info
    from fxlora.plan import describe

    traced, plan = _planned(a)
    if a.explain is not None:
        try:
            site = plan[a.explain]
        except KeyError as e:
            raise NoMatchError(f"--explain {e.args[0]}") from None
        print(json.dumps(site.to_dict(), indent=2) if a.json else describe(site))
        return EXIT_OK
    found = None
    if a.effects:
        import fxlora

        found = fxlora.effects(fxlora.rewrite(traced, plan))
    if a.json:
        facts = info(traced)
        out = plan.to_dict()
        if found is not None:
            out["effects"] = [e.to_dict() for e in found]
        out["trace"] = {"sizes": facts.sizes, "guards": facts.guards, "notes": facts.notes}
        print(json.dumps(out, indent=2))
    else:
        print(plan)
        if found is not None:
            print(f"\n{found}")
    return EXIT_OK


def _draw(a: argparse.Namespace) -> int:
    import fxlora

    try:
        import fxlora_viz
    except ImportError as e:
        raise FxloraError(f"drawing needs the fxlora_viz package: {e}") from e
    traced, plan = _planned(a)
    lora = fxlora.rewrite(traced, plan)
    try:
        fxlora_viz.draw(traced, lora).save(a.output)
    except (ValueError, OSError, RuntimeError) as e:
        raise FxloraError(f"{a.output}: {e}") from e
    if a.json:
        print(json.dumps({"output": a.output, **plan.to_dict()}, indent=2))
    else:
        from fxlora.report import headline

        print(f"{a.output}: {plan.model_class}, {headline(plan)}")
    return EXIT_OK


def _compare(a: argparse.Namespace) -> int:
    import fxlora

    config = _config(a)
    model = _build(a.model)
    args, kwargs = _inputs(model)
    try:
        result = fxlora.compare(model, config, args, kwargs)
    except FxloraError:
        raise
    except Exception as e:
        raise FxloraError(f"peft refused this: {type(e).__name__}: {e}") from e
    print(json.dumps(result.to_dict(), indent=2) if a.json else result)
    return EXIT_OK if result.equal else EXIT_DIFFERS


def _lint(a: argparse.Namespace) -> int:
    from fxlora.errors import ConfigError, ModelSpecError
    from fxlora.lint.catalog import rule
    from fxlora.lint.formats import written
    from fxlora.lint.pages import listing, page
    from fxlora.lint.run import lint

    if a.list_rules:
        print(listing())
        return EXIT_OK
    if a.explain_rule is not None:
        print(page(rule(a.explain_rule)))
        return EXIT_OK
    if a.model is None:
        raise ModelSpecError("fxlora lint needs a MODEL, --explain-rule RULE or --list-rules")
    if a.json and a.format not in (None, "json"):
        raise ConfigError(f"--json and --format {a.format}: say one of them")
    settings, config = _lint_settings(a), _config(a)
    import fxlora

    model = _build(a.model)
    report = lint(fxlora.trace(model, *_inputs(model)), config, settings)
    form = "json" if a.json else a.format or "text"
    text = written(report, form, _artifact(a))
    if a.output is None:
        print(text)
    else:
        _write_whole(a.output, f"{text}\n")
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
    select, ignore = _names(a.select), _names(a.ignore)
    changes = {
        "select": None if select is None else tuple(select),
        "ignore": None if ignore is None else tuple(ignore),
        "severity": severity or None,
        "fail_on": a.fail_on,
    }
    names = ("gradient_checkpointing", "input_require_grads", "dtype", "trained_b", "serve")
    options = {name: getattr(a, name) for name in (*names, "max_lora_rank")}
    return overridden(found or Settings(), changes, options)


def _write_whole(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    import os
    from pathlib import Path

    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as e:
        raise FxloraError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _check(a: argparse.Namespace) -> int:
    import fxlora
    from fxlora.check import check_tensors
    from fxlora.checkpoint import find, read_config, read_shapes

    folder = find(a.adapter)
    config, shapes = read_config(folder), read_shapes(folder)
    model = _build(a.base)
    lora = fxlora.rewrite(fxlora.trace(model, *_inputs(model)), config)
    report = check_tensors(lora, "default", shapes, config)
    if a.json:
        print(json.dumps(report.to_dict(), indent=2))
        return EXIT_OK if report.fits else EXIT_DIFFERS
    for row in report.rows:
        if row.status == "fits":
            print(f"{row.key} -> {row.name}")
    print(f"{folder}: {report}")
    return EXIT_OK if report.fits else EXIT_DIFFERS


if __name__ == "__main__":
    sys.exit(main())
