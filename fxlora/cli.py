"""The command line: `fxlora plan | draw | compare | lint | check`, the outermost layer."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fxlora import cli_commands as run
from fxlora.errors import FxloraError

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
  fxlora memory llama -t all-linear --batch 4 --length 2048 --sweep
  fxlora check path/to/adapter --base llama

exit codes
  0  done (compare: the two sides are equal; lint: nothing found; check: the adapter fits)
  1  compare: they differ; lint: a finding at or above --fail-on; check: it does not fit
  2  the command line, the configuration or the model is wrong, or the output cannot be
     written; the message says how
  3  the model cannot be traced, peft refused it, or nothing here can draw the picture
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
        return run.EXIT_OK


def _failed(error: FxloraError, arguments: argparse.Namespace) -> int:
    from fxlora.errors import CheckpointError, ConfigError, ModelSpecError, UsageError

    if arguments.json or getattr(arguments, "format", None) == "json":
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    print(f"fxlora: {error}", file=sys.stderr)
    return (
        run.EXIT_USAGE
        if isinstance(error, (CheckpointError, ConfigError, ModelSpecError, UsageError))
        else run.EXIT_ERROR
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
    for name, command_run, text in (
        ("plan", run.run_plan, "a verdict and a reason for every linear site; nothing is changed"),
        ("draw", run.run_draw, "before and after as a picture, requires_grad on every node"),
        ("compare", run.run_compare, "the rewritten graph against what peft makes of the model"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"fxlora {name}: {text}.\n\n{_DESCRIPTION}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        _add_config(command)
        if name != "compare":  # with peft, which has no such reach
            _add_reach(command)
        command.set_defaults(run=command_run)
        if name == "plan":
            _add_questions(command)
        if name == "draw":
            _add_drawing(command)
    _add_lint(commands)
    _add_memory(commands)
    _add_check(commands)
    return parser


def _add_questions(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--explain", metavar="NAME", help="why a site, a module or a part of a layer is taken or left")  # fmt: skip
    add("--effects", action="store_true", help="whether each adapter's gradient arrives: live, bypassed, inert, cut, dead")  # fmt: skip
    add("--cover", action="store_true", help="target by layer by share of parameters and FLOPs")
    add("--choose", metavar="WORDS", help="the smallest targets for 'attention', 'all-linear - router', '60%% flops', ...")  # fmt: skip


def _add_drawing(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("-o", "--output", default="lora.svg", metavar="FILE", help="by its suffix: .svg .html .png .pdf .dot .graphml .mmd .json (default: lora.svg)")  # fmt: skip
    add("--focus", default="", metavar="MODULE", help="draw one module close up, with what it reads and feeds")  # fmt: skip
    add("--depth", type=int, metavar="N", help="how many levels of modules to open (default: all)")
    add("--columns", default="before,after", metavar="LIST", help="before, after, or before,after (default)")  # fmt: skip
    add("--direction", default="TB", metavar="TB|LR", help="downwards (default) or to the right")
    add("--theme", default="auto", metavar="NAME", help="auto (the reader's scheme), light or dark")
    add("--detail", default="auto", metavar="NAME", help="auto, or full: nothing is summed up")
    add("--unfolded", action="store_true", help="draw every one of a run of equal blocks")
    add("--engine", default="auto", metavar="NAME", help="auto, dot or wasi")


def _add_memory(commands: Any) -> None:
    text = (
        "what a training step holds: weights, adapters, gradients, optimizer, what autograd saves"
    )
    command = commands.add_parser(
        "memory", help=text, description=f"fxlora memory: {text}.\n\n{_DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_config(command)
    _add_reach(command)
    add = command.add_argument
    add("--batch", type=int, metavar="N", help="sequences or images in a step (default: the example's)")  # fmt: skip
    add("--length", type=int, metavar="N", help="tokens in a sequence (default: the example's)")
    add("--dtype", metavar="DTYPE", help="of the base: float32, bfloat16 or float16 (default: the model's)")  # fmt: skip
    add("--optimizer", default="adamw", metavar="NAME", help="adamw, adamw8bit, momentum or sgd")
    add("--sweep", action="store_true", help="this configuration beside others: attention, all-linear, the last layers, everything")  # fmt: skip
    command.set_defaults(run=run.run_memory)


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
    command.set_defaults(run=run.run_lint)


def _add_check(commands: Any) -> None:
    text = "which tensor of a peft adapter directory lands on which site of a model"
    command = commands.add_parser(
        "check", help=text, description=f"fxlora check: {text}; nothing is loaded.\n\n{_DESCRIPTION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("adapter", metavar="ADAPTER_DIR", help="a folder as peft's save_pretrained leaves it")  # fmt: skip
    command.add_argument("--base", required=True, metavar="MODEL", help="the model, named as above")
    _add_architecture(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run.run_check)


def _add_architecture(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--architecture", metavar="CLASS", help="the transformers class to build, such as CLIPModel"
    )


def _add_config(command: argparse.ArgumentParser, optional: bool = False) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", nargs="?" if optional else None, help="a config file or directory, a model type, module:callable")  # fmt: skip
    _add_architecture(command)
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


def _add_reach(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reach",
        metavar="NAMES",
        help="adapt what peft cannot: uses, slices, calls; comma-separated",
    )


if __name__ == "__main__":
    sys.exit(main())
