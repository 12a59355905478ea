"""Several named adapters on one model: added, switched, deleted, combined and merged as peft does."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    BOTH,
    CAUSAL,
    ONE,
    VOCAB,
    WIDTH,
    Convolutions,
    Mixture,
    Mlp,
    OwnParameters,
    Row,
    Stack,
    Text,
    X,
    _floats,
    _ids,
    _llama,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file
from test_matrix import ADAPTER_WORDS, assert_bits, is_close, named, outputs, same_bits
from torch import nn
from torch.fx import GraphModule
from zoo import tensors

import fxlora
from fxlora import adapters, peft_side

SEED = 11
FIRST, OTHER = "default", "other"
ORDERS = [(FIRST,), (OTHER,), (FIRST, OTHER), (OTHER, FIRST)]


@dataclass(frozen=True)
class Case:
    """One model with two adapters.

    Attributes:
        row: the model with its first adapter.
        second: settings of the second.
        alone: a pattern of our refusal to have both active; PEFT refuses too.
        peft_alone: PEFT refuses to have both active, and we do not.
    """

    row: Row
    second: dict[str, Any] = field(hash=False)
    alone: str = ""
    peft_alone: bool = False

    @property
    def id(self) -> str:
        return self.row.id

    def config(self) -> Any:
        return replace(self.row, settings=self.second).config()


def _case(
    id: str, first: dict[str, Any], second: dict[str, Any],
    make: Callable[[], nn.Module] = Mlp, given: Any = X, dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Case:  # fmt: skip
    return Case(Row(id, make, given, first, dtype=dtype), second, **more)


def _text() -> nn.Module:
    return Text(lambda: nn.Embedding(VOCAB, WIDTH))


def _image() -> nn.Module:
    return Convolutions(nn.Conv2d, False, {})


def _cases() -> Iterator[Case]:
    loud, dora = {"init_lora_weights": False}, {"use_dora": True}
    text, image = {"make": _text, "given": _ids}, {"make": _image, "given": _floats(2, 4, 7, 6)}
    lin1, emb, conv1d = ({"target_modules": [n]} for n in ("lin1", "emb", "conv1d"))
    conv, experts = (
        {"target_modules": ["conv"]},
        {"target_parameters": ["gate_up_proj", "down_proj"]},
    )
    blocks = BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2)
    yield _case("same-layer", {**ONE, **loud}, {**ONE, **loud})
    yield _case("two-layers", {**ONE, **loud}, {**lin1, **loud})
    yield _case("overlapping", BOTH, {**ONE, "r": 2, "lora_alpha": 5, "use_rslora": True})
    yield _case("two-dropouts", {**BOTH, "lora_dropout": 0.1}, {**BOTH, "lora_dropout": 0.3})
    yield _case("biased", {**BOTH, "lora_bias": True}, {**BOTH, "lora_bias": True})
    yield _case("block-diagonal", {**BOTH, "use_bdlora": blocks}, BOTH)
    yield _case("bf16", BOTH, {**ONE, "r": 2}, dtype=torch.bfloat16)
    yield _case("bf16-dora", {**BOTH, **dora}, BOTH, dtype=torch.bfloat16)
    yield _case("dora-same-layer", {**ONE, **dora}, {**ONE, **dora})
    yield _case("dora-beside-plain", {**BOTH, **dora}, BOTH)
    yield _case("dora-dropout", {**BOTH, **dora, "lora_dropout": 0.2}, {**BOTH, **dora})
    yield _case("mica-beside-plain", {**ONE, "init_lora_weights": "mica"}, ONE)
    yield _case("whole-layer-of-one", {**ONE, "modules_to_save": ["lin1"]}, ONE)
    yield _case(
        "whole-layer-of-both",
        {**ONE, "modules_to_save": ["lin1"]},
        {**ONE, "modules_to_save": ["lin1"]},
        alone="both replace 'lin1'",
    )
    yield _case("embedding", emb, {**emb, "r": 2}, **text)
    yield _case("embedding-and-conv1d", {"target_modules": ["emb", "conv1d"]}, conv1d, **text)
    yield _case("embedding-dora", {**emb, **dora}, {**emb, **dora}, **text)
    yield _case(
        "tokens",
        {**conv1d, "trainable_token_indices": {"emb": [1, 5]}},
        {**conv1d, "trainable_token_indices": {"emb": [2, 10]}},
        **text,
        peft_alone=True,
    )
    yield _case("convolution", conv, {**conv, "r": 2}, **image)
    yield _case("convolution-and-linear", conv, {"target_modules": ["lin0"]}, **image)
    yield _case("convolution-dora", {**conv, **dora}, {**conv, **dora}, **image)
    yield _case("experts", experts, {**experts, "r": 2}, make=Mixture)
    yield _case("experts-and-layer", experts, {**experts, **lin1}, make=Mixture)
    yield _case(
        "own-parameter",
        {"target_parameters": ["lin0.weight"]},
        {"target_parameters": ["lin0.weight"]},
        make=OwnParameters,
    )
    yield _case(
        "stack", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": "all-linear"},
        make=Stack, given=_floats(2, 5, WIDTH),
    )  # fmt: skip
    yield _case(
        "llama", {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "down_proj"]},
        make=_llama, given=CAUSAL,
    )  # fmt: skip


CASES = list(_cases())
TOGETHER = [c for c in CASES if not c.alone and not c.peft_alone]


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id)


def orders(cases: list[Case]) -> pytest.MarkDecorator:
    every = [(c, o) for c in cases for o in ORDERS if c in TOGETHER or len(o) == 1]
    return pytest.mark.parametrize(
        ("case", "order"), every, ids=[f"{c.id}-{'+'.join(o)}" for c, o in every]
    )


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- two sides ---------------------------------------------------------------------------------


@dataclass
class Sides:
    """Our graph and peft's model, each with both adapters, the first one active."""

    case: Case
    model: nn.Module
    ours: GraphModule
    theirs: Any

    @property
    def wrapped(self) -> nn.Module:
        return peft_side.wrapped(self.theirs)


