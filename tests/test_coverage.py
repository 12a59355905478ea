"""What a plan covers: FLOPs as torch counts them, shares that add up, gaps that show."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, _model

import fxlora
from fxlora import models
from fxlora.coverage import Coverage, coverage
from fxlora.errors import ConfigError
from fxlora.example_inputs import for_model
from fxlora.flops import example_sizes, site_flops
from fxlora.fused import fused_advice, slices_named
from fxlora.roles import place_of, role_of
from fxlora.sites import sites

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=4, stride=2)
        self.c = nn.Linear(8, 5)
        self.d = nn.Conv1d(5, 6, 1)
        self.unused = nn.Conv3d(3, 4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.d(self.c(self.b(self.a(x)).mean((2, 3))).unsqueeze(-1))


def counted(traced: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        traced(*args, **kwargs)
    counts = counter.get_flop_counts()
    return {k.partition(".")[2]: sum(v.values()) for k, v in counts.items()}


@pytest.mark.parametrize(
    "name", ["seed", "gpt2", "llama", "bert", "t5", "vit", "whisper", "albert"]
)
def test_flops_are_what_torch_counts_for_every_layer(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs(2, 16)
    traced = fxlora.trace(entry.build(), (), inputs)
    given = {
        o: inputs[o.partition(".")[0]].size(int(o[-2])) for o in fxlora.facts.info(traced).sizes.values()
    }  # fmt: skip
    sizes = example_sizes(traced, given)
    theirs = counted(traced, (), inputs)
    mine = {s.name: site_flops(s, sizes) for s in sites(traced)}
    assert mine == {n: theirs.get(n, 0) for n in mine}
    assert sum(mine.values()) > 0


def test_flops_of_convolutions_are_what_torch_counts() -> None:
    x = torch.randn(2, 3, 16, 16)
    traced = fxlora.trace(Convolutions(), (x,))
    theirs = counted(traced, (x,), {})
    for s in sites(traced):
        assert site_flops(s, example_sizes(traced)) == theirs.get(s.name, 0), s.name


def test_attention_s_two_projections_are_counted_once_each() -> None:
    x = torch.randn(2, 16, 16)
    traced = fxlora.trace(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).train(), (x,))
    flops = {s.name: site_flops(s, example_sizes(traced)) for s in sites(traced)}
    tokens = 2 * 16
    assert flops["self_attn"] == 2 * tokens * 16 * 48
    assert flops["self_attn.out_proj"] == 2 * tokens * 16 * 16


def test_an_expert_layer_costs_what_the_chosen_experts_cost() -> None:
    traced = fxlora.trace(ZOO["qwen3_moe"].build(), (), ZOO["qwen3_moe"].inputs(2, 16))
    flops = {s.name: site_flops(s, example_sizes(traced)) for s in sites(traced)}
    tokens, chosen = 2 * 16, 2
    assert flops["model.layers.0.mlp.experts.gate_up_proj"] == 2 * tokens * chosen * 32 * 32
    assert flops["model.layers.0.mlp.gate.weight"] == 2 * tokens * 32 * 4


def test_flops_follow_the_sizes_one_names() -> None:
    entry = ZOO["llama"]
    traced = fxlora.trace(entry.build(), (), entry.inputs(2, 16))
    plan = fxlora.plan(traced, LoraConfig(target_modules=["q_proj"]))
    short = coverage(traced, plan, {"input_ids.size(1)": 8})
    long = coverage(traced, plan, {"input_ids.size(1)": 32, "s0": 4})
    assert long.flops == 8 * short.flops
    assert long.sizes == {"input_ids.size(0)": 4, "input_ids.size(1)": 32}
    assert long.share_of_flops == pytest.approx(short.share_of_flops)
    with pytest.raises(ConfigError, match=r"sizes='length': the graph has no such size; it has s0"):
        coverage(traced, plan, {"length": 8})


# ---- shares and states


def covered(model: nn.Module, inputs: dict[str, Any], **fields: Any) -> tuple[Any, Any, Coverage]:
    traced = fxlora.trace(model, (), inputs)
    plan = fxlora.plan(traced, LoraConfig(**fields))
    return traced, plan, coverage(traced, plan)


def test_shares_are_those_of_the_adapted_sites_and_rows_add_up() -> None:
    entry = ZOO["llama"]
    traced, plan, c = covered(
        entry.build(), entry.inputs(2, 16), target_modules=["q_proj", "up_proj"]
    )
    every = {s.name: s for s in sites(traced)}
    whole = sum(s.shape[0] * s.shape[1] for s in every.values())
    part = sum(p.site.shape[0] * p.site.shape[1] for p in plan.adapted)
    assert (c.parameters, c.covered_parameters) == (whole, part)
    assert sum(r.parameters for r in c) == c.parameters
    assert sum(r.flops for r in c) == c.flops
    assert sum(len(r.sites) for r in c) == len(plan)
    assert c.trainable == plan.trainable
    assert 0 < c.share_of_flops < 1


def test_a_tied_weight_counts_once_and_is_covered_by_either_name() -> None:
    entry = ZOO["gpt2"]
    _, _, c = covered(entry.build(), entry.inputs(2, 16), target_modules=["lm_head"])
    rows = {r.target: r for r in c}
    assert rows["lm_head"].note == "same weight as transformer.wte"
    assert c.parameters == sum(r.parameters for r in c) - rows["lm_head"].parameters
    assert c.covered_parameters == 99 * 32
    _, _, c = covered(entry.build(), entry.inputs(2, 16), target_modules=["wte"])
    assert c.covered_parameters == 99 * 32


def test_layers_fold_into_the_ranges_in_which_nothing_changes() -> None:
    model = _model(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=16, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=31, num_hidden_layers=12,
    )()  # fmt: skip
    _, _, c = covered(
        model, {"input_ids": torch.ones(2, 8, dtype=torch.long)},
        target_modules=["q_proj"], layers_to_transform=[3, 4, 5, 9],
    )  # fmt: skip
    row = next(r for r in c if r.target == "self_attn.q_proj")
    assert row.gaps == (0, 1, 2, 6, 7, 8, 10, 11)
    lines = c.text(ascii_only=True).splitlines()
    head = next(line for line in lines if line.startswith("model.layers"))
    assert head.split()[2:7] == ["0-2", "3-5", "6-8", "9", "10-11"]
    line = next(line for line in lines if line.startswith("self_attn.q_proj"))
    assert "... not  ### adapted  ... not  # adapted  .. not" in line


def test_many_changes_become_one_bar_a_character_a_layer() -> None:
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(10))
    model.forward = lambda x: sum(b["q"](x) for b in model.blocks)  # type: ignore[method-assign]
    traced = fxlora.trace(model, (torch.randn(2, 4),))
    plan = fxlora.plan(traced, LoraConfig(target_modules=r"blocks\.[02468]\.q"))
    assert "#.#.#.#.#." in coverage(traced, plan).text(ascii_only=True)
    assert "█░█░█░█░█░" in str(coverage(traced, plan))


def test_experts_fold_and_say_how_many_are_adapted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
                for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> Any:
            for layer in self.layers:
                for e in layer["experts"]:  # type: ignore[index]
                    x = e(x)
            return x

    traced = fxlora.trace(Experts(), (torch.randn(2, 4),))
    plan = fxlora.plan(traced, LoraConfig(target_modules=["1.experts.0", "1.experts.2"]))
    (row,) = coverage(traced, plan)
    assert (row.target, row.state(0), row.state(1)) == ("experts.*", "not", "partial")
    assert row.layers[1].words == "2/3"


def test_a_call_past_the_adapter_is_not_covered() -> None:
    x = torch.randn(2, 16, 16)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).train()
    traced = fxlora.trace(layer, (x,))
    dead = coverage(traced, fxlora.plan(traced, LoraConfig(target_modules=["out_proj"])))
    row = next(r for r in dead if r.target == "self_attn.out_proj")
    assert (row.whole, row.covered_flops, row.note) == ("adapted", 0, "1 read past the adapter")
    live = coverage(traced, fxlora.plan(traced, LoraConfig(target_modules=["self_attn"])))
    row = next(r for r in live if r.target == "self_attn.out_proj")
    assert row.covered_flops == row.flops > 0


def test_dense_and_expert_layers_have_rows_apart() -> None:
    settings = {
        "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 4, "first_k_dense_replace": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "vocab_size": 99, "n_shared_experts": 1,
    }  # fmt: skip
    model = _model("DeepseekV3ForCausalLM", "DeepseekV3Config", **settings)()
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    _, _, c = covered(model, inputs, target_modules="all-linear")
    rows = {r.target: r for r in c}
    assert tuple(rows["mlp.gate_proj"].layers) == (0,)
    assert tuple(rows["mlp.shared_experts.gate_proj"].layers) == (1, 2, 3)
    # all-linear leaves both out on this model (huggingface/peft#3711), and the table shows it.
    assert rows["mlp.gate_proj"].whole == rows["mlp.shared_experts.gate_proj"].whole == "not"
    assert rows["mlp.experts.gate_up_proj"].whole == "adapted"
    assert rows["mlp.gate.weight"].role == "router"
    assert "router" in str(c)


def test_a_tower_the_trace_never_calls_says_so() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
            self.language = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> Any:
            return self.language["q_proj"](x)  # type: ignore[operator]

    traced = fxlora.trace(Both(), (torch.randn(2, 4),))
    c = coverage(traced, fxlora.plan(traced, LoraConfig(target_modules=["q_proj"])))
    rows = {r.target: r for r in c}
    assert rows["vision_tower.q_proj"].note == "never called"
    assert (c.share_of_parameters, c.share_of_flops) == (1.0, 1.0)


def test_places_and_roles() -> None:
    assert place_of("encoder.block.0.layer.1.SelfAttention.q").target == "layer.*.SelfAttention.q"
    assert place_of("0").layer is None
    traced = fxlora.trace(ZOO["llama"].build(), (), ZOO["llama"].inputs(2, 16))
    model = fxlora.facts.info(traced).model
    roles = {s.name.rpartition(".")[2]: role_of(s, model) for s in sites(traced)}
    assert roles == {
        "embed_tokens": "embedding", "q_proj": "attention", "k_proj": "attention",
        "v_proj": "attention", "o_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp",
        "down_proj": "mlp", "lm_head": "head",
    }  # fmt: skip


def test_output_is_the_same_every_time_and_is_json() -> None:
    entry = ZOO["qwen3_moe"]
    traced, plan, c = covered(entry.build(), entry.inputs(2, 16), target_modules="all-linear")
    before = str(plan)
    assert str(coverage(traced, plan)) == str(c)
    assert json.loads(json.dumps(c.to_dict()))["rows"][0]["target"] == "model.embed_tokens"
    assert str(plan) == before


# ---- fused projections


@pytest.fixture(scope="module")
def phi3() -> Any:
    model = models.build("phi3")
    return fxlora.trace(model, *for_model(model, (), None))


def test_the_seven_names_on_phi_3_say_what_is_fused_and_what_each_way_out_costs(phi3: Any) -> None:
    plan = fxlora.plan(phi3, LoraConfig(r=32, target_modules=SEVEN))
    assert plan.trainable == 17_825_792
    leaves = [p.name.rpartition(".")[2] for p in plan.adapted]
    assert (leaves.count("o_proj"), leaves.count("down_proj")) == (32, 32)
    assert fused_advice(phi3, plan) == [
        "q_proj, k_proj and v_proj match nothing: they are slices of qkv_proj (q is rows 0:3072, "
        "k is rows 3072:6144, v is rows 6144:9216), fused in 32 layers",
        "gate_proj and up_proj match nothing: they are slices of gate_up_proj (gate is rows 0:8192, "
        "up is rows 8192:16384), fused in 32 layers",
        "with peft: target qkv_proj,gate_up_proj: +32,505,856 parameters, 50,331,648 trainable; "
        "one lora_A for all slices of a layer",
        "split: one adapter for each slice, as where they are layers of their own: +41,943,040 "
        "parameters, 59,768,832 trainable; peft cannot do this on a fused layer: "
        'fxlora.plan(traced, config, reach="slices")',
    ]


def test_the_costs_of_both_ways_out_are_those_of_the_plans(phi3: Any) -> None:
    fused = LoraConfig(r=32, target_modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])
    assert fxlora.plan(phi3, fused).trainable == 50_331_648
    split = fxlora.plan(phi3, LoraConfig(r=32, target_modules=SEVEN), reach="slices")
    assert split.trainable == 59_768_832
    assert fused_advice(phi3, split) == []


def test_fused_rows_name_their_slices_and_cover_them(phi3: Any) -> None:
    plan = fxlora.plan(phi3, LoraConfig(r=32, target_modules=SEVEN))
    c = coverage(phi3, plan)
    row = next(r for r in c if r.target == "self_attn.qkv_proj")
    assert [(p.part, p.rows) for p in row.parts] == [
        ("q", "0:3072"), ("k", "3072:6144"), ("v", "6144:9216"),
    ]  # fmt: skip
    assert row.whole == "not"
    assert sum(p.share for p in row.parts) == pytest.approx(1)
    assert "rows 3072:6144" in str(c)


def test_adapted_slices_cover_their_share_of_the_fused_layer(phi3: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 1])
    plan = fxlora.plan(phi3, config, reach="slices")
    c = coverage(phi3, plan)
    row = next(r for r in c if r.target == "self_attn.qkv_proj")
    assert (row.state(0), row.state(2), row.adapted) == ("partial", "not", 0)
    assert {p.part: p.tally.adapted for p in row.parts} == {"q": 2, "k": 0, "v": 0}
    assert row.covered_flops * 3 * 32 == row.flops * 2
    assert row.covered_parameters * 3 * 32 == row.parameters * 2
    assert (
        c.parameters
        == coverage(phi3, fxlora.plan(phi3, LoraConfig(target_modules=["o_proj"]))).parameters
    )
    assert "some slices" in str(c)


def test_names_of_slices_are_found_in_the_words_of_split_models(phi3: Any) -> None:
    found = slices_named(phi3, "model.layers.3.self_attn.q_proj")
    assert [s.name for s in found] == ["model.layers.3.self_attn.qkv_proj.q"]
    assert len(slices_named(phi3, "gate_proj")) == 32
    assert slices_named(phi3, "o_proj") == ()


def test_a_plan_without_fused_layers_has_no_advice() -> None:
    entry = ZOO["llama"]
    _, _, c = covered(entry.build(), entry.inputs(2, 16), target_modules=["q_proj", "foo_proj"])
    assert c.advice == ()
