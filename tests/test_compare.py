"""The certificate proves equality, fails on one wrong thing, and the report says what differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig
from torch import nn
from torch.fx import GraphModule, Node
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import ZOO

import fxlora
from fxlora import peft_side
from fxlora.canonical import canonical
from fxlora.compare import certify
from fxlora.errors import UnsupportedError


@pytest.mark.parametrize("name", ZOO)
def test_the_certificate_proves_the_zoo_on_meta(name: str) -> None:
    entry = ZOO[name]
    inputs = {
        k: v.to("meta") if isinstance(v, torch.Tensor) else v
        for k, v in entry.inputs(2, 16).items()
    }
    config = LoraConfig(r=4, target_modules=entry.targets, lora_dropout=0.1)
    result = fxlora.compare(entry.build().to("meta"), config, (), inputs)
    assert result.equal, result.differences
    assert result.certificate.equal
    assert result.certificate.nodes > 10
    assert result.outputs == ()
    assert (result.trainable, result.total) == (result.peft_trainable, result.peft_total)


def _role(graph: GraphModule, role: str) -> Node:
    return next(n for n in graph.graph.nodes if n.meta.get("role") == role)


def _scaling(g: GraphModule) -> None:
    node = _role(g, "scale")
    node.args = (node.args[0], node.args[1] * 2)


def _skip_one_site(g: GraphModule) -> None:
    node = _role(g, "cast_back")
    node.replace_all_uses_with(_role(g, "base"))


def _transpose(g: GraphModule) -> None:
    node = _role(g, "lora_A")
    with g.graph.inserting_before(node):
        turned = g.graph.call_method("transpose", (node.args[0], 0, 1))
    turned.meta.update(node.meta)
    node.args = (turned,)


def _wrong_adapter(g: GraphModule) -> None:
    first, second = [n for n in g.graph.nodes if n.meta.get("role") == "lora_B"][:2]
    first.target, second.target = second.target, first.target


def _unfreeze(g: GraphModule) -> None:
    next(p for p in g.parameters() if not p.requires_grad).requires_grad_()


def _base_into_adapter(g: GraphModule) -> None:
    _role(g, "dropout").args = (_role(g, "base"),)


@pytest.mark.parametrize(
    "break_it",
    [_scaling, _skip_one_site, _transpose, _wrong_adapter, _unfreeze, _base_into_adapter],
)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_certificate_fails_on_one_wrong_thing(
    name: str, break_it: Callable[[GraphModule], None]
) -> None:
    entry = ZOO[name]
    model, inputs = entry.build(), entry.inputs(2, 16)
    config = LoraConfig(r=4, target_modules=entry.targets, lora_dropout=0.1)
    lora = fxlora.rewrite(fxlora.trace(model, (), inputs), config)
    wrapped = peft_side.wrapped(peft_side.wrap(model, config, 0))
    theirs = canonical(fxlora.trace(wrapped, (), inputs), peft_side.common_name)
    assert certify(canonical(lora), theirs).equal
    break_it(lora)
    lora.graph.lint()
    broken = certify(canonical(lora), theirs)
    assert not broken.equal
    if break_it is not _unfreeze:
        assert broken.difference is not None


def test_the_order_of_independent_calls_does_not_matter() -> None:
    def build(swap: bool) -> GraphModule:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if swap:
                    b = self.b(x)
                    return self.a(x) - b
                a = self.a(x)
                return a - self.b(x)

        return fxlora.trace(Model(), (torch.ones(2, 4),))

    assert canonical(build(True)).digest == canonical(build(False)).digest


def test_the_order_of_in_place_calls_matters() -> None:
    def build(swap: bool) -> GraphModule:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = x * 1.0
                view = y[0]
                if swap:
                    z = y + 1
                    view.add_(1)
                else:
                    view.add_(1)
                    z = y + 1
                return z

        return fxlora.trace(Model(), (torch.ones(2, 4),))

    assert canonical(build(True)).digest != canonical(build(False)).digest


def test_a_difference_is_listed_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fxlora.compare"]  # the package's attribute is the function
    original = module.rewrite

    def wrong(traced: GraphModule, plan: fxlora.Plan) -> GraphModule:
        lora = original(traced, plan)
        _scaling(lora)
        lora.recompile()
        next(p for n, p in lora.named_parameters() if "lora_A" in n).requires_grad_(False)
        return lora

    monkeypatch.setattr(module, "rewrite", wrong)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    result = fxlora.compare(model, LoraConfig(r=4, target_modules=["0", "2"]))
    assert not result.equal
    text = "\n".join(result.differences)
    assert "parameter 0.lora_A.default.weight: requires_grad False, PEFT True" in text
    assert "the graphs part where ours computes" in text
    assert "output 0: differs by up to" in text
    assert "NOT equal" in str(result)


@pytest.mark.parametrize("how", [True, "pissa", "olora"])
def test_the_model_the_config_and_the_random_state_are_left_alone(how: Any) -> None:
    import copy

    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=how)
    before = copy.deepcopy(config), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fxlora.compare(model, config)
    assert torch.equal(torch.rand(2), expected)
    assert config == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(before[1])


def test_the_report_shows_names_flags_totals_and_trees() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    result = fxlora.compare(model, LoraConfig(r=4, target_modules=["0", "2"]))
    text = str(result)
    assert "trainable params: 220 || all params: 545 || trainable%: 40.3670" in text
    assert "lora_A" in result.tree_after
    assert "lora_A" not in result.tree_before
    row = next(p for p in result.parameters if p.name == "0.weight")
    assert row.peft_name == "base_model.model.0.base_layer.weight"
    assert (row.before, row.after, row.peft_after) == (True, False, False)
    assert result.to_dict()["certificate"]["equal"] is True


@pytest.mark.parametrize(
    "settings",
    [
        *({"init_lora_weights": how} for how in ("pissa", "pissa_niter_2", "olora", "mica")),
        {"kasa_config": KasaConfig()},
    ],
    ids=str,
)
def test_what_peft_draws_from_weights_is_not_compared_on_meta(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta")
    config = LoraConfig(r=2, target_modules=["0"], **settings)
    with pytest.raises(UnsupportedError, match=r"'0.weight' is on the meta device.*with weights"):
        fxlora.compare(model, config, (torch.empty(2, 8, device="meta"),))


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", "ones"), ("llama", "padded"), ("bert", "ones"), ("bert", "none")]
)
def test_a_mask_of_all_ones_is_used_on_both_sides_and_said(name: str, rows: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    inputs = entry.inputs(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    if rows == "padded":
        mask[1, 8:] = 0
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    if rows != "none":
        inputs["attention_mask"] = mask
    inputs["input_ids"] = torch.randint(3, 60, (2, 12))
    config = LoraConfig(r=2, target_modules=["q_proj", "query"], init_lora_weights=False)
    found = fxlora.compare(entry.build().eval(), config, (), inputs)
    assert found.equal, found.differences
    assert [n for n in found.notes if "mask of all ones" in n] == list(found.notes)
    assert bool(found.notes) == (rows == "ones")


class Overflowing(nn.Module):
    """Some places of its output are NaN, and one is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).masked_fill(x > 0, float("nan"))
        return torch.where(x < -1, float("inf"), y)