def fresh(case: Case) -> Sides:
    model = case.row.build()
    args, kwargs = case.row.inputs()
    theirs = peft_side.wrap(copy.deepcopy(model), case.row.config(), SEED)
    torch.manual_seed(SEED)
    ours = fxlora.rewrite(fxlora.trace(model, args, kwargs), case.row.config())
    torch.manual_seed(SEED + 1)
    ours = adapters.add(ours, case.config(), OTHER)
    torch.manual_seed(SEED + 1)
    with quiet():
        theirs.add_adapter(OTHER, case.config())
    return Sides(case, model, ours, theirs)


def is_adapter(name: str) -> bool:
    return any(word in name for word in ADAPTER_WORDS)


def fill(sides: Sides) -> Sides:
    """Moves both adapters by the same numbers on both sides, so that nothing is zero."""
    torch.manual_seed(SEED + 2)
    other = named(sides.wrapped)
    for name, p in sides.ours.named_parameters():
        if is_adapter(name):
            p.data.add_(torch.randn_like(p) * 0.1)
            other[name].data.copy_(p.data)
    return sides


@functools.cache
def filled(case: Case) -> Sides:
    """Returns both sides with nonzero adapters; no test may change them."""
    return fill(fresh(case))


def switched(case: Case, order: tuple[str, ...]) -> tuple[GraphModule, Any]:
    """Returns our graph and a copy of peft's model with these adapters active, in this order."""
    sides = filled(case)
    theirs = copy.deepcopy(sides.theirs)
    with quiet():
        theirs.base_model.set_adapter(list(order))
    return adapters.set_active(sides.ours, order), theirs


def assert_flags(ours: nn.Module, wrapped: nn.Module) -> None:
    flags = {n: p.requires_grad for n, p in named(wrapped).items()}
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == flags


# ---- adding ------------------------------------------------------------------------------------


@over(CASES)
def test_an_added_adapter_has_peft_s_names_flags_and_bits(case: Case) -> None:
    sides = fresh(case)
    found, other = dict(sides.ours.named_parameters()), named(sides.wrapped)
    assert set(found) == set(other)
    for name, p in found.items():
        assert (p.shape, p.dtype) == (other[name].shape, other[name].dtype), name
        assert torch.equal(p, other[name]), name
    assert_flags(sides.ours, sides.wrapped)
    assert adapters.names(sides.ours) == (FIRST, OTHER)
    assert adapters.active(sides.ours) == (FIRST,)


@over(CASES)
def test_adding_an_adapter_changes_no_output_and_not_the_graph_it_is_added_to(case: Case) -> None:
    args, kwargs = case.row.inputs()
    first = fxlora.rewrite(fxlora.trace(case.row.build(), args, kwargs), case.row.config())
    code, before = str(first.graph), outputs(case.row, first)
    both = adapters.add(first, case.config(), OTHER)
    assert_bits(outputs(case.row, both), before)
    assert str(first.graph) == code
    assert adapters.names(first) == (FIRST,)


