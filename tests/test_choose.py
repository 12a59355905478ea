"""The smallest targets: exactly the wanted names by peft's own matching, and none smaller exists."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn
from zoo import ZOO, _model

import fxlora
from fxlora.choose import (
    Choice,
    _modules,
    choose,
    taken_by_peft,
    wanted_sites,
)
from fxlora.errors import ConfigError
from fxlora.patterns import smallest_regex
from fxlora.suffixes import smallest_lists

SEGMENTS = ["a", "b", "q", "0", "1", "10"]
names = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=4).map(".".join)
universes = st.lists(names, min_size=1, max_size=9, unique=True)


@st.composite
def questions(draw: Any) -> tuple[list[str], list[str]]:
    universe = draw(universes)
    wanted = draw(st.lists(st.sampled_from(universe), min_size=1, unique=True))
    return universe, wanted


def config(fields: Any) -> LoraConfig:
    made = {
        "target_modules": fields.targets
        if isinstance(fields.targets, str)
        else list(fields.targets)
    }
    if fields.excluded:
        made["exclude_modules"] = (
            fields.excluded if isinstance(fields.excluded, str) else list(fields.excluded)
        )
    if fields.layers:
        made["layers_to_transform"] = list(fields.layers)
    return LoraConfig(**made)


@settings(max_examples=300, deadline=None)
@given(questions())
def test_the_choice_takes_exactly_the_wanted_names_by_peft_s_own_matching(
    question: tuple[list[str], list[str]],
) -> None:
    universe, wanted = question
    fields, regex = _modules(universe, wanted)
    assert taken_by_peft(config(fields), universe) == set(wanted)
    assert taken_by_peft(LoraConfig(target_modules=regex), universe) == set(wanted)


def brute_force(universe: list[str], wanted: set[str], limit: int) -> int | None:
    """Returns the fewest entries, targets and exclusions together, by trying them all."""
    ends = {".".join(n.split(".")[i:]) for n in universe for i in range(n.count(".") + 1)}
    takes = {e: frozenset(n for n in universe if n == e or n.endswith(f".{e}")) for e in ends}
    entries = [(e, True) for e in sorted(ends)] + [(e, False) for e in sorted(ends)]
    for size in range(1, limit + 1):
        for chosen in itertools.combinations(entries, size):
            taken = set().union(*(takes[e] for e, target in chosen if target))
            left = set().union(*(takes[e] for e, target in chosen if not target))
            if taken - left == wanted:
                return size
    return None


small = st.lists(
    st.lists(st.sampled_from(["a", "q", "0", "1"]), min_size=1, max_size=3).map(".".join),
    min_size=1, max_size=5, unique=True,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(small, st.data())
def test_no_smaller_lists_exist(universe: list[str], data: Any) -> None:
    wanted = data.draw(st.lists(st.sampled_from(universe), min_size=1, unique=True))
    found = smallest_lists(universe, wanted)
    limit = 4 if found is None else min(found.entries - 1, 4)
    smaller = brute_force(universe, set(wanted), limit)
    assert smaller is None, (found, smaller)


def test_the_brute_force_finds_what_there_is() -> None:
    assert brute_force(["x.q", "y.q", "y.k"], {"x.q", "y.q"}, 2) == 1
    assert brute_force(["a", "b.a"], {"a"}, 2) == 2


def test_an_exclusion_stands_where_targets_alone_cannot_say_it() -> None:
    found = smallest_lists(["a", "b.a"], ["a"])
    assert found is not None
    assert (found.targets, found.excluded) == (("a",), ("b.a",))


def test_no_exclusion_stands_where_targets_alone_are_as_short() -> None:
    found = smallest_lists(["x.q", "y.q", "x.k", "y.k"], ["x.q", "y.q"])
    assert found is not None
    assert (found.targets, found.excluded) == (("q",), ())


def test_exclusions_count_as_entries() -> None:
    found = smallest_lists([f"{n}.q" for n in "01abc"], ["0.q", "1.q"])
    assert found == (("0.q", "1.q"), (), ())
    assert smallest_lists([f"{n}.q" for n in "01abc"], [f"{n}.q" for n in "01ab"]) == (
        ("q",), ("c.q",), (),
    )  # fmt: skip


def test_what_no_lists_can_say_is_said_by_a_regex() -> None:
    universe, wanted = ["a", "b.a", "c.b.a", "b.q"], ["a", "c.b.a", "b.q"]
    assert smallest_lists(universe, wanted) is None
    fields, regex = _modules(universe, wanted)
    assert fields.targets == regex
    assert {n for n in universe if re.fullmatch(regex, n)} == set(wanted)


def test_some_layers_are_said_by_layers_to_transform() -> None:
    universe = [f"model.layers.{i}.attn.{n}_proj" for i in range(12) for n in "qkv"]
    fields, regex = _modules(universe, [n for n in universe if ".q_" in n and int(n[13:-12]) < 10])
    assert fields == (("q_proj",), (), tuple(range(10)))
    assert regex == r".*\.\d\.attn\.q_proj"


def test_an_exact_name_outside_of_the_layers_goes_beside_layers_to_transform() -> None:
    universe = [f"model.layers.{i}.q" for i in range(8)] + ["head"]
    fields, _ = _modules(
        universe, ["model.layers.0.q", "model.layers.1.q", "model.layers.2.q", "head"]
    )
    assert fields == (("head", "q"), (), (0, 1, 2))
    assert taken_by_peft(config(fields), universe) == {
        "head",
        *(f"model.layers.{i}.q" for i in range(3)),
    }


def test_a_part_of_the_model_is_left_out_by_one_pattern() -> None:
    universe = [f"{t}.layers.{i}.q" for t in ("vision", "text") for i in range(12)]
    fields, regex = _modules(universe, [n for n in universe if n.startswith("text")])
    assert fields == (("q",), r"vision\..*", ())
    assert {n for n in universe if re.fullmatch(regex, n)} == {n for n in universe if "text" in n}


def test_numbers_are_said_exactly() -> None:
    universe = [f"h.{i}.q" for i in range(120)]
    for low, high in ((0, 15), (7, 23), (99, 101), (0, 119), (5, 5)):
        wanted = {f"h.{i}.q" for i in range(low, high + 1)}
        pattern = smallest_regex(universe, wanted)
        assert {n for n in universe if re.fullmatch(pattern, n)} == wanted
        assert len(pattern) < 50


@pytest.fixture(scope="module")
def moe() -> Any:
    return fxlora.trace(ZOO["qwen3_moe"].build(), (), ZOO["qwen3_moe"].inputs(2, 16))


def test_words_name_what_is_wanted(moe: Any) -> None:
    attention = wanted_sites(moe, "attention")
    assert {n.rpartition(".")[2] for n in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(".1." in n for n in wanted_sites(moe, "attention @ 1"))
    linear = set(wanted_sites(moe, "all-linear"))
    routers = set(wanted_sites(moe, "router"))
    assert routers == {f"model.layers.{i}.mlp.gate.weight" for i in range(3)}
    assert set(wanted_sites(moe, "all-linear - router")) == linear - routers
    assert wanted_sites(moe, "head") == ["lm_head"]


def test_everything_but_the_router_is_what_peft_then_adapts(moe: Any) -> None:
    choice = choose(moe, "all-linear - router")
    plan = fxlora.plan(moe, LoraConfig(r=4, **choice.fields()))
    assert {p.name for p in plan.adapted} == set(choice.wanted)
    assert choice.exact
    assert choice.target_parameters == ("down_proj", "gate_up_proj")


def test_a_share_of_the_flops_is_the_fewest_kinds_that_have_it() -> None:
    traced = fxlora.trace(ZOO["llama"].build(), (), ZOO["llama"].inputs(2, 16))
    from fxlora.flops import example_sizes, site_flops
    from fxlora.sites import sites

    sizes = example_sizes(traced)
    flops = {s.name: site_flops(s, sizes) for s in sites(traced)}
    for share in (0.3, 0.5, 0.8):
        taken = wanted_sites(traced, f"{100 * share:g}% flops")
        kinds = {n.rpartition(".")[2] for n in taken}
        assert sum(flops[n] for n in taken) >= share * sum(flops.values())
        every = {n.rpartition(".")[2] for n in flops}
        for fewer in itertools.combinations(sorted(every), len(kinds) - 1):
            have = sum(f for n, f in flops.items() if n.rpartition(".")[2] in fewer)
            assert have < share * sum(flops.values())
    with pytest.raises(ConfigError, match=r"100 % is more than|101 % is more than"):
        wanted_sites(traced, "101% flops")


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper", "vit", "bert", "albert"])
def test_on_real_models_peft_adapts_exactly_the_choice(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    traced = fxlora.trace(model, (), entry.inputs(2, 16))
    for words in ("attention", "all-linear", "60% parameters", "attention @ 0"):
        try:
            choice = choose(traced, words)
        except ConfigError:
            assert "@" in words or "%" in words
            continue
        for fields in (choice.fields(), choice.regex_fields()):
            assert adapted_by_peft(entry.build(), fields) == set(choice.wanted)
        assert choice.exact
        assert choice.regex_exact


def adapted_by_peft(model: nn.Module, fields: dict[str, Any]) -> set[str]:
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    made = inject_adapter_in_model(LoraConfig(**fields), model)
    return {n for n, m in made.named_modules() if isinstance(m, LoraLayer)}


def test_a_name_peft_renames_is_not_passed_off_as_a_choice_that_works() -> None:
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "vocab_size": 99, "n_shared_experts": 1,
    }  # fmt: skip
    model = _model("DeepseekV3ForCausalLM", "DeepseekV3Config", **settings)()
    traced = fxlora.trace(model, (), {"input_ids": torch.ones(2, 8, dtype=torch.long)})
    choice = choose(traced, ["model.layers.0.mlp.down_proj"])
    assert not choice.exact
    assert any("not what peft makes of it" in n for n in choice.notes)
    assert choose(traced, "attention").exact


def test_attention_takes_its_output_projection_along() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    traced = fxlora.trace(nn.TransformerEncoder(layer, 2).train(), (torch.randn(2, 8, 16),))
    choice = choose(traced, "attention")
    assert choice.target_modules == ("self_attn",)
    plan = fxlora.plan(traced, LoraConfig(**choice.fields()))
    assert {p.name for p in plan.adapted} == set(choice.wanted)
    dead = choose(traced, ["layers.0.self_attn.out_proj"])
    assert any("has no effect" in n for n in dead.notes)


def test_errors_name_the_value_and_the_candidates() -> None:
    traced = fxlora.trace(ZOO["llama"].build(), (), ZOO["llama"].inputs(2, 16))
    with pytest.raises(ConfigError, match=r"wanted='model.layers.0.mlp.up_prj' is none of the 23"):
        choose(traced, ["model.layers.0.mlp.up_prj"])
    with pytest.raises(ConfigError, match=r"'atention' selects no site.*Did you mean 'attention'"):
        choose(traced, "atention")
    with pytest.raises(ConfigError, match="nothing is wanted"):
        choose(traced, lambda site: False)
    with pytest.raises(ConfigError, match="'x' is no index"):
        choose(traced, "attention @ x")


def test_a_choice_prints_what_to_write() -> None:
    choice = Choice(("x.q",), ("q",), regex=r".*\.q")
    assert str(choice) == (
        "1 site, 1 to write:\n  target_modules=['q']\n  or as one regex: target_modules='.*\\\\.q'"
    )
    assert choice.to_dict()["target_modules"] == ["q"]
