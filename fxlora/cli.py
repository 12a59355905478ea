"""The command line: `fxlora plan | draw | compare | check`, the outermost layer."""

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
  fxlora check path/to/adapter --base llama

exit codes
  0  done (compare: the two sides are equal; check: the adapter fits)
  1  compare: they differ; check: it does not fit
  2  the command line, the configuration or the model is wrong; the message says how
  3  the model cannot be traced, or peft refused it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.

    Returns:
        The exit code: 0 done, 1 differs, 2 a wrong argument, 3 a model that cannot be followed.
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

    if arguments.json:
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
    _add_check(commands)
    return parser


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


def _add_config(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="a config file or directory, a model type, module:callable")
    add("-t", "--target-modules", metavar="NAMES", help="comma-separated names or suffixes, all-linear, or a regex with --regex")  # fmt: skip
    add("--regex", action="store_true", help="read --target-modules as one regular expression")
    add("-r", "--rank", type=int, default=8, help="rank (default: 8)")
    add("-a", "--alpha", type=float, default=None, help="lora_alpha (default: 8, as peft)")
    add("--dropout", type=float, default=0.0, help="lora_dropout (default: 0)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    add("--exclude-modules", metavar="NAMES", help="comma-separated names or suffixes")
    add("--layers", metavar="INDICES", help="layers_to_transform, such as 0,1,8-11")
    add("--bias", default="none", choices=("none", "all", "lora_only"), help="which biases train")
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


def _config(a: argparse.Namespace) -> Any:
    from peft import LoraConfig

    from fxlora.errors import ConfigError

    if a.config is not None:
        return _config_file(a.config)
    targets: Any = a.target_modules
    if targets is not None and not a.regex and targets.lower() != "all-linear":
        targets = _names(targets)
    try:
        return LoraConfig(
            r=a.rank,
            lora_alpha=8 if a.alpha is None else int(a.alpha) if a.alpha.is_integer() else a.alpha,
            lora_dropout=a.dropout,
            use_rslora=a.rslora,
            target_modules=targets,
            exclude_modules=_names(a.exclude_modules),
            layers_to_transform=layers(a.layers),
            target_parameters=_names(a.target_parameters),
            bias=a.bias,
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


# ---- commands ----------------------------------------------------------------------------------


def _planned(a: argparse.Namespace) -> tuple[Any, Any]:
    import fxlora
    from fxlora import models

    config = _config(a)
    model = models.build(a.model)
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
    from fxlora import models

    config = _config(a)
    model = models.build(a.model)
    args, kwargs = _inputs(model)
    try:
        result = fxlora.compare(model, config, args, kwargs)
    except FxloraError:
        raise
    except Exception as e:
        raise FxloraError(f"peft refused this: {type(e).__name__}: {e}") from e
    print(json.dumps(result.to_dict(), indent=2) if a.json else result)
    return EXIT_OK if result.equal else EXIT_DIFFERS


def _check(a: argparse.Namespace) -> int:
    import fxlora
    from fxlora import models
    from fxlora.check import check_tensors
    from fxlora.checkpoint import find, read_config, read_shapes

    folder = find(a.adapter)
    config, shapes = read_config(folder), read_shapes(folder)
    model = models.build(a.base)
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