# ---- switching ---------------------------------------------------------------------------------


@orders(CASES)
def test_active_adapters_compute_peft_s_bits_in_their_order(
    case: Case, order: tuple[str, ...]
) -> None:
    ours, theirs = switched(case, order)
    wrapped = peft_side.wrapped(theirs)
    assert adapters.active(ours) == order
    for training in (False, True):
        assert_bits(outputs(case.row, ours, training), outputs(case.row, wrapped, training))
    assert_flags(ours, wrapped)


@orders(CASES)
def test_active_adapters_get_peft_s_gradients_and_inactive_ones_none(
    case: Case, order: tuple[str, ...]
) -> None:
    ours, theirs = switched(case, order)
    wrapped = peft_side.wrapped(theirs)
    grads = [gradients(case.row, m) for m in (ours, wrapped)]
    assert grads[0].keys() == grads[1].keys()
    assert any(f".{name}" in n for name in order for n in grads[0])
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
        assert any(f".{active}" in name for active in order), name


def gradients(row: Row, model: nn.Module) -> dict[str, torch.Tensor]:
    args, kwargs = row.inputs()
    torch.manual_seed(SEED + 3)
    out = tensors(model.train()(*args, **kwargs))[0]
    model.zero_grad()
    out.float().square().mean().backward()
    return {n: p.grad for n, p in named(model).items() if p.grad is not None}


@over([c for c in CASES if c.alone])
def test_two_adapters_that_replace_the_same_layer_are_not_active_together(case: Case) -> None:
    with pytest.raises(fxlora.AdapterError, match=case.alone):
        adapters.set_active(filled(case).ours, (FIRST, OTHER))
    assert_peft_refuses_both(case)


def assert_peft_refuses_both(case: Case) -> None:
    with pytest.raises(ValueError, match="adapter"), quiet():
        copy.deepcopy(filled(case).theirs).base_model.set_adapter([FIRST, OTHER])


@over([c for c in CASES if c.peft_alone])
def test_two_adapters_that_replace_different_rows_are_active_together_where_peft_refuses(
    case: Case,
) -> None:
    ours = filled(case).ours
    merged = fxlora.merge(adapters.set_active(ours, (FIRST, OTHER)))
    rows = merged.get_parameter("emb.weight")
    for name, config in ((FIRST, case.row.config()), (OTHER, case.config())):
        held = ours.get_parameter(f"emb.token_adapter.trainable_tokens_delta.{name}")
        assert torch.equal(rows[config.trainable_token_indices["emb"]], held)
    assert_peft_refuses_both(case)


@over(CASES)
def test_a_disabled_graph_is_the_base_model_and_keeps_its_adapters(case: Case) -> None:
    ours = filled(case).ours
    disabled = adapters.disable(ours)
    assert_bits(outputs(case.row, disabled), outputs(case.row, case.row.build()))
    assert adapters.active(disabled) == ()
    assert not any(p.requires_grad for p in disabled.parameters())
    again = adapters.set_active(disabled, OTHER)
    other = adapters.set_active(ours, OTHER)
    assert_bits(outputs(case.row, again), outputs(case.row, other))


@pytest.mark.parametrize("gone", [FIRST, OTHER])
@over(CASES)
def test_deleting_an_adapter_leaves_what_peft_leaves(case: Case, gone: str) -> None:
    sides = filled(case)
    ours, theirs = adapters.delete(sides.ours, gone), copy.deepcopy(sides.theirs)
    with quiet():
        theirs.delete_adapter(gone)
    wrapped = peft_side.wrapped(theirs)
    assert {n for n, _ in ours.named_parameters()} == set(named(wrapped))
    # peft reads the active adapters off the first layer, which may never have had the one left.
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    active = {n for m in layers for n in m.active_adapters if n in m._all_available_adapter_names()}
    assert set(adapters.active(ours)) == active
    assert_bits(outputs(case.row, ours), outputs(case.row, wrapped))
    assert adapters.names(sides.ours) == (FIRST, OTHER)


# ---- merging and saving ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS[2:], ids="+".join)
@over(TOGETHER)
def test_two_merged_adapters_compute_what_they_computed_and_leave_nothing(
    case: Case, order: tuple[str, ...]
) -> None:
    ours = adapters.set_active(filled(case).ours, order)
    merged = fxlora.merge(ours)
    assert is_close(outputs(case.row, merged), outputs(case.row, ours))
    assert not [n for n, _ in merged.named_parameters() if is_adapter(n)]


