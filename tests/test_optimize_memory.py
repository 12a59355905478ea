"""Memory mode keeps less for the backward pass, and says what it left; inference picks its order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_optimize_checkpoints import gradients, named, saved
from torch import nn
from torch.fx import GraphModule
from zoo import ZOO, tensors

import fxlora
from fxlora import peft_side
from fxlora.optimize import report
from fxlora.optimize.grouping import lora_group, swiglu
from fxlora.optimize.orders import merges, ordered

ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def pair(
    dtype: torch.dtype = torch.float32, length: int = 8, **settings: Any
) -> tuple[Any, nn.Module, GraphModule, dict[str, Any]]:
    """Returns a model, peft's and ours of it with nonzero adapters, and inputs."""
    entry = ZOO["llama"]
    torch.manual_seed(0)
    model, inputs = entry.build().to(dtype), entry.inputs(2, length)
    config = LoraConfig(**{"r": 4, "target_modules": ALL, **settings})
    theirs = peft_side.wrap(copy.deepcopy(model), config, 1)
    torch.manual_seed(1)
    lora = fxlora.rewrite(fxlora.trace(model, (), inputs), config)
    other = named(theirs)
    for name, p in lora.named_parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
            other[name].data.copy_(p.data)
    return model, theirs, lora, inputs


def off(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Returns the error of gradients against fp64, in all."""
    total = sum(((found[n].double() - exact[n]) ** 2).sum() for n in exact)
    return float(total.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_outputs_are_peft_s_bits_and_gradients_no_further_from_fp64(
    dtype: torch.dtype, dropout: float
) -> None:
    _, theirs, lora, inputs = pair(dtype, lora_dropout=dropout)
    fast = fxlora.optimize(lora, mode="memory")
    mine, peft_s = gradients(fast.train(), inputs), gradients(theirs.train(), inputs)
    assert torch.equal(mine[0], peft_s[0])
    other = named(theirs)
    grads = {n: p.grad.clone() for n, p in lora.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * 3 * len(ALL)
    if dropout:  # fp64 draws other masks; the masks are peft's own, so the bits are
        for n, g in grads.items():
            torch.testing.assert_close(g, other[n].grad, rtol=1e-2, atol=1e-6)
        return
    for p in lora.parameters():
        p.grad = None
    exact_graph = copy.deepcopy(lora).double().train()
    gradients(exact_graph, inputs)
    exact = {n: p.grad for n, p in exact_graph.named_parameters() if p.grad is not None}
    peft_off = off({n: other[n].grad for n in exact}, exact)
    assert off(grads, exact) <= 1.25 * peft_off


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_s_share_of_what_is_kept_shrinks_by_more_than_three_and_a_half(dropout: float) -> None:
    model, theirs, lora, inputs = pair(torch.bfloat16, 16, lora_dropout=dropout)
    base = copy.deepcopy(model).train().requires_grad_(False)
    base.enable_input_require_grads()
    fast = fxlora.optimize(lora, mode="memory")
    floor = saved(base, inputs)
    theirs_share = saved(theirs.train(), inputs) - floor
    mine = saved(fast.train(), inputs) - floor
    assert mine * 3.5 < theirs_share


def test_siblings_of_one_input_share_a_group() -> None:
    _, _, lora, _ = pair()
    fast = fxlora.optimize(lora, mode="memory")
    sizes = [len(n.args[1]) for n in fast.graph.nodes if n.target is lora_group]
    assert sizes == [3, 1, 2, 1] * 3
    assert sum(n.target is swiglu for n in fast.graph.nodes) == 3
    assert report(fast).step("groups").refused == ()


def test_what_is_not_plain_lora_is_left_with_its_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].register_forward_hook(lambda m, a, out: out + 1)
    traced = fxlora.trace(model)
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["0", "2"], r=2))
    lora = fxlora.adapters.add(lora, LoraConfig(target_modules=["0"], r=2), "other")
    lora = fxlora.adapters.set_active(lora, ["default", "other"])
    step = report(fxlora.optimize(lora, mode="memory")).step("groups")
    reasons = {r.where: r.why for r in step.refused}
    assert "several adapters are active" in reasons["0"]
    assert "hooks" in reasons["2"]
    dora = fxlora.rewrite(traced, LoraConfig(target_modules=["1"], r=2, use_dora=True))
    (left,) = report(fxlora.optimize(dora, mode="memory")).step("groups").refused
    assert left.where == "1"
    x = torch.randn(3, 6)
    assert torch.equal(fxlora.optimize(dora, mode="memory")(x), dora(x))


def test_a_graph_without_adapters_is_left_unchanged_in_what_it_computes() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6))
    fast = fxlora.optimize(fxlora.trace(model), mode="memory")
    assert report(fast).step("groups").changed == 0
    x = torch.randn(3, 6)
    assert torch.equal(fast(x), model(x))


def test_swiglu_gives_the_two_steps_bits_and_gradients() -> None:
    gate, up = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    plain = torch.autograd.grad(nn.functional.silu(gate).mul(up).square().sum(), (gate, up))
    fused = torch.autograd.grad(swiglu(gate, up).square().sum(), (gate, up))
    assert all(map(torch.equal, fused, plain))


def test_base_weights_that_train_are_still_trained_in_memory_mode() -> None:
    _, theirs, lora, inputs = pair()
    fast = fxlora.optimize(lora, mode="memory")
    name = "model.layers.1.self_attn.q_proj.weight"
    dict(lora.named_parameters())[name].requires_grad_(True)
    named(theirs)[name].requires_grad_(True)
    gradients(fast.train(), inputs), gradients(theirs.train(), inputs)
    mine, other = dict(lora.named_parameters())[name].grad, named(theirs)[name].grad
    assert mine is not None
    torch.testing.assert_close(mine, other)


# ---- the order of multiplication ---------------------------------------------------------------


def test_inference_takes_the_merged_weight_for_many_tokens_and_thin_products_for_few() -> None:
    assert not merges(1, 64, 64, 8)
    assert merges(64, 64, 64, 8)
    torch.manual_seed(0)
    w, a, b = torch.randn(8, 6), torch.randn(2, 6), torch.randn(8, 2)
    x = torch.randn(50, 6)
    with torch.no_grad():
        assert torch.equal(
            ordered(x, w, None, a, b, 2.0, None), x @ torch.addmm(w, b, a, alpha=2.0).t()
        )
        few = ordered(x[:1], w, None, a, b, 2.0, None)
    assert torch.equal(few, torch.add(x[:1] @ w.t(), (x[:1] @ a.t()) @ b.t(), alpha=2.0))


def test_inference_mode_is_close_to_peft_without_and_bit_equal_with_gradients() -> None:
    _, theirs, lora, inputs = pair(length=24)
    fast = fxlora.optimize(lora, mode="inference")
    assert report(fast).step("orders").changed == 3 * len(ALL)
    with torch.no_grad():
        mine, other = (tensors(m.eval()(**inputs))[0] for m in (fast, theirs))
    assert not torch.equal(mine, other)  # else no weight was merged
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients(fast.train(), inputs)[0], gradients(theirs.train(), inputs)[0])
