"""PEFT's matching, and a reason for every verdict."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from torch import nn
from torch.nn import functional as F
from zoo import ZOO

import fxlora
from fxlora import matching
from fxlora.errors import ConfigError, NoMatchError, UnsupportedError
from fxlora.peft_side import common_name, wrapped
from fxlora.sites import sites


class Tiny(nn.Module):
    """Two named linear layers inside numbered blocks, and a head."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in range(layers)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["out"](torch.relu(layer["proj"](x)))
        return self.head(x)


class Outer(nn.Module):
    """The same below one more name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def planned(config: LoraConfig, model: nn.Module | None = None) -> fxlora.Plan:
    return fxlora.plan(fxlora.trace(model or Tiny()), config)


def adapted_by_peft(model: nn.Module, config: LoraConfig) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    return list(wrapped.targeted_module_names)


CONFIGS: dict[str, dict[str, Any]] = {
    "suffix": {"target_modules": ["proj"]},
    "two suffixes": {"target_modules": ["proj", "head"]},
    "exact": {"target_modules": ["layers.1.proj"]},
    "dotted suffix": {"target_modules": ["1.proj"]},
    "regex": {"target_modules": r"layers\.[02]\.(proj|out)"},
    "regex alternation": {"target_modules": "head|layers.0.out"},
    "tuple": {"target_modules": ("proj",)},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear"},
    "exclude": {"target_modules": ["proj"], "exclude_modules": ["layers.1.proj"]},
    "exclude regex": {"target_modules": ["proj"], "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["proj"], "layers_to_transform": 1},
    "no layers": {"target_modules": ["proj"], "layers_to_transform": []},
    "pattern": {
        "target_modules": ["proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "layer filter spares exact names": {
        "target_modules": ["layers.0.proj", "model.layers.0.proj", "out"],
        "layers_to_transform": [2],
    },
    "ranks": {"target_modules": ["proj", "out"], "rank_pattern": {"proj": 2, r"1\.out": 3}},
    "alphas": {"target_modules": ["proj"], "alpha_pattern": {"^layers.1.proj": 3}},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("build", [Tiny, lambda: Outer()], ids=["bare", "nested"])
def test_targets_are_those_peft_takes(name: str, build: Callable[[], nn.Module]) -> None:
    from peft.utils.error import NoMatchingPeftModuleError

    config, model = LoraConfig(r=4, **CONFIGS[name]), build()
    try:
        expected = adapted_by_peft(model, config)
    except NoMatchingPeftModuleError:
        # "layers.0.proj" has no layer index for PEFT: its pattern wants a name before "layers".
        with pytest.raises(NoMatchError):
            planned(config, model)
    else:
        assert [s.name for s in planned(config, model).adapted] == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_and_scalings_are_peft_s(name: str) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=name == "ranks", **CONFIGS[name])
    model = Outer() if "layer" in name else Tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    for s in planned(config, model).adapted:
        layer = wrapped.get_submodule(s.name)
        assert (s.r, s.scaling) == (layer.r["default"], layer.scaling["default"]), s.name


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", ZOO)
def test_all_linear_on_the_zoo_takes_what_peft_takes(name: str, task: str | None) -> None:
    model = ZOO[name].build()
    config = LoraConfig(target_modules="all-linear", task_type=task)
    traced = fxlora.trace(model, (), ZOO[name].inputs(2, 8))
    ours = [s.name for s in fxlora.plan(traced, config).adapted if s.kind != "Parameter"]
    if task == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
        pytest.skip("peft wraps a causal LM only where there is one")
    assert ours == adapted_by_peft(model, config)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_without_targets_the_model_type_decides(name: str) -> None:
    model = ZOO[name].build()
    traced = fxlora.trace(model, (), ZOO[name].inputs(2, 8))
    ours = [s.name for s in fxlora.plan(traced, LoraConfig()).adapted]
    assert ours == adapted_by_peft(model, LoraConfig())


_NAMES = st.from_regex(r"(layers\.)?[0-3]?(\.)?(a|b|proj|experts)(\.\d\.w1)?", fullmatch=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    key=st.lists(st.sampled_from(["layers", "0", "1", "12", "a", "b", "proj", "experts"]), min_size=1, max_size=6).map(".".join),
    targets=st.one_of(st.lists(_NAMES, max_size=3), st.sampled_from([r".*proj", r"layers\.\d+\..*", "a|b"])),
    exclude=st.one_of(st.none(), st.lists(_NAMES, max_size=2), st.just(r".*\.1\..*")),
    layers=st.one_of(st.none(), st.integers(-1, 3), st.lists(st.integers(0, 3), max_size=2)),
    pattern=st.sampled_from([None, [], "layers", ["experts", "layers"], ""]),
    save=st.one_of(st.none(), st.lists(st.sampled_from(["a", "proj", "layers.1"]), max_size=2)),
)  # fmt: skip
def test_matching_equals_peft_s_own_function(
    key: str, targets: Any, exclude: Any, layers: Any, pattern: Any, save: Any
) -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    config = SimpleNamespace(
        target_modules=targets, exclude_modules=exclude, layers_to_transform=layers,
        layers_pattern=pattern, modules_to_save=save, target_parameters=None,
    )  # fmt: skip
    found = matching.match(config, key)
    assert found.taken == bool(check_target_module_exists(config, key))
    assert found.reason


class TestSites:
    """Every linear map, whatever its spelling."""

    def test_a_weight_read_by_a_function_is_a_site_or_a_bypass_of_one(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.e = nn.Linear(4, 4)
                self.w = nn.Parameter(torch.randn(4, 4))
                self.v = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = F.linear(self.e(x), self.e.weight)
                x = x @ self.w.t()
                x = torch.addmm(x, x, self.v)
                return torch.einsum("bi,oi->bo", x, self.w)

        found = {s.name: s for s in sites(fxlora.trace(Model(), (torch.ones(2, 4),)))}
        assert [c.through_module for c in found["e"].calls] == [True, False]
        assert len(found["w"].calls) == 2
        assert found["w"].kind == "Parameter"
        assert len(found["v"].calls) == 1

    def test_a_shared_module_is_one_site_with_two_calls(self) -> None:
        layer = nn.Linear(4, 4)
        (site,) = sites(fxlora.trace(nn.Sequential(layer, nn.ReLU(), layer)))
        assert (site.name, site.aliases, len(site.calls)) == ("0", ("2",), 2)

    def test_albert_is_one_adapter_with_many_calls(self) -> None:
        entry = ZOO["albert"]
        plan = fxlora.plan(
            fxlora.trace(entry.build(), (), entry.inputs(2, 8)),
            LoraConfig(target_modules=["query"]),
        )
        (site,) = plan.adapted
        assert len(site.site.calls) == 4

    def test_a_layer_nobody_calls_is_still_a_site_and_is_warned_about(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)

        plan = planned(LoraConfig(target_modules="all-linear"), Model())
        assert [s.name for s in plan.adapted] == ["used", "unused"]
        assert any("never called" in w and "unused" in w for w in plan.warnings)


class TestErrors:
    """Refused by name, with the candidates, before anything is changed."""

    def test_no_match_names_the_candidates_and_the_nearest(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.proj(x))

        expected = (
            "target_modules=('prj',) selected none of the 2 linear sites ['proj', 'head']. "
            "Did you mean 'proj'?"
        )
        with pytest.raises(NoMatchError, match=f"^{re.escape(expected)}$"):
            planned(LoraConfig(target_modules=["prj"]), Two())

    def test_a_bare_linear_is_told_to_be_wrapped(self) -> None:
        from peft.utils.error import NoMatchingPeftModuleError

        model = nn.Linear(100, 200)
        config = LoraConfig(r=4, target_modules=["linear"])
        with pytest.raises(NoMatchError, match="Wrap it and name it"):
            planned(config, model)
        with pytest.raises(NoMatchingPeftModuleError):
            get_peft_model(copy.deepcopy(model), copy.deepcopy(config))

    def test_a_suffix_as_a_string_is_told_to_be_a_list(self) -> None:
        with pytest.raises(NoMatchError, match=r"write \['proj'\] for a suffix"):
            planned(LoraConfig(target_modules="proj"))

    def test_a_partial_match_is_a_warning_with_the_nearest_name(self) -> None:
        plan = planned(LoraConfig(target_modules=["proj", "haed"]))
        assert plan.warnings == (
            "target_modules entry 'haed' matches nothing. Did you mean 'head'?",
        )

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("r", 0, "at least 1"),
            ("r", 2.5, "positive int"),
            ("r", True, "positive int"),
            ("lora_alpha", "8", "a number"),
            ("lora_dropout", 1.5, "from 0.0 to 1.0"),
            ("lora_dropout", -0.1, "negative"),
            ("rank_pattern", None, "a dict"),
            ("rank_pattern", {"proj": 0}, "at least 1"),
            ("rank_pattern", {"(": 2}, "not a regular expression"),
            ("target_modules", "(", "not a regular expression"),
            ("target_modules", [3], "not a string"),
            ("bias", "some", "'none', 'all', 'lora_only'"),
            ("bias", None, "'none', 'all', 'lora_only'"),
            ("layers_to_transform", "0", "an int or a list of ints"),
        ],
    )
    def test_a_bad_value_is_refused_by_name(self, field: str, value: Any, message: str) -> None:
        config = LoraConfig(target_modules=["proj"])
        setattr(config, field, value)
        with pytest.raises(ConfigError, match=message) as caught:
            planned(config)
        assert field in str(caught.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("use_qalora", True),
            ("layer_replication", [(0, 2), (1, 3)]),
            ("alora_invocation_tokens", [1, 2]),
            ("init_lora_weights", "eva"),
            ("init_lora_weights", "loftq"),
            ("ensure_weight_tying", True),
        ],
    )
    def test_an_unsupported_field_is_refused_by_name(self, field: str, value: Any) -> None:
        config = LoraConfig(target_modules=["proj"])
        setattr(config, field, value)
        with pytest.raises(UnsupportedError, match=f"^{field}="):
            planned(config)

    def test_every_field_of_the_installed_loraconfig_is_accounted_for(self) -> None:
        import dataclasses

        from fxlora.config import HONOURED, NEUTRAL, REFUSED

        known = set(HONOURED) | set(NEUTRAL) | set(REFUSED)
        assert {f.name for f in dataclasses.fields(LoraConfig)} <= known
        assert not set(HONOURED) & set(REFUSED)

    def test_a_target_that_is_no_layer_is_refused_as_peft_does(self) -> None:
        with pytest.raises(UnsupportedError, match="which LoRA cannot adapt"):
            planned(LoraConfig(target_modules=["layers"]))
        with pytest.raises(ValueError, match="not supported"):
            adapted_by_peft(Tiny(), LoraConfig(target_modules=["layers"]))

    def test_something_else_than_a_loraconfig_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"LoraConfig\(r=8"):
            planned({"r": 8})  # type: ignore[arg-type]

    def test_the_config_is_not_changed(self) -> None:
        for targets in ("all-linear", ["proj"], None):
            model = Tiny() if targets else ZOO["llama"].build()
            config = LoraConfig(target_modules=targets)
            before = copy.deepcopy(config)
            traced = (
                fxlora.trace(model)
                if targets
                else fxlora.trace(model, (), ZOO["llama"].inputs(2, 8))
            )
            fxlora.plan(traced, config)
            assert config == before


class TestPlan:
    """A plan is a value that prints."""

    def test_totals_are_what_peft_prints(self) -> None:
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        plan = planned(LoraConfig(r=4, target_modules=["0", "2"]), model)
        assert (plan.trainable, plan.total, f"{plan.percent:.4f}") == (220, 545, "40.3670")

    def test_equal_layers_share_a_row(self) -> None:
        text = str(planned(LoraConfig(target_modules=["proj"])))
        assert text.count("layers.*.proj") == 1
        assert "x3" in text
        assert "trainable params: 192 || all params: 322 || trainable%: 59.6273" in text

    def test_same_input_prints_the_same_bytes(self) -> None:
        config = LoraConfig(target_modules=["out", "proj", "head"])
        assert str(planned(config)) == str(planned(config))

    def test_an_unknown_site_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(KeyError, match=r"Did you mean 'layers\.0\.proj'"):
            planned(LoraConfig(target_modules=["proj"]))["layers.0.prj"]


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(self.emb(x))
        return out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([-1], "has -1 for 'emb': a row counts from 0.* Write 9"),
        ([2, -8], "has -8 for 'emb': a row counts from 0.* Write 2"),
        ([10], "has 10 for 'emb', which has rows 0 to 9"),
        ([True], "holds True, no int"),
    ],
)
def test_a_row_peft_fails_on_is_refused(rows: list[int], message: str) -> None:
    graph = fxlora.trace(Rows(), (torch.arange(10),))
    config = LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": rows})
    with pytest.raises(ConfigError, match=message):
        fxlora.plan(graph, config)


def test_a_row_named_twice_trains_twice_as_in_peft() -> None:
    config = LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [1, 1]})
    result = fxlora.compare(Rows(), config, (torch.arange(10),))
    assert result.equal, str(result)
    assert result.plan.tokens[0].numel == 8


def test_a_plan_of_a_model_is_the_plan_of_its_graph() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=4, vocab_size=99)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    lora = LoraConfig(target_modules=["q_proj", "down_proj"])
    assert fxlora.plan(model, lora).to_dict() == fxlora.plan(fxlora.trace(model), lora).to_dict()
    assert set(dict(model.named_modules())) == set(dict(LlamaForCausalLM(config).named_modules()))


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_of_a_real_model_is_that_of_its_whole_trace(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(2, 8)
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["q_proj", "query"])
    at_once = fxlora.plan(model, config, kwargs=inputs)
    whole = fxlora.plan(fxlora.trace(model, (), inputs), config)
    assert str(at_once) == str(whole)
    assert at_once.to_dict() == whole.to_dict()


def test_a_plan_of_a_model_is_for_looking_at() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lora = LoraConfig(target_modules=["0"])
    with pytest.raises(ValueError, match="plan again with fxlora"):
        fxlora.rewrite(fxlora.trace(model), fxlora.plan(model, lora, args=(torch.ones(1, 4),)))


# ---- what inference_mode leaves to train -------------------------------------------------------

FROZEN = {
    "plain": {},
    "lora-bias": {"lora_bias": True},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": KasaConfig(), "target_modules": ["1"]},
    "whole": {"target_modules": ["1"], "modules_to_save": ["2"]},
    "rows": {"target_modules": ["1"], "trainable_token_indices": {"0": [1, 2]}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("kind", FROZEN)
def test_what_trains_in_inference_mode_is_what_trains_with_peft(
    kind: str, inference: bool, bias: str, dtype: torch.dtype
) -> None:
    """PEFT freezes in one place and thaws in two: `bias`, and its cast of loose parameters."""
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)).to(dtype)
    targets = ["1", "2"] if kind == "lora-bias" else ["0", "1"]
    settings = {"r": 2, "target_modules": targets, "bias": bias, "inference_mode": inference}
    config = LoraConfig(**{**settings, **FROZEN[kind]})
    theirs = get_peft_model(copy.deepcopy(net), config)
    traced = fxlora.trace(net, (torch.zeros(2, dtype=torch.long),))
    plan = fxlora.plan(traced, config)
    assert (plan.trainable, plan.total) == theirs.get_nb_trainable_parameters()
    ours = fxlora.rewrite(traced, plan)
    flags = {common_name(n): p.requires_grad for n, p in wrapped(theirs).named_parameters()}
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == flags
    assert any("inference_mode=True" in w for w in plan.warnings) == inference