@over(TOGETHER)
def test_two_adapters_merge_into_the_weights_peft_merges_them_into(case: Case) -> None:
    ours, theirs = switched(case, (FIRST, OTHER))
    held = dict(fxlora.merge(ours).named_parameters())
    with quiet():
        plain = theirs.merge_and_unload(adapter_names=[FIRST, OTHER])
    for name, p in plain.named_parameters():
        assert is_close([held[name]], [p]), name


@pytest.mark.parametrize("name", [FIRST, OTHER])
@over(CASES)
def test_each_adapter_is_saved_where_and_as_peft_saves_it(
    case: Case, name: str, tmp_path: Path
) -> None:
    sides = filled(case)
    with quiet():
        sides.theirs.save_pretrained(tmp_path / "b", selected_adapters=[name])
    folder = fxlora.save_adapter(sides.ours, tmp_path / "a", name)
    assert folder.relative_to(tmp_path / "a").as_posix() == ("." if name == FIRST else name)
    found = load_file(folder / "adapter_model.safetensors")
    other = load_file(
        tmp_path / "b" / folder.relative_to(tmp_path / "a") / "adapter_model.safetensors"
    )
    assert sorted(found) == sorted(other)
    assert all(torch.equal(t, other[n]) for n, t in found.items())


@over(CASES)
def test_an_adapter_peft_saved_is_loaded_under_its_name_beside_another(
    case: Case, tmp_path: Path
) -> None:
    sides = filled(case)
    with quiet():
        sides.theirs.save_pretrained(tmp_path)
    args, kwargs = case.row.inputs()
    traced = fxlora.trace(case.row.build(), args, kwargs)
    loaded = fxlora.load_adapter(fxlora.load_adapter(traced, tmp_path), tmp_path / OTHER, OTHER)
    for order in ORDERS[:2] if case.alone else ORDERS:
        found = adapters.set_active(loaded, order)
        assert_bits(
            outputs(case.row, found), outputs(case.row, adapters.set_active(sides.ours, order))
        )


# ---- combining ---------------------------------------------------------------------------------

PLAIN = {"same-layer", "two-layers", "overlapping", "embedding", "convolution", "stack", "bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd-rank": {"how": "svd", "svd_rank": 3},
    "ties": {"density": 0.5},
    "ties-frequency": {"how": "ties", "density": 0.7, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.6},
    "magnitude_prune": {"density": 0.5},
    "ties_svd": {"density": 0.5},
    "dare_linear_svd": {"density": 0.5},
    "dare_ties_svd": {"density": 0.5},
    "magnitude_prune_svd": {"density": 0.5},
}
NEED_EQUAL_RANKS = {
    "linear", "ties", "ties-frequency", "dare_linear", "dare_ties", "magnitude_prune",
}  # fmt: skip
OTHER_RANKS = {"overlapping", "embedding", "convolution", "bf16"}


def _combinations() -> Iterator[Any]:
    for case in CASES:
        if case.id not in PLAIN:
            continue
        for kind in KINDS:
            yield pytest.param(case, kind, id=f"{case.id}-{kind}")


def combined(case: Case, kind: str, weights: dict[str, float]) -> tuple[Callable[[], Any], Any]:
    """Returns how we combine the adapters, and how peft does."""
    options = dict(KINDS[kind])
    how = options.pop("how", kind)
    theirs = copy.deepcopy(filled(case).theirs)

    def ours() -> GraphModule:
        torch.manual_seed(SEED + 4)
        return adapters.combine(filled(case).ours, weights, "mixed", how, **options)

    def peft_s() -> Any:
        torch.manual_seed(SEED + 4)
        names = list(weights)
        with quiet():
            theirs.add_weighted_adapter(
                names, [weights[n] for n in names], "mixed", combination_type=how, **options
            )
        return theirs

    return ours, peft_s


