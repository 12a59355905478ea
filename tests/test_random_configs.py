"""Every LoraConfig on every small network: what PEFT makes of it is what we make of it, or we say why not."""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from configurations import WIDTH, Wide, config, fields, traced, wides
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

import fxlora
from fxlora.divergences import DELIBERATE, Deliberate
from fxlora.errors import ConfigError, FxloraError
from fxlora.peft_side import common_name, wrap, wrapped


@dataclass
class Case:
    """One network under one configuration, on both sides.

    Attributes:
        spec, chosen: the network, and the fields that were set.
        config: the configuration; a copy of what either side was given.
        ours, theirs: what was made; None where it was refused.
        unmade: why LoraConfig's constructor refuses the fields; None when it takes them.
        our_error, their_error: the refusals.
    """

    spec: Wide
    chosen: dict[str, Any]
    config: LoraConfig
    ours: Any = None
    theirs: Any = None
    plan: Any = None
    unmade: Exception | None = None
    our_error: Exception | None = None
    their_error: Exception | None = None


def attempt(spec: Wide, chosen: dict[str, Any]) -> Case:
    """Gives a configuration to PEFT and to fxlora; checks that nothing given was changed."""
    model, graph = traced(spec)
    given, unmade = config(chosen)
    case = Case(spec, chosen, copy.deepcopy(given), unmade=unmade)
    try:
        case.theirs = wrapped(wrap(copy.deepcopy(model), given, seed=1))
    except Exception as e:
        case.their_error = e
    before = facts(model, graph, given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.plan = fxlora.plan(graph, given)
            torch.manual_seed(1)
            case.ours = fxlora.rewrite(graph, case.plan)
    except Exception as e:
        case.our_error = e
    assert facts(model, graph, given) == before, "a plan changed what it was given"
    return case


def facts(model: nn.Module, graph: nn.Module, given: LoraConfig) -> list[Any]:
    held = [
        [
            (n, id(p), p.data_ptr(), p.requires_grad, p._version)
            for n, p in m.named_parameters(remove_duplicate=False)
        ]
        for m in (model, graph)
    ]
    return [*held, list(model.state_dict()), graph.code, repr(vars(given))]


def law(examples: int) -> Callable[[Any], Any]:
    """Runs a law over the same examples every time: a failure in CI is a failure at home."""
    return hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )


def check(data: st.DataObject) -> None:
    """Draws a case; what differs is explained by a row of DELIBERATE, or is a mistake."""
    spec = data.draw(wides())
    chosen = data.draw(fields(spec))
    case = attempt(spec, chosen)
    found = differences(case)
    hypothesis.event(excused(case, found) or ("differs" if found else outcome(case)))
    assert not found or excused(case, found), "\n".join(found)


def test_a_tied_parameter_is_adapted_under_its_second_name() -> None:
    chosen = {"r": 2, "target_modules": [], "target_parameters": ["lm_head.weight"]}
    assert not differences(attempt(TIED, chosen))


@pytest.mark.parametrize("last", ["c_attn", "q_proj"])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("targets", [[], ["c_attn"], ["q_proj"], ["c_attn", "q_proj"]])
def test_the_last_layer_says_what_fan_in_fan_out_is_for_a_parameter(
    targets: list[str], flag: bool, last: str
) -> None:
    parts = ("classifier", "layers", "gpt") if last == "c_attn" else ("classifier", "gpt", "layers")
    chosen = {
        "r": 2,
        "target_modules": targets,
        "fan_in_fan_out": flag,
        "target_parameters": ["classifier.weight"],
    }
    assert not differences(attempt(Wide(parts, "llama"), chosen))


def test_a_head_that_a_task_type_adds_is_told_as_such() -> None:
    chosen = {"r": 1, "target_modules": "all-linear", "task_type": "QUESTION_ANS"}
    case = attempt(Wide(("qa_outputs",), ""), {**chosen, "trainable_token_indices": [0]})
    assert not differences(case)
    assert "'qa_outputs' (task_type='QUESTION_ANS' adds it) hits 'qa_outputs'" in text(case)


