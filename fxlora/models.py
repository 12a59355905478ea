"""A model named on a command line -> a module, and inputs; nothing is fetched or loaded."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxlora.errors import ModelSpecError, did_you_mean

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def build(spec: str) -> nn.Module:
    """Builds the model a user named; see `with_inputs`."""
    return with_inputs(spec)[0]


def with_inputs(spec: str, architecture: str | None = None) -> tuple[nn.Module, Inputs | None]:
    """Builds the model a user named, and the example inputs that came with it.

    Args:
        spec: a transformers `config.json`, a directory that holds one, a transformers model type
            (`llama`), or `module:callable`, where the callable returns the model, or the model and
            example inputs: `(model, args)`, `(model, kwargs)` or `(model, args, kwargs)`.
        architecture: the transformers class to build, in place of the one the config names, or of
            the first task's its type has a class for.

    Returns:
        The model and its inputs, None where the callable gave none. A transformers model is built
        on the meta device in eval mode, so its size does not matter and no weight is loaded.

    Raises:
        ModelSpecError: says which of these forms was tried, and what to change.
    """
    path = Path(spec)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelSpecError(f"{spec!r} is a directory without a config.json")
    if path.is_file():
        return _from_config_file(path, architecture), None
    if ":" in spec:
        if architecture is not None:
            raise ModelSpecError(
                f"{spec!r} builds its own class; an architecture ({architecture!r}) goes with a "
                "transformers config or model type"
            )
        return _from_callable(spec)
    if spec.endswith(".json") or os.sep in spec:
        raise ModelSpecError(f"{spec!r}: no such file. {_FORMS}")
    return _from_model_type(spec, architecture), None


_FORMS = (
    "Name a transformers config.json, a directory with one, a transformers model type such as "
    "llama, or module:callable"
)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelSpecError(
            "a transformers config needs the transformers package: pip install transformers"
        ) from None
    return transformers


def _from_config_file(path: Path, architecture: str | None) -> nn.Module:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ModelSpecError(f"{path}: not a readable JSON file: {e}") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelSpecError(f"{path}: not a transformers config: it has no 'model_type'")
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    model_type = settings["model_type"]
    if model_type not in known:
        raise ModelSpecError(
            f"{path}: model_type {model_type!r} is unknown to transformers "
            f"{transformers.__version__}.{did_you_mean(str(model_type), list(known))}"
        )
    config = known[model_type].from_dict(settings)
    return _from_config(config, settings.get("architectures"), architecture)


def _from_model_type(name: str, architecture: str | None) -> nn.Module:
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    if name not in known:
        raise ModelSpecError(
            f"{name!r} is no file and no model type.{did_you_mean(name, list(known))} {_FORMS}"
        )
    return _from_config(known[name](), None, architecture)


_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModel",
)


def _from_config(config: Any, architectures: Any, architecture: str | None) -> nn.Module:
    transformers = _transformers()
    chosen = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if architecture is not None:
        _check_architecture(config, architecture)
        chosen = architecture
    cls = getattr(transformers, chosen, None) if chosen else None
    first: ModelSpecError | None = None
    with torch.device("meta"):
        if cls is not None:
            return _built(lambda: cls(config), chosen, config)
        for name in _tasks(config):
            auto = getattr(transformers, name, None)
            if auto is not None and type(config) in auto._model_mapping:
                try:
                    return _built(lambda auto=auto: auto.from_config(config), name, config)
                except ModelSpecError as e:  # a speech head without an alphabet, say
                    first = first or e
    raise first or ModelSpecError(f"no transformers model takes a {type(config).__name__}")


def _check_architecture(config: Any, name: str) -> None:
    """Refuses a class that transformers does not have, or that takes another config."""
    transformers = _transformers()
    cls = getattr(transformers, name, None)
    takes = getattr(cls, "config_class", None)
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    if is_model and takes is not None and isinstance(config, takes):
        return
    of_type = _classes_of(config)
    raise ModelSpecError(
        f"{name!r} is no class of a {config.model_type} model.{did_you_mean(name, of_type)} "
        f"There are {of_type}"
    )


def _classes_of(config: Any) -> list[str]:
    """Returns the names of the classes transformers' auto classes build from a config."""
    transformers = _transformers()
    found: dict[str, None] = {}
    for name in sorted(n for n in dir(transformers) if n.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is None or type(config) not in mapping:
            continue
        made = mapping[type(config)]
        found |= dict.fromkeys(c.__name__ for c in (made if isinstance(made, tuple) else (made,)))
    return list(found)


def _tasks(config: Any) -> list[str]:
    """Returns the auto classes to try: of an encoder-decoder, the decoder alone comes last."""
    if not getattr(config, "is_encoder_decoder", False):
        return list(_AUTO)
    return sorted(_AUTO, key=lambda name: name == "AutoModelForCausalLM")


def _built(make: Any, name: str, config: Any) -> nn.Module:
    try:
        model = make()
        model = model.to("meta")  # a legacy constructor may have put a parameter on the CPU
        dtype = getattr(config, "dtype", None)  # what the weights are stored in, when it says so
        if isinstance(dtype, torch.dtype):
            model = model.to(dtype)
    except Exception as e:
        raise ModelSpecError(f"{name} cannot be built from this config: {e}") from e
    model.eval()
    made: nn.Module = model
    return made


def _from_callable(spec: str) -> tuple[nn.Module, Inputs | None]:
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise ModelSpecError(f"{spec!r}: cannot import {module_name!r}: {e}") from e
    target: Any = getattr(module, attribute, None)
    if target is None:
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ModelSpecError(
            f"{spec!r}: {module_name} has no {attribute!r}.{did_you_mean(attribute, public)}"
        )
    made = target if isinstance(target, nn.Module) else target()
    if isinstance(made, nn.Module):
        return made, None
    if not isinstance(made, tuple) or not made or not isinstance(made[0], nn.Module):
        raise ModelSpecError(
            f"{spec!r} gave a {type(made).__name__}, not a torch.nn.Module or a tuple that begins "
            "with one: (model, args, kwargs)"
        )
    model, *given = made
    kinds = [next((k for k in (tuple, Mapping) if isinstance(v, k)), None) for v in given]
    if kinds not in ([], [tuple], [Mapping], [tuple, Mapping]):
        shown = ", ".join(type(v).__name__ for v in given)
        raise ModelSpecError(
            f"{spec!r} gave a model and ({shown}); example inputs are a tuple of arguments, a "
            "dictionary of keywords, or one behind the other: (model, args, kwargs)"
        )
    args = next((v for v in given if isinstance(v, tuple)), ())
    kwargs = dict(next((v for v in given if isinstance(v, Mapping)), {}))
    return model, (args, kwargs) if given else None
