"""Checkpointing above the first adapted layer only: same bits, and less kept where it matters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.fx import GraphModule
from zoo import ZOO, seed, tensors

import fxlora
from fxlora import peft_side
from fxlora.errors import ConfigError
from fxlora.optimize import frontier, report

TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(**settings: Any) -> tuple[Any, GraphModule, dict[str, Any]]:
    entry = ZOO["llama"]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs(2, 8)
    config = LoraConfig(r=4, target_modules=TARGETS, **settings)
    theirs = peft_side.wrap(copy.deepcopy(model), config, 1)
    torch.manual_seed(1)
    lora = fxlora.rewrite(fxlora.trace(model, (), inputs), config)
    other = named(theirs)
    for name, p in lora.named_parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
            other[name].data.copy_(p.data)
    return theirs, lora, inputs


def named(theirs: Any) -> dict[str, torch.nn.Parameter]:
    wrapped = peft_side.wrapped(theirs)
    return {peft_side.common_name(n): p for n, p in wrapped.named_parameters()}


def gradients(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(5)
    out = tensors(model(**inputs))[0]
    out.square().mean().backward()
    return [out.detach()]


def saved(model: Any, inputs: dict[str, Any]) -> int:
    """Returns the bytes autograd keeps for the backward pass, without parameters."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found.setdefault(t.untyped_storage()._cdata, t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**inputs)
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in known)


def test_gradients_are_those_of_peft_under_transformers_own_checkpointing() -> None:
    theirs, lora, inputs = llama(layers_to_transform=[2], layers_pattern="layers", lora_dropout=0.1)
    base = theirs.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    fast = fxlora.optimize(lora, checkpoint=True)
    assert torch.equal(gradients(fast.train(), inputs)[0], gradients(theirs.train(), inputs)[0])
    other, found = named(theirs), 0
    for name, p in lora.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert torch.equal(p.grad, other[name].grad), name
            found += 1
    assert found == 2 * len(TARGETS)


def test_only_layers_a_gradient_reaches_are_checkpointed() -> None:
    _, lora, _ = llama(layers_to_transform=[1], layers_pattern="layers")
    step = report(fxlora.optimize(lora, checkpoint=True)).step("checkpoints")
    assert step.changed == 2  # layer 1, and layer 2 that its gradient comes through
    assert [(r.where, r.why) for r in step.refused] == [
        ("model.layers.0", "no gradient reaches it: nothing is saved there")
    ]


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    _, lora, inputs = llama()
    fast = fxlora.optimize(lora, checkpoint=True)
    assert saved(fast.train(), inputs) < 0.5 * saved(lora.train(), inputs)


def test_checkpointed_layers_add_nothing_to_the_state_dict_and_run_without_gradients() -> None:
    _, lora, inputs = llama()
    fast = fxlora.optimize(lora, checkpoint=True)
    assert list(fast.state_dict()) == list(lora.state_dict())
    with torch.no_grad():
        mine, plain = (tensors(m.eval()(**inputs))[0] for m in (fast, lora))
    assert torch.equal(mine, plain)


def test_a_layer_with_another_module_s_node_inside_is_left_with_the_reason() -> None:
    _, lora, _ = llama()
    nodes = [n for n in lora.graph.nodes if n.name.startswith("model_layers_1_mlp")]
    stray = next(n for n in nodes if n.op == "call_module")
    stray.meta["module_stack"] = ()
    step = report(fxlora.optimize(lora, checkpoint=True)).step("checkpoints")
    assert [r.where for r in step.refused] == ["model.layers.1"]
    assert "of another module runs between its nodes" in step.refused[0].why


def test_a_layer_called_again_and_again_is_checkpointed_at_every_call() -> None:
    entry = ZOO["albert"]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs(2, 8)
    lora = fxlora.rewrite(fxlora.trace(model, (), inputs), LoraConfig(target_modules=["query"]))
    for n, p in lora.named_parameters():
        if "lora_B" in n:
            p.data.normal_()
    fast = fxlora.optimize(lora, checkpoint=True)
    assert report(fast).step("checkpoints").changed == 4
    outs = [gradients(m.train(), inputs)[0] for m in (lora, fast)]
    assert torch.equal(*outs)


def test_the_frontier_says_what_checkpointing_costs_here() -> None:
    theirs, lora, inputs = llama(layers_to_transform=[2], layers_pattern="layers")
    found = frontier(lora, (), inputs)
    assert (found.layers, found.reached, found.first) == (3, 1, "model.layers.2")
    assert found.passes == {"off": (3, 0, 1), "usual": (3, 3, 3), "frontier": (3, 1, 1)}
    assert found.kept["off"] == saved(theirs.train(), inputs)
    base = theirs.get_base_model()
    base.enable_input_require_grads()
    everywhere = saved(theirs, inputs)
    assert found.kept["frontier"] < found.kept["usual"] < everywhere
    first, *_, last = str(found).splitlines()
    assert first == "a gradient reaches 1 of 3 layers; the first is model.layers.2"
    assert last.startswith("fxlora.optimize(lora, checkpoint=True)")


def test_a_graph_without_repeated_layers_has_no_frontier() -> None:
    lora = fxlora.rewrite(fxlora.trace(seed()), LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="no layer to checkpoint"):
        frontier(lora, (torch.randn(2, 10),))