@pytest.mark.parametrize("saved", [["one"], ["two"], ["one", "two"], ["two", "shared"]])
def test_a_module_of_two_names_is_trained_as_a_whole_under_the_one_that_is_named(
    saved: list[str],
) -> None:
    chosen = {"r": 2, "target_modules": ["conv"], "modules_to_save": saved}
    case = attempt(Wide(("plain_conv", "twice"), ""), chosen)
    assert not differences(case)
    x = torch.randn(2, 3, WIDTH)
    for side in (case.ours, case.theirs):
        names = [n for n, _ in side.named_parameters() if "modules_to_save" in n]
        assert len(names) == 2 * len(saved)
        with torch.no_grad():
            for i, n in enumerate(sorted(names)):
                side.get_parameter(n).add_(i + 1)
    assert torch.equal(case.ours(x), case.theirs(x))


def test_attention_and_its_projection_come_before_a_parameter_of_the_projection() -> None:
    chosen = {"r": 1, "target_modules": ["mha", "out_proj"]}
    case = attempt(Wide(("heads",), ""), {**chosen, "target_parameters": ["mha.out_proj.weight"]})
    assert excused(case, differences(case)) == "attention_and_its_projection"
    with pytest.raises(AttributeError, match="has no deleter"):
        case.theirs(torch.randn(2, 3, WIDTH))


def outcome(case: Case) -> str:
    return "both take it" if case.their_error is None else "both refuse"


