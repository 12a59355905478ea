"""Base plus low-rank: what is shared, what is frozen, what is left alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn
from zoo import ZOO

import fxlora
from fxlora.facts import info


def fill(lora: nn.Module) -> None:
    for name, p in lora.named_parameters():
        if ".lora_B." in name:
            p.data.normal_()


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def test_base_weights_are_shared_and_frozen_in_the_new_graph_only() -> None:
    model = two()
    traced = fxlora.trace(model)
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["0"]))
    ours = dict(lora.named_parameters())
    for name, p in model.named_parameters():
        assert p.requires_grad
        assert not ours[name].requires_grad
        assert ours[name].data_ptr() == p.data_ptr()
    assert all(p.requires_grad for p in traced.parameters())


def test_tied_weights_stay_tied() -> None:
    entry = ZOO["gpt2"]
    lora = fxlora.rewrite(
        fxlora.trace(entry.build(), (), entry.inputs(2, 8)), LoraConfig(target_modules=["c_attn"])
    )
    assert lora.lm_head.weight is lora.transformer.wte.weight


def test_nothing_that_was_given_changes() -> None:
    model = two().eval()
    traced = fxlora.trace(model)
    code, text = traced.code, str(traced.graph)
    config = LoraConfig(target_modules=["0"], lora_dropout=0.5)
    lora = fxlora.rewrite(traced, config)
    lora.train()
    lora.requires_grad_(True)
    assert (traced.code, str(traced.graph)) == (code, text)
    assert list(dict(traced.named_parameters())) == list(dict(model.named_parameters()))
    assert not any(m.training for m in (*model.modules(), *traced.modules()))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_branch_equals_the_dense_sum_for_nonzero_b(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = nn.Linear(6, 4) if kind == "linear" else Conv1D(4, 6)
    model = nn.Sequential(layer).double()
    lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    fill(lora)
    a, b = (
        lora.get_parameter("0.lora_A.default.weight"),
        lora.get_parameter("0.lora_B.default.weight"),
    )
    delta = 5 / 3 * b @ a
    x = torch.randn(2, 6, dtype=torch.float64)
    weight = layer.weight + delta if kind == "linear" else layer.weight.t() + delta
    torch.testing.assert_close(lora(x), x @ weight.t() + layer.bias)


def test_every_inserted_node_says_what_it_is() -> None:
    model = two()
    traced = fxlora.trace(model, (torch.ones(2, 10),))
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["2"]))
    kept = {n.name for n in traced.graph.nodes}
    roles = []
    for node in lora.graph.nodes:
        if node.name not in kept:
            assert node.meta["site"] == "2"
            assert node.meta["adapter"] == "default"
            roles.append(node.meta["role"])
    assert roles == ["cast", "cast", "dropout", "lora_A", "lora_B", "scale", "sum", "cast_back"]
    assert kept <= {n.name for n in lora.graph.nodes}


def test_an_alias_is_adapted_only_where_peft_adapts_it() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    result = fxlora.compare(Aliased(), LoraConfig(target_modules=["a"]), (torch.randn(2, 4),))
    assert result.equal, result.differences


def test_both_calls_of_a_shared_module_are_adapted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x)))

    lora = fxlora.rewrite(fxlora.trace(Twice()), LoraConfig(target_modules=["a"]))
    assert sum(n.meta.get("role") == "sum" for n in lora.graph.nodes) == 2
    assert fxlora.compare(Twice(), LoraConfig(target_modules=["a"]), (torch.randn(2, 4),)).equal


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_bias_fields_train_what_peft_trains(bias: str, lora_bias: bool) -> None:
    config = LoraConfig(target_modules=["2"], bias=bias, lora_bias=lora_bias)
    result = fxlora.compare(two(), config)
    assert result.equal, result.differences
    trained = {p.name for p in result.parameters if p.after}
    assert ("0.bias" in trained) == (bias == "all")
    assert ("2.bias" in trained) == (bias != "none")
    assert result.plan.trainable == result.trainable == result.peft_trainable


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_initialisation_and_dtypes_are_peft_s(init: object, dtype: torch.dtype) -> None:
    model = two().to(dtype)
    config = LoraConfig(target_modules=["0", "2"], init_lora_weights=init)
    result = fxlora.compare(model, config)
    assert result.equal, result.differences


def test_the_graph_follows_a_later_change_of_dtype_as_peft_does() -> None:
    import copy

    from peft import get_peft_model

    model, config = two(), LoraConfig(target_modules=["0", "2"])
    torch.manual_seed(0)
    ours = fxlora.rewrite(fxlora.trace(model, (torch.ones(2, 10),)), config)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(model), config).base_model.model
    x = torch.randn(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    ours.to(torch.bfloat16)
    theirs.to(torch.bfloat16)
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))


def test_the_random_state_is_drawn_from_as_peft_draws() -> None:
    import copy

    from peft import get_peft_model

    model, config = two(), LoraConfig(target_modules=["0", "2"])
    traced = fxlora.trace(model)
    torch.manual_seed(7)
    fxlora.rewrite(traced, config)
    ours = torch.rand(1)
    torch.manual_seed(7)
    get_peft_model(copy.deepcopy(model), config)
    assert torch.equal(ours, torch.rand(1))


def test_a_plan_of_another_graph_is_refused() -> None:
    model = two()
    plan = fxlora.plan(fxlora.trace(model), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="made for another graph"):
        fxlora.rewrite(fxlora.trace(model), plan)


def test_target_parameters_adapt_experts_as_peft_does() -> None:
    entry = ZOO["qwen3_moe"]
    model = entry.build()
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
    )  # fmt: skip
    result = fxlora.compare(model, config, (), entry.inputs(2, 8))
    assert result.equal, result.differences
    names = {p.name for p in result.parameters if p.after}
    assert "model.layers.0.mlp.experts.base_layer.lora_A.default.weight" in names
    assert info(fxlora.trace(model, (), entry.inputs(2, 8))).replayed > 0
