"""Every row of the matrix through every check, bit for bit against peft wherever peft is right."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import FORWARD, REFUSED, ROWS, Row
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import MultiheadAttention
from safetensors.torch import load_file
from torch import nn
from torch.fx import GraphModule
from zoo import tensors

import fxlora
from fxlora import peft_side

SEED = 7
ADAPTER_WORDS = ("lora_", "modules_to_save", "token_adapter", "base_layer", "original_module")
RUN = [r for r in ROWS if r.device != "meta"]
# Where peft's number is wrong there are no bits to share; the rows' own test says what is right.
ALIKE = [r for r in RUN if not r.forward_differs]
WRONG = [r for r in RUN if r.forward_differs]
RELOADED = [r for r in RUN if not {"pissa_niter_reload", "sorted_patterns"} & set(r.divergent)]
MERGED = [r for r in RUN if not r.unmergeable]
LEAKING = {"tied_merge", "conv3d_merge", "own_forward_merge"}


def over(rows: list[Row]) -> pytest.MarkDecorator:
    """Runs a test over rows; those of whole models, which take seconds each, in the slow run.

    In the fast one test_parity_with_peft.py holds the same of whole models.
    """
    given = [
        pytest.param(r, marks=pytest.mark.slow if r.id.startswith("model-") else (), id=r.id)
        for r in rows
    ]
    return pytest.mark.parametrize("row", given)


_GIVEN: dict[Any, tuple[nn.Module, GraphModule]] = {}


# ---- two sides ---------------------------------------------------------------------------------


@dataclass
class Pair:
    """Our graph and peft's model, drawn under one seed from models of the same bits."""

    row: Row
    model: nn.Module
    traced: GraphModule
    ours: GraphModule
    theirs: Any

    @property
    def wrapped(self) -> nn.Module:
        return peft_side.wrapped(self.theirs)

    def shared(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        other = named(self.wrapped)
        yield from ((n, p, other[n]) for n, p in self.ours.named_parameters() if n in other)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def named(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model peft wrapped, by our names."""
    return {peft_side.common_name(n): p for n, p in wrapped.named_parameters()}


def given(row: Row) -> tuple[nn.Module, GraphModule]:
    """Returns the model and its trace; rows with the same model share both.

    A rewrite changes neither, unless a row trains the base model's own biases or its forward
    writes into what the base model holds.
    """
    if row.config().bias != "none" or moves(row.build()):
        return made(row)
    key = (row.make, row.given, row.dtype, row.device, row.training)
    if key not in _GIVEN:
        _GIVEN[key] = made(row)
    return _GIVEN[key]


def made(row: Row) -> tuple[nn.Module, GraphModule]:
    model = row.build()
    args, kwargs = row.inputs()
    return model, fxlora.trace(model, args, kwargs)


def fresh(row: Row) -> Pair:
    model, traced = given(row)
    theirs = peft_side.wrap(copy.deepcopy(model), row.config(), SEED)
    torch.manual_seed(SEED)
    return Pair(row, model, traced, fxlora.rewrite(traced, row.config()), theirs)


def fill(pair: Pair) -> Pair:
    """Moves everything that trains by the same numbers on both sides, so that nothing is zero."""
    torch.manual_seed(SEED + 1)
    for _, mine, other in pair.shared():
        if mine.requires_grad:
            mine.data.add_(torch.randn_like(mine) * 0.1)
            other.data.copy_(mine.data)
    return pair


@functools.cache
def drawn(row: Row) -> Pair:
    """Returns a pair as it was made; no test may change it."""
    return fresh(row)


@functools.cache
def filled(row: Row) -> Pair:
    """Returns a pair with nonzero adapters; no test may change it."""
    return fill(fresh(row))


@functools.cache
def mine(row: Row, training: bool = False) -> list[torch.Tensor]:
    """Returns what our filled graph computes."""
    return outputs(row, filled(row).ours, training)


@functools.cache
def peft_s(row: Row, training: bool = False) -> list[torch.Tensor]:
    """Returns what peft's filled model computes."""
    return outputs(row, filled(row).wrapped, training)


@functools.cache
def base(row: Row) -> list[torch.Tensor]:
    """Returns what the model computes without any adapter, everything in it requiring grad."""
    return outputs(row, row.build(), graded=True)


def result(row: Row, model: nn.Module) -> list[torch.Tensor]:
    args, kwargs = row.inputs()
    torch.manual_seed(SEED + 2)
    return tensors(model(*args, **kwargs))


def moves(model: nn.Module) -> bool:
    """Whether a forward writes into buffers or parameters."""
    kinds = (nn.BatchNorm2d, nn.MultiheadAttention, MultiheadAttention)
    return any(isinstance(m, kinds) or getattr(m, "max_norm", None) for m in model.modules())


def outputs(
    row: Row, model: nn.Module, training: bool = False, graded: bool = False
) -> list[torch.Tensor]:
    """Runs a model and leaves its numbers as they are.

    `graded` lets every parameter require grad for the run: where none does, torch's attention
    takes another way to the same number, which ends in other last bits.
    """
    twin = copy.deepcopy(model) if moves(model) else model
    flags = {p: p.requires_grad for p in twin.parameters()}
    if graded:
        twin.requires_grad_(True)
    found = [t.detach() for t in result(row, twin.train(training))]
    for p, flag in flags.items():
        p.requires_grad_(flag)
    return found


def backward(row: Row, model: nn.Module) -> None:
    floats = [t for t in result(row, model.train()) if t.requires_grad]
    # Not the plain mean of squares: behind a LayerNorm that is a constant.
    sum((t.float() - torch.randn(t.shape)).square().mean() for t in floats).backward()


def assert_bits(mine: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(mine) == len(other) > 0
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert a.dtype == b.dtype, i
        assert torch.equal(a, b), (
            f"output {i} is off by {(a.double() - b.double()).abs().max():.3g}"
        )


def same_bits(mine: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def is_close(mine: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two ways to round the same number give about the same.

    W + s B A is rounded once to the dtype, and sums of at most some tens of terms go through a few
    layers; so some hundred units in the last place of the largest output, few where a unit is big.
    """
    for a, b in zip(mine, other, strict=True):
        if not a.is_floating_point() or not a.numel():
            continue
        units = 8 if a.dtype is torch.bfloat16 else 300
        size = max(1.0, float(b.detach().double().abs().max()))
        limit = units * torch.finfo(a.dtype).eps * size
        if a.shape != b.shape or float((a.double() - b.double()).detach().abs().max()) > limit:
            return False
    return True


# ---- 1, 2: what is planned, drawn and proved ---------------------------------------------------


@over(ROWS)
def test_the_plan_adapts_the_layers_peft_wraps_and_counts_what_it_counts(row: Row) -> None:
    pair = drawn(row)
    plan = fxlora.plan(pair.traced, row.config())
    suffixes = (".lora_A.default.weight", ".lora_embedding_A.default")
    names = [n for n, _ in pair.wrapped.named_parameters() if n.endswith(suffixes)]
    assert len(plan.adapted) == len(names)
    assert sorted(f"{p.prefix}." for p in plan.adapted) == sorted(
        n[: max(n.rfind("lora_A."), n.rfind("lora_embedding_A."))]
        for n in map(peft_side.common_name, names)
    )
    if "tied_base_changed" not in row.divergent:  # a weight of its own is one parameter more
        assert (plan.trainable, plan.total) == pair.theirs.get_nb_trainable_parameters()


@over(ROWS)
def test_parameters_have_peft_s_names_order_shapes_dtypes_flags_and_first_bits(row: Row) -> None:
    pair = drawn(row)
    found, other = dict(pair.ours.named_parameters()), named(pair.wrapped)
    if "tied_base_changed" in row.divergent:
        found = {n: p for n, p in found.items() if n in other and ".lora_" in n}
        other = {n: p for n, p in other.items() if ".lora_" in n}
    if any(isinstance(m, MultiheadAttention) for m in pair.wrapped.modules()):
        # peft takes the base parameters out and puts them back, so they stand in another order.
        assert set(found) == set(other)
        found, other = ({n: p for n, p in x.items() if p.requires_grad} for x in (found, other))
    assert list(found) == list(other)
    for name, p in found.items():
        q = other[name]
        assert (p.shape, p.dtype, p.requires_grad) == (q.shape, q.dtype, q.requires_grad), name
        assert row.device == "meta" or torch.equal(p, q), name


@over(ROWS)
def test_the_comparison_proves_equality_and_names_every_known_mistake_of_peft_s(row: Row) -> None:
    args, kwargs = row.inputs()
    with quiet():
        found = fxlora.compare(row.build(), row.config(), args, kwargs)
    assert {d.name for d in found.divergences} == set(row.divergent)
    for d in found.divergences:
        assert d.sites
        assert not d.thread or d.thread.startswith("https://github.com/huggingface/peft/")
        now = FORWARD if row.training else FORWARD | {"encoder_fast_path"}
        assert (d.when == "forward") == (d.name in now)
    if row.untraceable:
        assert found.certificate.problem
        why = ("no certificate", "what PEFT computes cannot run")
        assert all(d.startswith(why) for d in found.differences)
        return
    assert found.differences == ()
    assert found.certificate.equal
    assert found.equal == all(d.when != "forward" for d in found.divergences)
    assert bool(found.outputs) == (row.device != "meta")


# ---- 3, 4: outputs and gradients ---------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@over(ALIKE)
def test_outputs_are_peft_s_bits(row: Row, training: bool) -> None:
    if row.dead_in_eval and not training:
        pair = filled(row)
        found, expected = (outputs(row, m, graded=True) for m in (pair.ours, pair.wrapped))
        assert_bits(found, expected)
        return
    assert_bits(mine(row, training), peft_s(row, training))


@over([r for r in ALIKE if r.dtype is torch.float32 and not r.id.startswith("model-")])
def test_outputs_under_autocast_are_peft_s_bits(row: Row) -> None:
    pair = filled(row)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (outputs(row, m, True) for m in (pair.ours, pair.wrapped))
    assert_bits(found, expected)
    assert not same_bits(found, mine(row, True))


@over(ALIKE)
def test_gradients_are_peft_s_bits(row: Row) -> None:
    pair = fill(fresh(row))
    ours = pair.ours
    backward(row, ours)
    backward(row, pair.wrapped)
    other = named(pair.wrapped)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert trained
    for name, p in trained.items():
        grad = other[name].grad
        assert (p.grad is None) == (grad is None), name
        assert grad is None or torch.equal(p.grad, grad), name
        dead = grad is None or not grad.any()
        assert dead == any(part in name for part in row.dead), name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


@over([r for r in RUN if r.dense and r.dtype is not torch.bfloat16])
def test_the_output_in_eval_mode_is_that_of_the_dense_weights(row: Row) -> None:
    pair = filled(row)
    expected = outputs(row, dense(pair))
    assert is_close(mine(row), expected)
    assert not is_close(base(row), expected)  # the adapters do something


@over([r for r in WRONG if r.dense and r.dtype is not torch.bfloat16])
def test_peft_s_output_is_not_that_of_the_dense_weights_where_we_say_it_is_wrong(row: Row) -> None:
    assert not peft_runs(row) or not is_close(peft_s(row), outputs(row, dense(filled(row))))


@over([r for r in ALIKE if r.dead_in_eval])
def test_peft_s_adapters_inside_torch_s_encoder_layer_do_nothing_in_eval_mode(row: Row) -> None:
    assert is_close(peft_s(row), base(row))
    assert not is_close(mine(row), base(row))


@over([r for r in RUN if "eval_dropout" in r.divergent])
def test_adapters_of_a_model_in_eval_mode_do_not_drop_out_and_peft_s_do(row: Row) -> None:
    pair = fill(fresh(row))
    assert_bits(result(row, pair.ours), peft_s(row))
    assert not same_bits(result(row, pair.wrapped), peft_s(row))


@over([r for r in WRONG if "tied_base_changed" in r.divergent])
def test_an_initialisation_changes_the_adapted_layer_and_not_the_one_tied_to_it(row: Row) -> None:
    pair = drawn(row)
    assert is_close(outputs(row, pair.ours), base(row))
    assert not is_close(outputs(row, pair.wrapped), base(row))


# ---- the dense truth ---------------------------------------------------------------------------


def dense(pair: Pair) -> nn.Module:
    """Returns the plain model with every adapter written out as one dense weight, in eval mode."""
    model = copy.deepcopy(pair.model)
    values = {n: p.detach() for n, p in pair.ours.named_parameters()}
    plan = fxlora.plan(pair.traced, pair.row.config())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
        for saved in plan.saved:
            module = model.get_submodule(saved.name)
            for name, p in module.named_parameters():
                p.copy_(values[f"{saved.name}.modules_to_save.default.{name}"])
        for t in plan.tokens:
            weight = model.get_submodule(t.name).weight
            weight[list(t.indices)] = values[
                f"{t.name}.token_adapter.trainable_tokens_delta.default"
            ]
        for p in plan.adapted:
            _write(model, p, values, plan.config)
    return model.eval()


def _write(model: nn.Module, p: Any, values: dict[str, torch.Tensor], config: Any) -> None:
    """Writes W + s B A, or DoRA's m (W + s B A) / |W + s B A|, in the place of W."""
    weight = model.get_parameter(p.site.weight_name)
    weight.add_(_delta(p, values, config).to(weight.dtype))
    magnitude = values.get(f"{p.prefix}.lora_magnitude_vector.default.weight")
    if magnitude is not None:
        turned = p.kind in ("Conv1D", "Embedding")
        rows = weight.t() if turned else weight
        norm = rows.flatten(1).norm(dim=1)
        shape = (-1, *(1,) * (rows.dim() - 1))
        rows.mul_((magnitude.flatten() / norm).view(shape))
    bias = values.get(f"{p.prefix}.lora_B.default.bias")
    if bias is not None:
        layer = model.get_submodule(p.name)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(bias))
        layer.bias.add_(bias * p.scaling)


def _delta(p: Any, values: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    if p.kind == "Embedding":
        a, b = (values[f"{p.prefix}.lora_embedding_{x}.default"] for x in "AB")
        return p.scaling * (b @ a).t()
    a, b = (values[f"{p.prefix}.lora_{x}.default.weight"] for x in "AB")
    if p.kind.startswith("Conv") and p.kind != "Conv1D":
        return p.scaling * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    if p.experts > 1:
        a, b = a.view(p.experts, p.r, -1), b.view(b.shape[0], p.r, p.experts)
        delta = torch.stack([b[:, :, e] @ a[e] for e in range(p.experts)])
        return p.scaling * (delta.transpose(1, 2) if p.site.transposed else delta)
    if a.shape[1] != p.site.in_features:
        a = torch.block_diag(*a.chunk(config.use_bdlora.nblocks))
    if b.shape[1] != a.shape[0]:
        b = torch.block_diag(*b.chunk(config.use_bdlora.nblocks))
    diagonal = values.get(f"{p.prefix}.lora_diag.default")
    product = b @ a if diagonal is None else b @ torch.diag(diagonal) @ a
    return p.scaling * (product.t() if p.kind == "Conv1D" else product)


# ---- 5, 6: one step of training ----------------------------------------------------------------


def step(row: Row, model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    backward(row, model)
    torch.optim.SGD(trained, lr=0.1).step()


@over(ALIKE)
def test_after_one_step_of_sgd_outputs_are_still_peft_s_bits(row: Row) -> None:
    pair = fill(fresh(row))
    step(row, pair.ours)
    step(row, pair.wrapped)
    after = outputs(row, pair.ours, graded=row.dead_in_eval)
    assert_bits(after, outputs(row, pair.wrapped, graded=row.dead_in_eval))
    assert same_bits(mine(row), after) == (row.dead == ("lora_",))


@over(RUN)
def test_one_step_moves_what_trains_and_nothing_else(row: Row) -> None:
    pair = fill(fresh(row))
    result(row, pair.model)  # an embedding with max_norm rescales its own rows when read
    before = {n: p.detach().clone() for n, p in pair.ours.named_parameters()}
    step(row, pair.ours)
    found = dict(pair.ours.named_parameters())
    moved = {n for n, p in found.items() if not torch.equal(p, before[n])}
    grads = {n: p.grad for n, p in found.items() if p.requires_grad and p.grad is not None}
    assert moved == {n for n, g in grads.items() if not torch.equal(before[n] - 0.1 * g, before[n])}
    assert bool(moved) == (row.dead != ("lora_",))


# ---- 7, 8: checkpoints -------------------------------------------------------------------------


def ours_saved(row: Row, path: Path) -> Path:
    fxlora.save_adapter(filled(row).ours, path)
    return path


def theirs_saved(row: Row, path: Path) -> Path:
    with quiet():
        filled(row).theirs.save_pretrained(path)
    return path


@over(RUN)
def test_a_saved_adapter_holds_the_tensors_and_the_config_peft_writes(
    row: Row, tmp_path: Path
) -> None:
    mine, other = ours_saved(row, tmp_path / "a"), theirs_saved(row, tmp_path / "b")
    a, b = (load_file(d / "adapter_model.safetensors") for d in (mine, other))
    assert sorted(a) == sorted(b)
    for name, t in a.items():
        assert (t.shape, t.dtype) == (b[name].shape, b[name].dtype), name
        assert torch.equal(t, b[name]), name
    assert settings(mine) == settings(other)


def settings(path: Path) -> LoraConfig:
    """Reads a saved configuration; of lists that PEFT makes from a set, the order means nothing."""
    with quiet():
        config = LoraConfig.from_pretrained(path)
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)
    return config


@over(RELOADED)
def test_peft_loads_our_directory_whole_and_computes_the_same(row: Row, tmp_path: Path) -> None:
    path = ours_saved(row, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(row.build(), path)
    assert [str(w.message) for w in said if "missing" in str(w.message)] == []
    with quiet():
        held = get_peft_model_state_dict(loaded)
    written = load_file(path / "adapter_model.safetensors")
    assert sorted(held) == sorted(written)
    assert all(torch.equal(t, written[n]) for n, t in held.items())
    if row.forward_differs and not peft_runs(row):
        return
    found = outputs(row, peft_side.wrapped(loaded))
    # peft's attention adds to its weights and takes away again at every call, and so rounds.
    compare = is_close if "attention_out_proj_doubled" in row.divergent else same_bits
    assert compare(found, peft_s(row))


def peft_runs(row: Row) -> bool:
    """Whether peft's model runs at all; a convolution that lost its dilation may not."""
    try:
        peft_s(row)
    except RuntimeError:
        assert "conv_dilation" in row.divergent
        return False
    return True


def assert_right(row: Row, loaded: GraphModule) -> None:
    """Asserts that a graph computes what peft saved; where peft computes it wrongly, what we do."""
    if row.forward_differs or row.dead_in_eval:
        reference = outputs(row, filled(row).ours, graded=True)
        assert_bits(outputs(row, loaded, graded=True), reference)
    else:
        assert_bits(outputs(row, loaded), peft_s(row))


@over(RELOADED)
def test_we_load_peft_s_directory_into_a_traced_graph_and_compute_the_same(
    row: Row, tmp_path: Path
) -> None:
    traced = drawn(row).traced
    code, names = str(traced.graph), [n for n, _ in traced.named_parameters()]
    loaded = fxlora.load_adapter(traced, theirs_saved(row, tmp_path))
    assert loaded is not traced
    assert (str(traced.graph), [n for n, _ in traced.named_parameters()]) == (code, names)
    assert_right(row, loaded)


@over(RELOADED)
def test_we_load_peft_s_directory_into_the_adapter_a_graph_has(row: Row, tmp_path: Path) -> None:
    pair = fresh(row)
    assert fxlora.load_adapter(pair.ours, theirs_saved(row, tmp_path)) is pair.ours
    assert_right(row, pair.ours)
    for name, p in filled(row).ours.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, pair.ours.get_parameter(name)), name


@over([r for r in RUN if r not in RELOADED])
def test_what_peft_saves_it_does_not_load_back_where_we_say_so(row: Row, tmp_path: Path) -> None:
    path = theirs_saved(row, tmp_path)
    if "sorted_patterns" in row.divergent:
        with quiet(), pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(row.build(), path)
        return
    with quiet():
        loaded = PeftModel.from_pretrained(row.build(), path)
    found = outputs(row, peft_side.wrapped(loaded))
    assert not is_close(found, peft_s(row))


@over([r for r in RUN if "sorted_patterns" in r.divergent])
def test_what_we_save_we_load_back_where_peft_does_not(row: Row, tmp_path: Path) -> None:
    loaded = fxlora.load_adapter(drawn(row).traced, ours_saved(row, tmp_path))
    assert_bits(outputs(row, loaded), mine(row))


# ---- 9: merging --------------------------------------------------------------------------------


@over(MERGED)
def test_a_merged_graph_computes_the_same_and_has_no_adapter_left(row: Row) -> None:
    pair = filled(row)
    code, before = str(pair.ours.graph), mine(row)
    merged = fxlora.merge(pair.ours)
    assert is_close(outputs(row, merged), before)
    names = [n for n, _ in merged.named_parameters()]
    assert not [n for n in names if any(word in n for word in ADAPTER_WORDS)]
    plain = {n for n, _ in row.build().named_parameters() if ".parametrizations." not in n}
    assert set(names) >= plain
    assert str(pair.ours.graph) == code
    assert_bits(outputs(row, pair.ours), before)


def theirs_merged(pair: Pair) -> Any:
    with quiet():
        return copy.deepcopy(pair.theirs).merge_and_unload()


@over([r for r in MERGED if not r.forward_differs and not LEAKING & set(r.divergent)])
def test_merged_weights_are_those_peft_merges(row: Row) -> None:
    pair = filled(row)
    merged = dict(fxlora.merge(pair.ours).named_parameters())
    theirs = theirs_merged(pair)
    for name, p in theirs.named_parameters():
        assert p.dtype == merged[name].dtype, name
        assert is_close([merged[name]], [p]), name
    assert is_close(outputs(row, theirs), mine(row))  # also where its adapters are dead in eval


@over([r for r in MERGED if not r.forward_differs and LEAKING & set(r.divergent)])
def test_peft_s_merge_fails_or_leaks_where_we_say_so(row: Row) -> None:
    pair = filled(row)
    if "conv3d_merge" in row.divergent:
        with pytest.raises(RuntimeError, match="must match"):
            theirs_merged(pair)
        return
    assert not is_close(outputs(row, theirs_merged(pair)), peft_s(row))


@over([r for r in RUN if r.unmergeable])
def test_a_merge_that_no_weight_can_hold_is_refused_and_peft_s_is_no_better(row: Row) -> None:
    pair = filled(row)
    with pytest.raises(fxlora.AdapterError, match=row.unmergeable):
        fxlora.merge(pair.ours)
    try:
        theirs = theirs_merged(pair)
    except (NotImplementedError, RuntimeError):
        return
    assert not is_close(outputs(row, theirs), peft_s(row))


# ---- 10: disabling -----------------------------------------------------------------------------


@over([r for r in RUN if r.config().bias == "none"])
def test_a_disabled_graph_is_the_base_model_bit_for_bit(row: Row) -> None:
    pair = filled(row)
    disabled = fxlora.adapters.disable(pair.ours)
    assert_bits(outputs(row, disabled, graded=True), base(row))
    assert_bits(outputs(row, fxlora.adapters.enable(disabled)), mine(row))


@over([r for r in RUN if not r.residual])
def test_a_disabled_graph_is_peft_s_disabled_model_bit_for_bit(row: Row) -> None:
    pair = filled(row)
    with quiet(), (theirs := copy.deepcopy(pair.theirs)).disable_adapter():
        expected = outputs(row, peft_side.wrapped(theirs), graded=True)
    assert_bits(outputs(row, fxlora.adapters.disable(pair.ours), graded=True), expected)


@over([r for r in RUN if r.residual])
def test_a_disabled_adapter_gives_the_first_weights_back_where_peft_s_keeps_what_is_left(
    row: Row,
) -> None:
    pair = filled(row)
    with quiet(), (theirs := copy.deepcopy(pair.theirs)).disable_adapter():
        assert not is_close(outputs(row, peft_side.wrapped(theirs)), base(row))


# ---- refusals ----------------------------------------------------------------------------------


@over(REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name_before_anything_changes(row: Row) -> None:
    args, kwargs = row.inputs()
    model = row.build()
    traced = fxlora.trace(model, args, kwargs)
    before = [p.clone() for p in traced.parameters()]
    with pytest.raises(fxlora.ConfigError, match=row.refused):
        fxlora.rewrite(traced, row.config())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(traced.parameters(), before, strict=True))


@over(REFUSED)
def test_peft_refuses_it_too_or_takes_it_as_the_row_says(row: Row) -> None:
    if row.peft_takes:
        with quiet():
            peft_side.wrap(row.build(), row.config(), 0)
        return
    with quiet(), pytest.raises(Exception):  # noqa: B017, PT011
        peft_side.wrap(row.build(), row.config(), 0)


def test_every_row_has_a_name_of_its_own() -> None:
    names = [r.id for r in (*ROWS, *REFUSED)]
    assert len(set(names)) == len(names)
