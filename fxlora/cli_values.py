"""Arguments of the command line -> a model, its inputs, a LoraConfig, a plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from fxlora.errors import FxloraError, UsageError


def names(text: str | None, option: str = "") -> list[str] | None:
    """Returns the names in a comma-separated text.

    Args:
        text: what stands behind the option; None when it was not given.
        option: the option, where an empty text is a mistake: a variable of a script that is not
            set, say.

    Raises:
        ConfigError: when an option that is to name something names nothing.

    >>> names("q_proj, v_proj"), names(None)
    (['q_proj', 'v_proj'], None)
    """
    from fxlora.errors import ConfigError

    if text is None:
        return None
    found = [n.strip() for n in text.split(",") if n.strip()]
    if option and not found:
        raise ConfigError(f"{option} {text!r} names nothing; name something, or leave it out")
    return found


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
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigError(
                f"--layers {text!r}: {part!r} is no index and no range; write 0,1,8-11"
            ) from None
        if not found:  # no index at all is every layer to peft
            raise ConfigError(
                f"--layers {text!r}: {part.strip()!r} holds no index; write {last.strip()}-{first}"
            )
        out += found
    return out


# What a LoraConfig says, by attribute and option.
SAID_BY_CONFIG = {
    "target_modules": "-t", "regex": "--regex", "rank": "-r", "alpha": "-a", "dropout": "--dropout",
    "rslora": "--rslora", "exclude_modules": "--exclude-modules", "layers": "--layers",
    "bias": "--bias", "target_parameters": "--target-parameters",
    "modules_to_save": "--modules-to-save", "dora": "--dora", "init": "--init",
    "task_type": "--task-type",
}  # fmt: skip


def given(a: argparse.Namespace, options: Mapping[str, str]) -> list[str]:
    """Returns the options that were given, of a table from attributes to options."""
    values = {option: getattr(a, name) for name, option in options.items()}
    # Not `in (None, False)`: a dropout of 0.0 is equal to False, and was given.
    return [o for o, v in values.items() if v is not None and v is not False]


def refuse(a: argparse.Namespace, options: Mapping[str, str], beside: str, why: str) -> None:
    """Refuses options that would be ignored beside another.

    Raises:
        UsageError: names those that were given.
    """
    found = given(a, options)
    if found:
        raise UsageError(
            f"{beside} and {', '.join(found)}: {why}. Leave {'it' if len(found) == 1 else 'them'} out"
        )


def config_of(a: argparse.Namespace) -> Any:
    """Returns the `peft.LoraConfig` the arguments say.

    Raises:
        ConfigError: for a value or a file peft does not take.
    """
    from peft import LoraConfig

    from fxlora.errors import ConfigError

    if a.config is not None:
        found = given(a, SAID_BY_CONFIG)
        if found:
            raise ConfigError(
                f"--config {a.config} and {', '.join(found)}: the file says all of it. Leave "
                f"{'it' if len(found) == 1 else 'them'} out, or change the file"
            )
        return _config_file(a.config)
    targets: Any = a.target_modules
    if targets is None and a.regex:
        raise UsageError("--regex says how -t is read, and there is no -t. Add it, or leave it out")
    if targets is not None and not a.regex and targets.lower() != "all-linear":
        targets = names(targets, "-t")
    try:
        return LoraConfig(
            r=8 if a.rank is None else a.rank,
            lora_alpha=8 if a.alpha is None else int(a.alpha) if a.alpha.is_integer() else a.alpha,
            lora_dropout=0.0 if a.dropout is None else a.dropout,
            use_rslora=a.rslora,
            target_modules=targets,
            exclude_modules=names(a.exclude_modules, "--exclude-modules"),
            layers_to_transform=layers(a.layers),
            target_parameters=names(a.target_parameters, "--target-parameters"),
            bias="none" if a.bias is None else a.bias,
            task_type=a.task_type,
            modules_to_save=names(a.modules_to_save, "--modules-to-save"),
            use_dora=a.dora,
            init_lora_weights=True if a.init is None else a.init,
        )
    except (ValueError, TypeError, ImportError) as e:
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
    if not isinstance(settings, dict):
        raise ConfigError(
            f"--config {path}: its content is of type {type(settings).__name__}, and a peft "
            'adapter_config.json is an object, such as {"r": 8, "target_modules": ["q_proj"]}'
        )
    if settings.get("peft_type", "LORA") != "LORA":
        raise ConfigError(
            f"--config {path}: peft_type is {settings['peft_type']!r}; fxlora reads LORA adapters"
        )
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"--config {path}: peft's LoraConfig has no field {unknown[0]!r}")
    settings["inference_mode"] = False  # a saved config says True; the question is training
    settings.pop("auto_mapping", None)
    try:
        return LoraConfig(**settings)
    except (ValueError, TypeError, AttributeError, ImportError) as e:
        raise ConfigError(f"--config {path}: {e}") from None


def _inputs_of(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns example inputs for a model; none where they cannot be made."""
    from fxlora.errors import TraceError
    from fxlora.example_inputs import for_model

    try:
        return for_model(model, (), None)
    except TraceError:
        return (), {}


def build(
    spec: str, dtype: str | None = None, architecture: str | None = None
) -> tuple[Any, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Builds the model, and says whose fault it is when the user's own code raises.

    Returns:
        The model, its floating-point weights in `dtype` where one is given; and example inputs,
        those that came with it or built for it.

    Raises:
        ConfigError: for a dtype models are not trained in.
    """
    from fxlora import models
    from fxlora.errors import ModelSpecError

    try:
        model, given = models.with_inputs(spec, architecture)
    except FxloraError:
        raise
    except Exception as e:
        where = _last_line(e)
        raise ModelSpecError(f"{spec!r} raised {type(e).__name__}{where}: {e}") from e
    if dtype is not None:
        model, given = _cast(model, given, dtype)
    return model, _inputs_of(model) if given is None else given


def _cast(model: Any, given: Any, dtype: str) -> tuple[Any, Any]:
    """Returns the model and its inputs with their floating-point numbers in another dtype."""
    import torch

    from fxlora.errors import ConfigError, did_you_mean

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(
            f"--dtype {dtype!r} is none of {list(known)}.{did_you_mean(dtype, known)}"
        )
    to = known[dtype]

    def moved(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if floats else value

    from torch.utils._pytree import tree_map

    return model.to(to), tree_map(moved, given)  # built for this command, and nobody else's


def _last_line(error: Exception) -> str:
    """Returns the file and line that raised, without the machine's folders."""
    import traceback
    from pathlib import Path

    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def planned(a: argparse.Namespace, *, whole: bool = True) -> tuple[Any, Any]:
    """Returns the traced model and the plan the arguments ask for.

    Args:
        a: the arguments.
        whole: whether the trace is used for more than a plan; if not, it is made in a fraction of
            the time.
    """
    import fxlora
    from fxlora.trace.tracer import outline

    config = config_of(a)
    model, (args, kwargs) = build(a.model, architecture=a.architecture)
    traced = (fxlora.trace if whole else outline)(model, args, kwargs)
    return traced, fxlora.plan(traced, config, reach=names(a.reach, "--reach") or ())
