"""A LoraConfig read once: a copy that may be resolved, every value checked, every field accounted."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import fields
from typing import Any

from fxlora.errors import ConfigError, ConfigTypeError, UnsupportedError, did_you_mean

# Fields a rewrite honours. The docs' parity table is made from these two tables.
HONOURED = {
    "r": "rank of every adapter that rank_pattern does not name",
    "lora_alpha": "scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora",
    "use_rslora": "see lora_alpha",
    "lora_dropout": "nn.Dropout before lora_A when above zero",
    "target_modules": "exact names and dotted suffixes, a regular expression, or all-linear",
    "target_parameters": "2-D and 3-D parameters, by name or dotted suffix",
    "exclude_modules": "the same rules, checked first",
    "layers_to_transform": "layer indices, for suffix matches",
    "layers_pattern": "the name in front of the layer index",
    "rank_pattern": "first matching key wins",
    "alpha_pattern": "first matching key wins",
    "fan_in_fan_out": "corrected per layer by its class, as PEFT does",
    "bias": "none, all, or lora_only",
    "lora_bias": "a bias on lora_B, inside the scaling",
    "init_lora_weights": "True, False, gaussian, pissa, pissa_niter_N, olora, orthogonal and mica; the "
    "base weight that pissa and olora change is changed in the graph only",
    "modules_to_save": "a trainable copy of the whole module, beside the frozen one",
    "use_dora": "on linear, convolution and embedding layers; in train mode with dropout the base is "
    "computed again from the dropped input, as PEFT does",
    "trainable_token_indices": "rows of an embedding, and of the output layer tied to it, replaced by "
    "trainable ones",
    "kasa_config": "the truncated base weight is in the graph only; the regularisation loss is PEFT's "
    "trainer's affair",
    "use_bdlora": "block-diagonal lora_A or lora_B",
    "inference_mode": "what it adds is there and frozen, as PEFT loads it; `bias` is not touched by it",
}
# Fields that say nothing about the graph.
NEUTRAL = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision "
    "runtime_config megatron_core qalora_group_size".split()
)
REFUSED = {
    "use_qalora": "QA-LoRA pools the input in groups and needs a GPTQ layer; PEFT ignores the field "
    "elsewhere, and ignoring it in silence is what we do not do",
    "megatron_config": "it needs megatron-core's parallel layers",
    "eva_config": "EVA draws lora_A from activations on data, which a static analysis does not have",
    "corda_config": "CorDA draws the adapter from covariances of data",
    "lora_ga_config": "LoRA-GA draws the adapter from gradients on data",
    "velora_config": "VeLoRA computes what LoRA computes and replaces the gradient of lora_A by an "
    "autograd function with a state of its own, which no graph of operations shows",
    "alora_invocation_tokens": "aLoRA switches on at a token searched for in every input by Python, "
    "outside the model, so no graph of the model holds it",
    "monteclora_config": "MonteCLoRA samples lora_A at every training step",
    "layer_replication": "it repeats layers of the model before anything is adapted; repeat them "
    "(peft.tuners.tuners_utils.replicate_layers), then trace",
    "arrow_config": "Arrow routes every token between adapters at run time",
    "loftq_config": "LoftQ quantizes the base weight on a CUDA device through bitsandbytes",
    "ensure_weight_tying": "it makes two sites share one adapter, and PEFT then merges it twice "
    "(W + 2 BA) and counts it twice; adapt one of the tied layers, or untie them",
}
_INITS = ("gaussian", "pissa", "olora", "orthogonal", "mica")
_REFUSED_INITS = {
    "eva": "it draws the adapter from activations on data, which a static analysis does not have",
    "corda": "it draws the adapter from covariances of data, which a static analysis does not have",
    "lora_ga": "it draws the adapter from gradients on data, which a static analysis does not have",
    "loftq": "it quantizes the base weight on a CUDA device through bitsandbytes; let peft draw it, "
    "save it, and fxlora.load_adapter reads it",
}
# Implicit modules_to_save of peft's task types (peft.peft_model.PeftModelFor...).
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# At most one of these may be set: each is another way to compute the adapter.
VARIANTS = ("use_dora", "kasa_config", "use_bdlora")
# The field that asks for a variant, for messages.
VARIANT_FIELDS = {
    "dora": "use_dora",
    "kasa": "kasa_config",
    "bdlora": "use_bdlora",
    "mica": "init_lora_weights='mica'",
}


def resolved_copy(config: Any) -> Any:
    """Returns a checked copy of a LoraConfig that may be changed.

    Args:
        config: a `peft.LoraConfig`; read, never changed.

    Raises:
        TypeError: when it is not a LoraConfig.
        UnsupportedError: names the first field that is set and not honoured.
        ConfigError: names a value PEFT would refuse, or would only fail on later.
    """
    if not hasattr(config, "peft_type") or not hasattr(config, "target_modules"):
        raise TypeError(
            f"config is a {type(config).__name__}; pass a peft.LoraConfig, for example "
            'LoraConfig(r=8, target_modules=["q_proj", "v_proj"])'
        )
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UnsupportedError(
            f"peft_type={config.peft_type!r}: fxlora rewrites LORA only; pass a peft.LoraConfig"
        )
    _check_init(config)
    _check_support(config)
    _check_values(config)
    made = copy.deepcopy(config)
    if made.modules_to_save is not None:
        made.modules_to_save = list(made.modules_to_save)
    if isinstance(made.use_bdlora, dict):  # as a configuration read from a file has it
        made.use_bdlora = _bdlora(made.use_bdlora)
    return made


def task_heads(config: Any) -> tuple[str, ...]:
    """Returns what a task type adds to modules_to_save, and when.

    PEFT's classes for sequence and token classification and question answering train the model's
    head as a whole.

    >>> from peft import LoraConfig
    >>> task_heads(LoraConfig(task_type="SEQ_CLS"))
    ('classifier', 'score')
    """
    return _TASK_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())


def init_name(config: Any) -> str | bool:
    """Returns `init_lora_weights` in one spelling: True, False, or a lower-case name.

    >>> from peft import LoraConfig
    >>> init_name(LoraConfig(init_lora_weights="Gaussian"))
    'gaussian'
    """
    how = config.init_lora_weights
    if isinstance(how, str) and how:
        # PEFT reads these two in any case, and every other name as it is spelt.
        return how.lower() if how.lower() in ("gaussian", "olora") else how
    return bool(how)


def variant_of(config: Any) -> str:
    """Returns the one variant of LoRA a configuration asks for: "", "dora", "kasa", ..., "mica".

    Raises:
        ConfigError: when it asks for two (PEFT: "unsupported variant combination").
    """
    found = [v for v in VARIANTS if getattr(config, v, None)]
    variants = [n for n, field in VARIANT_FIELDS.items() if field in found]
    variants += ["mica"] if init_name(config) == "mica" else []
    if len(variants) > 1:
        fields = [VARIANT_FIELDS[v] for v in variants]
        raise ConfigError(
            f"{' and '.join(fields)} are set together; an adapter is of one kind. Leave one out"
        )
    return variants[0] if variants else ""


def _default(f: Any) -> Any:
    import dataclasses

    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _check_support(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in HONOURED or f.name in NEUTRAL or value == _default(f) or not value:
            continue
        why = REFUSED.get(f.name, "fxlora does not know this field")
        raise UnsupportedError(
            f"{f.name}={value!r} is not supported yet: {why}. Leave it at {_default(f)!r}; "
            "docs/parity.md lists what is"
        )


def _check_values(config: Any) -> None:
    _check_rank("r", config.r)
    _check_number("lora_alpha", config.lora_alpha)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, getattr(config, name))
    dropout = config.lora_dropout
    if not isinstance(dropout, (int, float)):
        raise ConfigTypeError(f"lora_dropout={dropout!r}: give a probability from 0.0 to 1.0")
    if dropout > 1 or math.isnan(dropout):
        raise ConfigError(f"lora_dropout={dropout!r}: give a probability from 0.0 to 1.0")
    if dropout < 0:
        raise ConfigError(
            f"lora_dropout={dropout!r} is negative; PEFT reads that as no dropout at all. "
            "Say 0.0 if that is what you mean"
        )
    _check_variants(config)
    bias = config.bias
    if not isinstance(bias, str):
        raise ConfigTypeError(f"bias={bias!r}: one of 'none', 'all', 'lora_only'")
    if not (bias in ("none", "all") or bias.endswith("_only")):
        raise UnsupportedError(f"bias={bias!r}: one of 'none', 'all', 'lora_only'")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        _check_names(name, getattr(config, name))
    for name in ("modules_to_save", "target_parameters"):
        _check_listed(name, getattr(config, name))
    for entry in config.modules_to_save or ():
        _check_regex("modules_to_save", entry)
    _check_layers(config.layers_to_transform)
    _check_tokens(config.trainable_token_indices)
    _check_together(config)
    _check_scaling(config)
    _check_task(config)


def _check_init(config: Any) -> None:
    how = config.init_lora_weights
    if not how or how is True:
        return
    if not isinstance(how, str):
        raise ConfigTypeError(f"init_lora_weights={how!r}: True, False, or one of {list(_INITS)}")
    name = init_name(config)
    assert isinstance(name, str)
    if name == "loftq" or name.startswith("corda"):
        name = name[:5]
    if name in _REFUSED_INITS:
        raise UnsupportedError(
            f"init_lora_weights={how!r} is not supported: {_REFUSED_INITS[name]}. Names, shapes and "
            "the graph are those of init_lora_weights=True; plan with that"
        )
    if re.fullmatch(r"pissa_niter_\d+", name):
        return
    if name not in _INITS:
        raise ConfigError(
            f"init_lora_weights={how!r} is none of {[True, False, *_INITS, 'pissa_niter_4']}."
            f"{did_you_mean(how, _INITS)}"
        )


def _check_variants(config: Any) -> None:
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig

    kasa, blocks = config.kasa_config, config.use_bdlora
    if kasa is not None and not isinstance(kasa, KasaConfig):
        raise ConfigTypeError(f"kasa_config={kasa!r}: a peft KasaConfig, or None")
    if blocks and not isinstance(blocks, (BdLoraConfig, dict)):
        raise ConfigTypeError(f"use_bdlora={blocks!r}: a peft BdLoraConfig, or None")
    if blocks:
        made = _bdlora(blocks) if isinstance(blocks, dict) else blocks
        if not isinstance(made.nblocks, int):
            raise ConfigTypeError(f"use_bdlora.nblocks={made.nblocks!r}: a positive int")
        if made.nblocks < 1:
            raise ConfigError(f"use_bdlora.nblocks={made.nblocks!r}: at least 1")
    variant_of(config)


def _bdlora(values: dict[str, Any]) -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    try:
        return BdLoraConfig(**values)
    except TypeError as e:
        raise ConfigTypeError(f"use_bdlora={values!r}: {e}") from None
    except ValueError as e:
        raise ConfigError(f"use_bdlora={values!r}: {e}") from None


def _check_together(config: Any) -> None:
    """Refuses what LoraConfig's constructor refuses: a field may have been set after it."""
    targets, layers, pattern = (
        config.target_modules, config.layers_to_transform, config.layers_pattern,
    )  # fmt: skip
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        name = "layers_to_transform" if layers is not None else "layers_pattern"
        raise ConfigError(
            f"{name}={getattr(config, name)!r} goes with a list of target_modules, not with the "
            f"pattern {targets!r}"
        )
    if pattern and layers is None:
        raise ConfigError(
            f"layers_pattern={pattern!r} says where the layer's index stands; say which layers with "
            "layers_to_transform"
        )
    if config.lora_bias and config.init_lora_weights not in (True, False):
        raise ConfigError(
            f"lora_bias={config.lora_bias!r} goes with init_lora_weights=True or False, not with "
            f"{config.init_lora_weights!r}"
        )
    if config.lora_bias and config.use_dora:
        raise ConfigError(
            f"lora_bias={config.lora_bias!r} does not go with use_dora={config.use_dora!r}. Leave one out"
        )


