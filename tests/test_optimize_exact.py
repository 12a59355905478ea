"""The optimized graph gives peft's bits: outputs and gradients, over the matrix and its regimes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from matrix import Row
from test_matrix import ALIKE, SEED, Pair, assert_bits, backward, fill, given, outputs, over
from torch.fx import GraphModule

import fxlora
from fxlora import peft_side
from fxlora.optimize import functions


def powered(row: Row) -> Row:
    """Returns a row with every scaling a power of two, where one is folded without a rounding."""
    settings = {k: v for k, v in row.settings.items() if k not in ("alpha_pattern", "use_rslora")}
    r = settings.get("r", 4)
    settings["r"] = 2 if r == 3 else r
    if "rank_pattern" in settings:
        settings["rank_pattern"] = dict.fromkeys(settings["rank_pattern"], 2)
    return dataclasses.replace(row, settings={**settings, "lora_alpha": 8})


POWERED = [powered(r) for r in ALIKE]
KINDS = (
    "linear-dropout linear-lora-bias linear-init-pissa linear-dora-dropout linear-kasa "
    "bf16-block-diagonal linear-bf16 linear-fp64 own-forward weight-norm three-times stack-suffixes "
    "stack-bias-all whole-container text-conv1d text-embedding-conv1d text-tokens conv-2d-groups "
    "encoder-layer-norm-first parameter-experts-both model-llama-all-linear model-llama-bf16 "
    "model-gpt2-fan model-bert-embeddings model-qwen3-moe-parameters"
).split()
SAMPLE = [next(r for r in POWERED if kind in r.id) for kind in KINDS]


def assert_peft_s_bits(row: Row) -> None:
    _, traced = given(row)
    model = row.build()
    theirs = peft_side.wrap(copy.deepcopy(model), row.config(), SEED)
    torch.manual_seed(SEED)
    pair = fill(Pair(row, model, traced, fxlora.rewrite(traced, row.config()), theirs))
    fast = fxlora.optimize(pair.ours)
    for training in (False, True):
        if training or not row.dead_in_eval:
            theirs_out = outputs(row, pair.wrapped, training)
            assert_bits(outputs(row, fast, training), theirs_out)
    backward(row, fast)
    backward(row, pair.wrapped)
    assert_same_gradients(pair)


def assert_same_gradients(pair: Pair) -> None:
    found = 0
    for name, p, q in pair.shared():
        if p.requires_grad:
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                found += 1
                assert torch.equal(p.grad, q.grad), name
    assert found or pair.row.dead


@pytest.fixture(params=["as sized", "as if large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets small tensors take the ways of large ones as well."""
    if request.param == "as if large":
        monkeypatch.setattr(functions, "_MANY", 0)
    return str(request.param)


@over(SAMPLE)
@pytest.mark.usefixtures("size")
def test_outputs_and_all_gradients_are_peft_s_bits_on_every_kind_of_row(row: Row) -> None:
    assert_peft_s_bits(row)


@pytest.mark.slow
@over([r for r in POWERED if r not in SAMPLE])
@pytest.mark.usefixtures("size")
def test_outputs_and_all_gradients_are_peft_s_bits_on_the_whole_matrix(row: Row) -> None:
    assert_peft_s_bits(row)


def test_the_optimized_graph_holds_the_same_parameters_under_the_same_names() -> None:
    row = next(r for r in POWERED if r.id == "model-llama-all-linear")
    lora = fxlora.rewrite(given(row)[1], row.config())
    fast: GraphModule = fxlora.optimize(lora)
    mine, plain = dict(fast.named_parameters()), dict(lora.named_parameters())
    assert list(mine) == list(plain)
    assert all(mine[n] is plain[n] for n in plain)
    assert list(fast.state_dict()) == list(lora.state_dict())
