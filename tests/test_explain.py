"""Explanations: every rule says what peft's own code decides, and every kind of name has one."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import inspect_matched_modules
from torch import nn
from zoo import ZOO, _model

import fxlora
from fxlora.choose import taken_by_peft
from fxlora.errors import NoMatchError
from fxlora.example_inputs import for_model
from fxlora.explain import explain, explain_dict, explain_text
from fxlora.ladder import ladder

SEGMENTS = ["layers", "h", "attn", "q", "k", "q_proj", "0", "1", "10"]
names = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=5).map(".".join)
entries = st.lists(
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join),
    max_size=3,
    unique=True,
)
patterns = st.sampled_from([r".*q_proj", r"layers\..*", r"q|k", r".*\.\d+\..*", r"q_pro", r".*"])


@st.composite
def configs(draw: Any) -> LoraConfig:
    fields: dict[str, Any] = {"target_modules": draw(st.one_of(entries, patterns))}
    if draw(st.booleans()):
        fields["exclude_modules"] = draw(st.one_of(entries, patterns))
    if draw(st.booleans()):
        fields["modules_to_save"] = draw(entries)
    if not isinstance(fields["target_modules"], str) and draw(st.booleans()):
        fields["layers_to_transform"] = draw(
            st.one_of(st.integers(0, 2), st.lists(st.integers(0, 11), max_size=3))
        )
        if draw(st.booleans()):
            fields["layers_pattern"] = draw(st.sampled_from(["layers", "h", ["h", "layers"], ""]))
    return LoraConfig(**fields)


@settings(max_examples=400, deadline=None)
@given(configs(), names)
def test_the_rules_decide_what_peft_s_own_code_decides(config: LoraConfig, name: str) -> None:
    steps = ladder(config, name)
    took = [s for s in steps if s.outcome == "takes"]
    left = [s for s in steps if s.outcome == "leaves"]
    assert bool(took) == bool(taken_by_peft(config, [name]))
    assert len(took) + len(left) == 1  # exactly one rule decides
    assert [s.rule for s in steps] == [
        "exclude_modules", "modules_to_save", "target_modules", "layers_to_transform",
    ]  # fmt: skip
    for s in steps:
        assert s.hit in name


def planned(name: str, **fields: Any) -> tuple[Any, Any]:
    entry = ZOO[name]
    traced = fxlora.trace(entry.build(), (), entry.inputs(2, 16))
    return traced, fxlora.plan(traced, LoraConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": r".*\.[vk]_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"], "layers_to_transform": [0]},
    ],
)
def test_on_a_model_peft_has_wrapped_the_explanations_are_what_it_matched(fields: Any) -> None:
    traced, plan = planned("llama", **fields)
    matched = set(matched_by_peft(ZOO["llama"].build(), LoraConfig(**fields)))
    for p in plan:
        made = explain(traced, plan, p.name)
        assert (made.verdict == "adapted") == (p.name in matched), p.name
        decided = [s.outcome for s in made.steps if s.outcome in ("takes", "leaves")]
        assert decided == (["takes"] if p.name in matched else ["leaves"])


def matched_by_peft(model: nn.Module, config: LoraConfig) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = LoraModel(model, config, "default")
    # Names of what was wrapped appear with their adapters; only the layer itself is asked about.
    found = inspect_matched_modules(tuner)["matched"]
    return [n for n in found if "lora_" not in n and "base_layer" not in n]


def test_a_rule_that_passes_and_the_one_that_decides_both_say_why() -> None:
    traced, plan = planned(
        "llama", target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=["lm_head"],
        exclude_modules=["k_proj"],
    )  # fmt: skip
    made = explain(traced, plan, "model.layers.2.self_attn.q_proj")
    assert [(s.outcome, s.reason) for s in made.steps] == [
        ("passes", "none of its 1 entries is the name or a dotted suffix"),
        ("passes", "not in or below ['lm_head']"),
        ("passes", "suffix: 'q_proj' is a dotted suffix of its name"),
        ("leaves", "layer 2 is not in [0]"),
    ]
    assert made.verdict == "skipped"
    assert explain(traced, plan, "lm_head").rule == "modules_to_save"


def test_a_pattern_that_matches_a_part_of_the_name_says_so_and_how_to_mend_it() -> None:
    traced, plan = planned("llama", target_modules="q_proj|.*v_proj")
    step = explain(traced, plan, "model.layers.0.self_attn.q_proj").steps[2]
    assert step.hit == "q_proj"
    assert step.reason.startswith("the pattern 'q_proj|.*v_proj' matches only 'q_proj' of it")


def test_the_entries_take_as_many_sites_as_they_say() -> None:
    traced, plan = planned("whisper", target_modules=["fc1"])
    modules = [n for n, _ in fxlora.facts.info(traced).model.named_modules() if n]
    for name in (
        "model.encoder.layers.1.self_attn.q_proj",
        "model.decoder.layers.0.fc2",
        "proj_out",
    ):
        made = explain(traced, plan, name)
        assert made.entries
        for e in made.entries:
            taken = taken_by_peft(LoraConfig(target_modules=[e.entry]), modules)
            assert name in taken
            assert (len(taken), e.refused) == (e.takes, ())
    shortest = explain(traced, plan, "model.encoder.layers.1.self_attn.q_proj").entries[0]
    assert (shortest.entry, shortest.takes) == ("q_proj", 6)


def test_rank_keys_that_apply_are_shadowed_or_nearly_match_are_told_apart() -> None:
    keys = {"self_attn.q_proj": 4, "q_proj": 2, "q_pro": 3, "k_proj": 5, "self_attn.q_prj": 6}
    traced, plan = planned("llama", target_modules=["q_proj"], rank_pattern=keys)
    made = explain(traced, plan, "model.layers.0.self_attn.q_proj")
    assert {p.key: p.status for p in made.patterns} == {
        "self_attn.q_proj": "applies", "q_proj": "shadowed", "q_pro": "nearly",
        "self_attn.q_prj": "nearly",
    }  # fmt: skip
    assert made.adapter is not None
    assert made.adapter["r"] == 4


def test_an_adapted_site_says_its_adapter_its_calls_and_that_it_is_live() -> None:
    traced, plan = planned("albert", target_modules=["query"], r=4, lora_alpha=8)
    (name,) = [p.name for p in plan.adapted]
    made = explain(traced, plan, name)
    assert made.adapter is not None
    assert made.effect is not None
    assert made.adapter["parameters"] == {
        "lora_A.default.weight": [4, 32], "lora_B.default.weight": [32, 4],
    }  # fmt: skip
    assert made.adapter["trainable"] == plan.trainable == 256
    assert len(made.calls) == 4
    assert "modeling_albert.py" in made.calls[0]
    assert "site-packages" not in str(made)
    assert made.effect["verdict"] == "live"
    assert made.effect["witness"][-1] == "output"


def test_the_effect_of_one_site_is_its_effect_among_all() -> None:
    for name, targets in (
        ("llama", ["q_proj", "up_proj"]),
        ("qwen3_moe", "all-linear"),
        ("t5", ["k"]),
    ):
        traced, plan = planned(name, target_modules=targets)
        for e in list(fxlora.effects(fxlora.rewrite(traced, plan)))[:8]:
            found = explain(traced, plan, e.site).effect
            assert found is not None
            assert found["verdict"] == e.verdict, e.site


def encoder(**fields: Any) -> tuple[Any, Any]:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    traced = fxlora.trace(nn.TransformerEncoder(layer, 2).train(), (torch.randn(2, 8, 16),))
    return traced, fxlora.plan(traced, LoraConfig(**fields))


def test_an_adapter_without_effect_says_so() -> None:
    made = explain(*encoder(target_modules=["out_proj"]), "layers.0.self_attn.out_proj")
    assert made.verdict == "adapted"
    assert made.effect is not None
    assert made.effect["verdict"] == "bypassed"
    assert made.bypassed == 1


def test_a_projection_adapted_with_its_attention_names_the_attention() -> None:
    made = explain(*encoder(target_modules=["self_attn"]), "layers.0.self_attn.out_proj")
    assert made.steps[0].rule == "attention"
    assert made.steps[0].hit in made.name
    assert any(s.startswith("attention_out_proj_doubled") for s in made.surprises)


def test_an_alias_is_explained_as_what_it_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x) + self.b(x)

    traced = fxlora.trace(Twice(), (torch.randn(2, 4),))
    made = explain(traced, fxlora.plan(traced, LoraConfig(target_modules=["a"])), "b")
    assert "another name of a" in made.is_a
    assert any("a target that names 'b' matches nothing; write 'a'" in s for s in made.surprises)
    assert made.effect is not None
    assert made.effect["verdict"] == "partial"


@pytest.fixture(scope="module")
def phi3() -> Any:
    with torch.device("meta"):
        model = _model("Phi3ForCausalLM", "Phi3Config", num_hidden_layers=4)()
    traced = fxlora.trace(model, *for_model(model, (), None))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return traced, fxlora.plan(traced, LoraConfig(r=32, target_modules=targets))


def test_a_slice_is_explained_as_rows_of_its_fused_layer(phi3: Any) -> None:
    for name in ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.gate_up_proj.gate"):
        made = explain(*phi3, name)
        assert (made.what, made.verdict) == ("slice", "skipped")
        assert made.is_a == (
            "no layer of its own: rows 0:8192 of model.layers.3.mlp.gate_up_proj (8192 of 16384), "
            "its 'gate' part"
        )
        assert made.entries[0].entry == "gate_up_proj"
        assert any("6,291,456 trainable" in a for a in made.advice)
        assert not any("qkv_proj (" in a for a in made.advice)  # of the other fused layer


def test_a_slice_that_has_an_adapter_of_its_own_is_a_site(phi3: Any) -> None:
    traced, _ = phi3
    config = LoraConfig(r=4, target_modules=["gate_proj"], layers_to_transform=[3])
    plan = fxlora.plan(traced, config, reach="slices")
    made = explain(traced, plan, "model.layers.3.mlp.gate_proj")
    assert (made.what, made.verdict) == ("site", "adapted")
    assert [s.outcome for s in made.steps] == ["not set", "not set", "passes", "takes"]
    assert any(s.startswith("beyond PEFT") for s in made.surprises)
    other = explain(traced, plan, "model.layers.2.mlp.gate_proj")
    assert other.steps[-1].outcome == "leaves"
    whole = explain(traced, plan, "model.layers.3.mlp.gate_up_proj")
    assert made.share_of_flops is not None
    assert whole.share_of_flops == pytest.approx(2 * made.share_of_flops)


def test_a_container_lists_the_sites_below_it(phi3: Any) -> None:
    made = explain(*phi3, "model.layers.3.mlp")
    assert made.what == "container"
    assert [(n.rpartition(".")[2], v) for n, v, _ in made.sites] == [
        ("gate_up_proj", "skipped"), ("down_proj", "adapted"),
    ]  # fmt: skip
    assert made.advice[0].endswith(
        r"a regex for these alone is '.*\\.3\\.mlp\\.(down|gate_up)_proj'"
    )


def test_a_module_that_is_no_site_says_why(phi3: Any) -> None:
    made = explain(*phi3, "model.layers.3.mlp.activation_fn")
    assert made.what == "module"
    assert "a SiLUActivation is none of them" in made.advice[0]


def test_the_end_of_some_names_is_explained_as_an_entry(phi3: Any) -> None:
    assert explain(*phi3, "o_proj").advice == ("as a target_modules entry 'o_proj' takes 4 sites",)
    made = explain(*phi3, "gate_proj")
    assert made.what == "entry"
    assert "it names 4 slices of gate_up_proj" in made.advice[0]


def test_a_name_that_does_not_exist_names_the_nearest(phi3: Any) -> None:
    with pytest.raises(
        NoMatchError, match=r"is no module, parameter or slice of Phi3ForCausalLM"
    ) as e:
        explain(*phi3, "model.layers.3.mlp.gate_prj")
    assert "'model.layers.3.mlp.gate_proj'" in str(e.value)
    with pytest.raises(NoMatchError, match="The names begin with model, lm_head"):
        explain(*phi3, "foo")


def test_a_parameter_that_is_no_site_and_a_weight_that_is(phi3: Any) -> None:
    assert explain(*phi3, "model.norm.weight").what == "parameter"
    made = explain(*phi3, "model.layers.0.self_attn.o_proj.weight")
    assert made.verdict == "adapted"
    assert "is its weight" in made.is_a


def test_a_target_peft_renames_says_that_no_target_reaches_the_layer() -> None:
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "vocab_size": 99, "n_shared_experts": 1,
    }  # fmt: skip
    model = _model("DeepseekV3ForCausalLM", "DeepseekV3Config", **settings)()
    traced = fxlora.trace(model, (), {"input_ids": torch.ones(2, 8, dtype=torch.long)})
    plan = fxlora.plan(traced, LoraConfig(target_modules="all-linear"))
    made = explain(traced, plan, "model.layers.0.mlp.up_proj")
    assert made.verdict == "skipped"
    assert any("huggingface/peft#3711" in s for s in made.surprises)
    assert all(e.renamed == "gate_up_proj" for e in made.entries)
    experts = explain(traced, plan, "model.layers.1.mlp.experts.gate_up_proj")
    assert any("2 times the 8 asked for" in s for s in experts.surprises)
    router = explain(traced, plan, "model.layers.1.mlp.gate.weight")
    assert any("it is a router" in s for s in router.surprises)


def test_text_and_data_are_the_same_every_time_and_change_nothing(phi3: Any) -> None:
    traced, plan = phi3
    before, code = str(plan), traced.code
    for name in (
        "model.layers.3.self_attn.o_proj",
        "model.layers.3.mlp.gate_proj",
        "lm_head",
        "model",
    ):
        assert explain_text(traced, plan, name) == explain_text(traced, plan, name)
        json.dumps(explain_dict(traced, plan, name))
    assert (str(plan), traced.code) == (before, code)


def test_the_text_reads_as_the_page_shows_it() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    traced = fxlora.trace(model, (torch.randn(2, 10),))
    plan = fxlora.plan(traced, LoraConfig(r=4, target_modules=["0"]))
    lines = explain_text(traced, plan, "0").splitlines()
    assert lines[0] == "0: adapted"
    assert "  target_modules         takes    exact: '0' is its name" in lines
    assert "    lora_A.default.weight  4 x 10" in lines
    assert "  effect: live: its gradient arrives" in lines