def _check_scaling(config: Any) -> None:
    """PiSSA divides by the scaling, and takes a root of what comes out."""
    how = config.init_lora_weights
    if not isinstance(how, str) or not how.startswith("pissa"):
        return
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{k!r}]": v for k, v in config.alpha_pattern.items()}
    for name, alpha in alphas.items():
        if alpha <= 0:
            raise ConfigError(
                f"init_lora_weights={how!r} with {name}={alpha!r}: PiSSA divides by the scaling and "
                "takes a root of it, so it has to be positive (PEFT makes a weight of NaN)"
            )


def _check_task(config: Any) -> None:
    from peft import TaskType

    task = config.task_type
    if task is not None and task not in list(TaskType):
        known = [t.value for t in TaskType]
        raise ConfigError(f"task_type={task!r}: None, or one of {known}")
    saved = config.modules_to_save
    if task_heads(config) and saved is not None and not isinstance(saved, list):
        raise ConfigTypeError(
            f"modules_to_save={saved!r}: with task_type={task!r} a list, which PEFT adds "
            f"{list(task_heads(config))} to"
        )


def _check_listed(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ConfigTypeError(
            f"{name}={value!r} is a string, which PEFT would read letter by letter; write [{value!r}]"
        )
    _check_names(name, value)


def _check_tokens(value: Any) -> None:
    if value is None:
        return
    layers = value if isinstance(value, dict) else {None: value}
    for layer, rows in layers.items():
        where = "" if layer is None else f"[{layer!r}]"
        if not isinstance(rows, list):
            raise ConfigTypeError(f"trainable_token_indices{where}={rows!r}: a list of ints")
        if not rows:
            raise ConfigError(
                f"trainable_token_indices{where}=[] trains no row (PEFT's model then fails when it "
                "runs); leave it out"
            )
        bad = [i for i in rows if not isinstance(i, int) or isinstance(i, bool)]
        if bad:
            raise ConfigTypeError(f"trainable_token_indices{where} holds {bad[0]!r}, no int")
        if layer is not None and not isinstance(layer, str):
            raise ConfigTypeError(f"trainable_token_indices has the key {layer!r}, no layer's name")


def _check_rank(name: str, r: Any) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise ConfigTypeError(f"{name}={r!r}: a rank is a positive int")
    if r <= 0:
        raise ConfigError(f"{name}={r}: a rank is at least 1")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigTypeError(f"{name}={value!r}: a number")
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} is not finite; every output would be NaN")


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, dict):
        raise ConfigTypeError(f"{name}={pattern!r}: a dict from name patterns to numbers, or {{}}")
    for key, value in pattern.items():
        _check_regex(name, key)
        if name == "rank_pattern":
            _check_rank(f"rank_pattern[{key!r}]", value)
        else:
            _check_number(f"alpha_pattern[{key!r}]", value)


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except TypeError:
        raise ConfigTypeError(f"{name} holds {pattern!r}, which is not a string") from None
    except re.error as e:
        raise ConfigError(f"{name}={pattern!r} is not a regular expression: {e}") from None


def _check_names(name: str, value: Any) -> None:
    if value is None or (not value and name == "exclude_modules"):
        return
    if isinstance(value, str):
        if value.lower() != "all-linear":
            _check_regex(name, value)
        return
    try:
        bad = [v for v in value if not isinstance(v, str)]
    except TypeError:
        raise ConfigTypeError(f"{name}={value!r}: a string or a list of strings") from None
    if bad:
        raise ConfigTypeError(f"{name} holds {bad[0]!r}, which is not a string")


def _check_layers(value: Any) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return
    if isinstance(value, (list, tuple, set)) and all(isinstance(v, int) for v in value):
        return
    raise ConfigTypeError(f"layers_to_transform={value!r}: an int or a list of ints")