@law(100)
@given(st.data())
def test_any_configuration_is_taken_or_refused_as_peft_does(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@law(3000)
@given(st.data())
def test_many_more_configurations_are_taken_or_refused_as_peft_does(data: st.DataObject) -> None:
    check(data)


# ---- what is compared --------------------------------------------------------------------------

FAMILIES = (NotImplementedError, TypeError, ValueError)


def differences(case: Case) -> list[str]:
    """Returns in which respects the two sides differ; empty when they agree."""
    if case.our_error is not None and not isinstance(case.our_error, FxloraError):
        return [f"ours is no FxloraError: {case.our_error!r}"]
    if case.our_error is None and case.their_error is None:
        return [*adapters(case), *parameters(case), *counts(case)]
    if case.our_error is None:
        return [f"only peft refuses: {case.their_error!r}"]
    if case.their_error is None:
        return [f"only we refuse: {case.our_error!r}"]
    return [*family(case), *unnamed(case)]


def family(case: Case) -> list[str]:
    """Compares the types of two refusals; of two faults either may be the one that is named."""
    expected = family_of(case.their_error)
    if isinstance(case.our_error, expected):
        return []
    for rest in map(functools.partial(attempt, case.spec), without_a_fault(case.chosen)):
        if rest.their_error is not None and isinstance(case.our_error, family_of(rest.their_error)):
            return []
        if only_ours(rest) and text(rest) == text(case) and excused(rest, differences(rest)):
            return []  # refused on purpose, and by peft for another fault
    return [f"peft raises {case.their_error!r}, ours is {case.our_error!r}"]


def family_of(error: Exception | None) -> type[Exception]:
    return next((f for f in FAMILIES if isinstance(error, f)), FxloraError)


def without_a_fault(chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the fields with one left out, or one entry of one: then another fault is the first."""
    for name, value in chosen.items():
        rest = {k: v for k, v in chosen.items() if k != name}
        yield rest
        if isinstance(value, dict):
            for key in value:
                yield {**rest, name: {k: v for k, v in value.items() if k != key}}


def unnamed(case: Case) -> list[str]:
    """A refusal names a field that was set, or its value."""
    message = str(case.our_error)
    named = [f for f in (*case.chosen, "target_modules") if f != "r"]
    if "r=" in message or any(name in message for name in (*named, *strings(case.chosen))):
        return []
    return [f"names no field of {sorted(case.chosen)}: {message}"]


def strings(value: Any) -> list[str]:
    """Returns the names in a value."""
    if isinstance(value, str):
        return [value] if len(value) > 2 else []
    if isinstance(value, dict):
        return [*strings(list(value)), *strings(list(value.values()))]
    return [s for v in value for s in strings(v)] if isinstance(value, (list, tuple, set)) else []


def parameters(case: Case) -> list[str]:
    ours = {n: signature(p) for n, p in case.ours.named_parameters()}
    theirs = {common_name(n): signature(p) for n, p in case.theirs.named_parameters()}
    return compared("parameter", ours, theirs)


def counts(case: Case) -> list[str]:
    """Compares what a plan says that trains, which it reckons without a parameter."""
    theirs = list(case.theirs.parameters())
    trainable = sum(p.numel() for p in theirs if p.requires_grad)
    ours = (case.plan.trainable, case.plan.total)
    total = sum(p.numel() for p in theirs)
    return [] if ours == (trainable, total) else [f"counts: ours {ours}, peft's {trainable, total}"]


def signature(p: nn.Parameter) -> tuple[Any, ...]:
    return tuple(p.shape), p.dtype, p.requires_grad


def adapters(case: Case) -> list[str]:
    ours = {p.prefix: numbers(p.r, p.scaling, p.lora_alpha) for p in case.plan.adapted}
    theirs = {
        common_name(f"{name}.lora_A.x").removesuffix(".lora_A.x"): numbers(
            m.r["default"], m.scaling["default"], m.lora_alpha["default"]
        )
        for name, m in case.theirs.named_modules()
        if isinstance(m, LoraLayer)
    }
    return compared("adapter", ours, theirs)


def numbers(r: int, scaling: float, alpha: float) -> tuple[Any, ...]:
    return r, *("nan" if math.isnan(v) else v for v in (scaling, alpha))


def compared(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{what} {n!r}: ours {ours.get(n)}, peft's {theirs.get(n)}"
        for n in sorted({*ours, *theirs})
        if ours.get(n) != theirs.get(n)
    ]


# ---- what may differ ---------------------------------------------------------------------------


def text(case: Case) -> str:
    return str(case.our_error)


def only_ours(case: Case) -> bool:
    """Whether only we refuse."""
    return case.our_error is not None and case.their_error is None


def is_list(value: Any, of: type) -> bool:
    return isinstance(value, (list, tuple, set)) and all(type(v) is of for v in value)


def _numbers(value: Any, *types: type) -> bool:
    return isinstance(value, dict) and all(
        type(k) is str and type(v) in types for k, v in value.items()
    )


def _rows(value: Any) -> bool:
    return type(value) is list and all(type(i) is int for i in value)


def _names(value: Any) -> bool:
    return value is None or isinstance(value, str) or is_list(value, str)


def _listed(value: Any) -> bool:
    return value is None or is_list(value, str)


# What the type hints of LoraConfig say, field by field; a flag takes anything, as in PEFT.
WELL_TYPED: dict[str, Callable[[Any], bool]] = {
    "r": lambda v: type(v) is int,
    "lora_alpha": lambda v: type(v) in (int, float),
    "lora_dropout": lambda v: type(v) in (int, float),
    "rank_pattern": lambda v: _numbers(v, int),
    "alpha_pattern": lambda v: _numbers(v, int, float),
    "target_modules": _names,
    "exclude_modules": _names,
    "layers_to_transform": lambda v: v is None or type(v) is int or is_list(v, int),
    "layers_pattern": _names,
    "modules_to_save": _listed,
    "target_parameters": _listed,
    "bias": lambda v: isinstance(v, str),
    "kasa_config": lambda v: v is None or isinstance(v, KasaConfig),
    "use_bdlora": lambda v: (
        v is None
        or (isinstance(v, BdLoraConfig) and type(v.nblocks) is int)
        or (isinstance(v, dict) and type(v.get("nblocks", 1)) is int)
    ),
    "init_lora_weights": lambda v: v is None or isinstance(v, (bool, str)),
    "trainable_token_indices": lambda v: (
        v is None
        or _rows(v)
        or (isinstance(v, dict) and all(type(k) is str and _rows(r) for k, r in v.items()))
    ),
}


def wrong_type(case: Case) -> bool:
    named = re.match(r"\w+", text(case))
    check = WELL_TYPED.get(named[0] if named else "")
    wrong = check is not None and not check(getattr(case.config, named[0] if named else ""))
    return only_ours(case) and wrong and isinstance(case.our_error, TypeError)


def unread_value(case: Case) -> bool:
    wrong = r"a rank is at least 1|is not a regular expression|nblocks=.*at least 1|None, or one of"
    return only_ours(case) and re.search(wrong, text(case)) is not None


def constructor_rules(case: Case) -> bool:
    refused = case.unmade is not None and isinstance(case.our_error, family_of(case.unmade))
    return only_ours(case) and refused


def negative_dropout(case: Case) -> bool:
    return only_ours(case) and case.config.lora_dropout < 0 and "lora_dropout" in text(case)


def not_finite(case: Case) -> bool:
    return only_ours(case) and re.search(r"is not finite|lora_dropout=nan", text(case)) is not None


def pissa_without_scaling(case: Case) -> bool:
    return only_ours(case) and "PiSSA divides by the scaling" in text(case)


def adapter_inside_saved(case: Case) -> bool:
    return only_ours(case) and "a module is adapted or trained as a whole" in text(case)


def saved_part_of_an_adapter(case: Case) -> bool:
    return only_ours(case) and "a part of the adapter" in text(case)


def mica_in_capitals(case: Case) -> bool:
    return only_ours(case) and case.config.init_lora_weights == "MICA"


def init_not_read(case: Case) -> bool:
    layers = [m for m in case.theirs.modules() if isinstance(m, LoraLayer)] if case.theirs else []
    unread = bool(layers) and all(isinstance(m, Embedding) for m in layers)
    return only_ours(case) and unread and "init_lora_weights=" in text(case)


def init_from_data(case: Case) -> bool:
    return only_ours(case) and case.config.init_lora_weights in ("eva", "lora_ga")


def rank_above_the_weight(case: Case) -> bool:
    return only_ours(case) and "has rank" in text(case)


def olora_on_conv1d(case: Case) -> bool:
    how, sites = case.config.init_lora_weights, case.plan.adapted if case.plan else ()
    return str(how).lower() == "olora" and any(p.kind == "Conv1D" for p in sites)


def tied_weight_changed(case: Case) -> bool:
    how = str(case.config.init_lora_weights).lower()
    changes = how.startswith(("pissa", "olora")) or case.config.kasa_config is not None
    tied = {"tied", "gpt2"} & set(case.spec.parts)
    return changes and bool(tied) and case.our_error is None


def no_rows(case: Case) -> bool:
    return only_ours(case) and "trains no row" in text(case)


def negative_row(case: Case) -> bool:
    return only_ours(case) and "a row counts from 0" in text(case)


def init_of_a_parameter(case: Case) -> bool:
    refused = re.search("init_lora_weights=.* factors .* is a Parameter", text(case))
    return only_ours(case) and refused is not None


def tokens_of_an_adapted_layer(case: Case) -> bool:
    return only_ours(case) and "trainable_token_indices trains rows of" in text(case)


def rows_of_a_saved_module(case: Case) -> bool:
    return only_ours(case) and "in modules_to_save too" in text(case)


def attention_and_its_projection(case: Case) -> bool:
    return "are both targeted by target_modules" in text(case)


def parameter_of_a_layer(case: Case) -> bool:
    return only_ours(case) and re.search("selects .* the weight of a", text(case)) is not None


def parameter_of_a_whole(case: Case) -> bool:
    return only_ours(case) and "torch computes as a whole" in text(case)


def saved_inside_saved(case: Case) -> bool:
    return only_ours(case) and "is trained as a whole already" in text(case)


def task_of_generation(case: Case) -> bool:
    return case.our_error is None and "prepare_inputs_for_generation" in str(case.their_error)


def mamba_kernels(case: Case) -> bool:
    return case.our_error is None and "Mamba-based models" in str(case.their_error)


EXCUSES: dict[str, Callable[[Case], bool]] = {
    f.__name__: f
    for f in (
        wrong_type, unread_value, constructor_rules, negative_dropout, not_finite,
        no_rows, negative_row, init_of_a_parameter, pissa_without_scaling, adapter_inside_saved,
        saved_part_of_an_adapter, mica_in_capitals,
        init_from_data, init_not_read, rank_above_the_weight, olora_on_conv1d, tied_weight_changed,
        tokens_of_an_adapted_layer, rows_of_a_saved_module, attention_and_its_projection,
        parameter_of_a_layer, parameter_of_a_whole, saved_inside_saved, task_of_generation,
        mamba_kernels,
    )
}  # fmt: skip


def excused(case: Case, found: list[str]) -> str:
    """Returns the row of DELIBERATE that explains what differs; "" when none does."""
    if not found or any("is no FxloraError" in d or "names no field" in d for d in found):
        return ""
    return next((name for name, applies in EXCUSES.items() if applies(case)), "")


# ---- each of them is real ------------------------------------------------------------------------


@dataclass
class Seen:
    """A configuration that shows a row, and what PEFT then has."""

    spec: Wide
    chosen: dict[str, Any]
    shows: Callable[[Any], bool] = bool
    refused: str = ""


def _values(model: nn.Module, name: str) -> nn.Parameter:
    return {common_name(n): p for n, p in model.named_parameters()}[name]


def fails(step: Callable[[], Any]) -> bool:
    """Whether a step raises."""
    try:
        step()
    except Exception:
        return True
    return False


LAYERS, TEXT, TIED = Wide(("layers",)), Wide(("text",)), Wide(("tied",))
HEADS, GPT = Wide(("heads",)), Wide(("gpt",))
Q = "layers.0.self_attn.q_proj"
SEEN: dict[str, Seen] = {
    "wrong_type": Seen(
        LAYERS, {"r": 4, "lora_alpha": True, "target_modules": ["q_proj"]},
        lambda m: m.get_submodule(Q).scaling == {"default": 0.25},
    ),
    "unread_value": Seen(
        LAYERS, {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 0}},
    ),
    "constructor_rules": Seen(
        LAYERS, {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        lambda m: isinstance(m.get_submodule("layers.1.self_attn.q_proj"), LoraLayer),
    ),
    "negative_dropout": Seen(
        LAYERS, {"target_modules": ["q_proj"], "lora_dropout": -0.5},
        lambda m: isinstance(m.get_submodule(Q).lora_dropout["default"], nn.Identity),
    ),
    "not_finite": Seen(
        LAYERS, {"target_modules": ["q_proj"], "lora_alpha": float("nan")},
        lambda m: math.isnan(m.get_submodule(Q).scaling["default"]),
    ),
    "pissa_without_scaling": Seen(
        LAYERS, {"target_modules": ["q_proj"], "lora_alpha": 0, "init_lora_weights": "pissa"},
        lambda m: bool(_values(m, f"{Q}.weight").isnan().any()),
    ),
    "adapter_inside_saved": Seen(
        Wide(("moe",)),
        {"target_modules": [], "target_parameters": ["experts.up"], "modules_to_save": ["moe"]},
        lambda m: isinstance(m.moe.modules_to_save["default"].experts, LoraLayer),
    ),
    "saved_part_of_an_adapter": Seen(
        LAYERS, {"target_modules": ["q_proj"], "modules_to_save": ["layer"]},
        lambda m: isinstance(m.get_submodule(Q).base_layer, ModulesToSaveWrapper),
    ),
    "mica_in_capitals": Seen(
        LAYERS, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "MICA"},
        lambda m: (
            bool(_values(m, f"{Q}.lora_B.default.weight").any())
            and _values(m, f"{Q}.lora_B.default.weight").requires_grad
        ),
    ),
    "init_not_read": Seen(
        TEXT, {"target_modules": ["embed_tokens"], "init_lora_weights": "nonsense"},
        lambda m: not _values(m, "text.embed_tokens.lora_embedding_A.default").any(),
    ),
    "init_from_data": Seen(
        TEXT, {"target_modules": ["embed_tokens"], "init_lora_weights": "lora_ga"},
        lambda m: not _values(m, "text.embed_tokens.lora_embedding_A.default").any(),
    ),
    "rank_above_the_weight": Seen(
        LAYERS,
        {"r": 12, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        lambda m: (
            _values(m, f"{Q}.lora_A.default.weight").shape == (6, 6)
            and m.get_submodule(Q).scaling == {"default": 0.5}
        ),
    ),
    "olora_on_conv1d": Seen(
        GPT, {"r": 2, "target_modules": ["c_attn"], "init_lora_weights": "olora"},
        lambda m: _values(m, "gpt.c_attn.lora_A.default.weight").shape == (2, 8),
    ),
    "tied_weight_changed": Seen(
        TIED, {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": "pissa"},
        lambda m: not torch.equal(m.tied.embed_tokens.weight, TIED.build()[0].tied.embed_tokens.weight),
    ),
    "no_rows": Seen(
        TEXT, {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": []}},
        lambda m: fails(lambda: m(*TEXT.build()[1])),
    ),
    "negative_row": Seen(
        TEXT, {"target_modules": ["lm_head"], "trainable_token_indices": {"embed_tokens": [-1]}},
        lambda m: fails(lambda: m(*TEXT.build()[1])),
    ),
    "init_of_a_parameter": Seen(
        LAYERS,
        {
            "target_modules": [],
            "target_parameters": ["q_proj.weight"],
            "init_lora_weights": "orthogonal",
        },
        lambda m: bool(_values(m, f"{Q}.lora_B.default.weight").any()),
    ),
    "tokens_of_an_adapted_layer": Seen(
        Wide(("tied",), "llama"), {"target_modules": ["lm_head"], "trainable_token_indices": [0]},
        lambda m: isinstance(m.tied.lm_head.base_layer, TrainableTokensWrapper),
    ),
    "rows_of_a_saved_module": Seen(
        Wide(("tied",), "unheard_of"),
        {
            "target_modules": ["lm_head"],
            "trainable_token_indices": [0],
            "modules_to_save": ["embed_tokens"],
        },
        lambda m: fails(lambda: m(torch.randn(2, 3, WIDTH))),
    ),
    "attention_and_its_projection": Seen(
        HEADS, {"target_modules": ["mha", "out_proj"]},
        lambda m: (
            isinstance(m.heads.mha._modules["out_proj"], LoraLayer)
            and isinstance(m.heads.mha.base_layer.out_proj, LoraLayer)
            and m.heads.mha._modules["out_proj"] is not m.heads.mha.base_layer.out_proj
        ),
    ),
    "parameter_of_a_layer": Seen(
        Wide(("plain_conv",)), {"target_parameters": ["conv.weight"], "target_modules": []},
        lambda m: m.plain_conv.conv.num_experts == 6,
    ),
    "parameter_of_a_whole": Seen(
        Wide(("squared",)), {"target_parameters": ["bilinear.weight"], "target_modules": []},
        lambda m: m.squared.bilinear.num_experts == 6,
    ),
    "saved_inside_saved": Seen(
        Wide(("gpt", "classifier")),
        {"target_modules": ["classifier"], "modules_to_save": ["gpt", "c_attn"]},
        lambda m: m.gpt.original_module.c_attn is not m.gpt.modules_to_save["default"].c_attn,
    ),
    "task_of_generation": Seen(
        LAYERS, {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
        refused="no attribute 'prepare_inputs_for_generation'",
    ),
    "mamba_kernels": Seen(
        Wide(("heads",), "mamba"), {"target_modules": ["out_proj"]}, refused="Mamba-based models",
    ),
}  # fmt: skip


def test_every_deliberate_difference_has_a_predicate_and_an_example() -> None:
    rows = [row.name for row in DELIBERATE]
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(EXCUSES) == set(SEEN)
    assert {row.field for row in DELIBERATE} <= {"", *vars(LoraConfig())}


@pytest.mark.parametrize("row", DELIBERATE, ids=lambda r: r.name)
def test_a_deliberate_difference_is_what_it_says(row: Deliberate) -> None:
    seen = SEEN[row.name]
    case = attempt(seen.spec, {"r": 2, "lora_alpha": 6, **seen.chosen})
    found = differences(case)
    assert excused(case, found) == row.name, found
    if seen.refused:
        assert re.search(seen.refused, str(case.their_error))
    else:
        assert case.their_error is None
        assert seen.shows(case.theirs)
    if case.our_error is not None:
        assert type(case.our_error).__name__ == row.ours.split()[0]
        assert not unnamed(case)
    else:
        assert not row.ours.partition(" ")[0].endswith("Error")


def test_a_difference_without_a_row_is_not_excused() -> None:
    case = attempt(LAYERS, {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]})
    assert not differences(case)
    case.theirs.get_submodule(Q).lora_A["default"].weight.requires_grad_(False)
    case.theirs.get_submodule(Q).scaling["default"] = 1.0
    found = differences(case)
    assert len(found) == 3  # the adapter, the parameter, the counts
    assert not excused(case, found)
    case.their_error = ValueError("no")
    assert not excused(case, differences(case))
    case.our_error = ConfigError("r=2: no")
    assert not differences(case)
    case.their_error = None
    assert not excused(case, differences(case))