@pytest.mark.parametrize(("case", "kind"), _combinations())
def test_a_weighted_combination_has_peft_s_numbers(case: Case, kind: str) -> None:
    ours, peft_s = combined(case, kind, {FIRST: 0.7, OTHER: 0.3})
    if kind in NEED_EQUAL_RANKS and case.id in OTHER_RANKS:
        with pytest.raises(fxlora.AdapterError, match="rank"):
            ours()
        with pytest.raises(ValueError, match="same r value"):
            peft_s()
        return
    graph, theirs = ours(), peft_s()
    found, other = dict(graph.named_parameters()), named(peft_side.wrapped(theirs))
    made = [n for n in other if ".mixed" in n]
    assert sorted(made) == sorted(n for n in found if ".mixed" in n)
    for name in made:
        assert found[name].shape == other[name].shape, name
        assert torch.equal(found[name], other[name]), name
    with quiet():
        theirs.set_adapter("mixed")
    active = outputs(case.row, adapters.set_active(graph, "mixed"))
    expected = outputs(case.row, peft_side.wrapped(theirs))
    # The factors of an SVD lie in memory by columns in peft, and are multiplied in another order.
    assert (is_close if "svd" in kind else same_bits)(active, expected)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_negative_weights_subtract_as_in_peft(kind: str) -> None:
    case = next(c for c in CASES if c.id == "same-layer")
    ours, peft_s = combined(case, kind, {FIRST: 1.0, OTHER: -0.5})
    found, other = dict(ours().named_parameters()), named(peft_side.wrapped(peft_s()))
    for name in (n for n in other if ".mixed" in n):
        assert torch.equal(found[name], other[name]), name


EXACT = [
    *(("cat", i) for i in ("same-layer", "overlapping", "convolution", "embedding", "stack")),
    *(("svd", i) for i in ("same-layer", "convolution", "embedding")),
]


@pytest.mark.parametrize(("kind", "id"), EXACT)
def test_what_is_combined_exactly_is_the_weighted_sum_of_the_dense_deltas(
    kind: str, id: str
) -> None:
    case = next(c for c in CASES if c.id == id)
    ours = filled(case).ours
    rank = {"svd_rank": WIDTH} if kind == "svd" else {}  # all the rank the two have together
    mixed = adapters.combine(ours, {FIRST: 0.7, OTHER: 0.3}, "mixed", kind, **rank)
    names = [n for n, _ in case.row.build().named_parameters() if n.endswith("weight")]
    plain = dict(case.row.build().named_parameters())

    def delta(graph: GraphModule, name: str) -> dict[str, torch.Tensor]:
        merged = dict(fxlora.merge(adapters.set_active(graph, name)).named_parameters())
        return {n: (merged[n] - plain[n]).detach() for n in names}

    first, other, both = delta(ours, FIRST), delta(ours, OTHER), delta(mixed, "mixed")
    assert any(d.abs().max() > 0.01 for d in both.values())
    for n in names:
        assert is_close([both[n]], [0.7 * first[n] + 0.3 * other[n]]), n


@pytest.mark.parametrize("id", ["experts", "own-parameter", "dora-same-layer", "block-diagonal"])
def test_what_a_combination_says_nothing_of_is_refused(id: str) -> None:
    case = next(c for c in CASES if c.id == id)
    with pytest.raises(fxlora.AdapterError, match="combin"):
        combined(case, "linear", {FIRST: 0.5, OTHER: 0.5})[0]()


# ---- refusals ----------------------------------------------------------------------------------


REFUSED = {
    "other-parameters": (
        Mixture, {"target_parameters": ["gate_up_proj"]}, {"target_parameters": ["down_proj"]},
    ),
    "biases-of-two": (Mlp, {**ONE, "bias": "all"}, {**ONE, "bias": "all"}),
    "kasa-beside-plain": (Mlp, {**ONE, "kasa_config": KasaConfig()}, ONE),
}  # fmt: skip


@pytest.mark.parametrize("id", REFUSED)
def test_an_adapter_that_does_not_go_with_the_others_is_refused_as_in_peft(id: str) -> None:
    make, first, second = REFUSED[id]
    case = _case(id, first, second, make=make)
    args, kwargs = case.row.inputs()
    model = case.row.build()
    ours = fxlora.rewrite(fxlora.trace(model, args, kwargs), case.row.config())
    names = [n for n, _ in ours.named_parameters()]
    with pytest.raises(fxlora.AdapterError):
        adapters.add(ours, case.config(), OTHER)
    assert [n for n, _ in ours.named_parameters()] == names
    theirs = peft_side.wrap(copy.deepcopy(model), case.row.config(), SEED)
    with quiet(), pytest.raises(ValueError, match=r"target_parameters|one adapter|KaSA|bias"):
        theirs.add_adapter(OTHER, case.config())


@pytest.mark.parametrize("names", ["nobody", [FIRST, "nobody"], []])
def test_an_unknown_adapter_is_refused_where_peft_switches_all_off(names: Any) -> None:
    with pytest.raises(fxlora.AdapterError):
        adapters.set_active(filled(CASES[0]).ours, names)