X = torch.tensor([[1.0, -2.0, -0.5, 0.5], [-0.5, 1.0, -0.5, -3.0]])


def strict_json(data: Any) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(json.dumps(data), parse_constant=refuse)


def test_nan_in_the_same_places_is_equal_and_counted() -> None:
    result = fxlora.compare(Overflowing(), LoraConfig(r=2, target_modules=["a"]), (X,))
    assert result.equal, result.differences
    assert (result.outputs[0].largest, result.outputs[0].nans) == (0.0, 3)
    assert "NaN on both sides in 3 places" in str(result)
    assert strict_json(result.to_dict())["outputs"][0]["equal"] is True


def test_a_base_weight_that_is_nan_is_no_difference() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    result = fxlora.compare(model, LoraConfig(r=2, target_modules=["0"]), (X,))
    assert result.equal, result.differences


@pytest.mark.parametrize(
    ("wrong", "said", "size"),
    [
        (lambda t: torch.where(t.isnan(), 0.0, t), "NaN on one side only", None),
        (lambda t: t.masked_fill(t.isinf(), 1.0), "differs by up to inf", None),
        (lambda t: t.masked_fill(~t.isnan() & ~t.isinf(), 99.0), "differs by up to 9", 90.0),
        (lambda t: t.double(), "dtype torch.float32, PEFT torch.float64", None),
        (lambda t: t[:1], "shape (2, 4), PEFT (1, 4)", None),
    ],
)
def test_nan_against_a_number_is_a_difference_and_json_stays_json(
    wrong: Callable[[torch.Tensor], torch.Tensor], said: str, size: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = sys.modules["fxlora.compare"]
    run = module._run

    def other(model: nn.Module, *rest: Any) -> Any:
        tensors, grads = run(model, *rest)
        return [t if isinstance(model, GraphModule) else wrong(t) for t in tensors], grads

    monkeypatch.setattr(module, "_run", other)
    result = fxlora.compare(Overflowing(), LoraConfig(r=2, target_modules=["a"]), (X,))
    assert not result.equal
    (difference,) = result.differences
    assert difference.startswith(f"output 0: {said}")
    (row,) = strict_json(result.to_dict())["outputs"]
    assert row["equal"] is False
    assert row["largest"] is None if size is None else row["largest"] > size


class _Functional(nn.Module):
    """Dropout by a function, told by the mode; and, if asked, a draw in train mode only."""

    def __init__(self, draws: bool = False, p: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.lin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.draws, self.p = draws, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if self.draws and self.training:
            torch.rand([])
        x = nn.functional.dropout(x, self.p, self.training)
        return self.lin(x + (0.5 if self.training else 0.25))


DORA = LoraConfig(r=4, target_modules=["lin"], use_dora=True, lora_dropout=0.1)


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_constant_of_the_mode_is_the_one_of_the_mode_peft_was_traced_in(
    train: bool, draws: bool
) -> None:
    # DoRA with dropout takes another path in train mode, so PEFT's model has a graph for each mode.
    found = fxlora.compare(_Functional(draws).train(train), DORA, (torch.randn(2, 8),))
    assert found.certificate.equal
    assert found.equal, found.differences


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "other",
    [lambda: _Functional(p=0.2), lambda: _Functional(draws=True)],
    ids=["p", "draw"],
)
def test_and_another_constant_or_a_draw_too_many_is_told(
    train: bool, other: Callable[[], _Functional]
) -> None:
    x = (torch.randn(2, 8),)
    model = _Functional().train(train)
    theirs = fxlora.trace(peft_side.wrapped(peft_side.wrap(model, DORA, 0)).train(train), x)
    form = canonical(theirs, peft_side.common_name, train)
    right = fxlora.rewrite(fxlora.trace(model, x), DORA)
    assert certify(canonical(right, mode=train), form).equal
    wrong = fxlora.rewrite(fxlora.trace(other().train(train), x), DORA)
    draws_only_in_train = other().draws and not train
    assert certify(canonical(wrong, mode=train), form).equal is draws_only_in_train


def test_attention_dropout_of_llama_beside_dora_with_dropout_is_proved() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=32, attention_dropout=0.1,
        )
    )  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, lora_dropout=0.1)
    for train in (False, True):
        found = fxlora.compare(model.train(train), config)
        assert found.equal, found.differences
