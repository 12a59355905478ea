"""Each pass of exact mode: removed, absent and unchanged, bits preserved, many users, a chain."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_optimize_checkpoints import gradients, named, saved
from test_optimize_memory import pair
from torch import nn
from torch.fx import GraphModule
from zoo import seed

import fxlora
from fxlora.errors import ConfigError
from fxlora.optimize import functions, report
from fxlora.optimize.run import MODES
from fxlora.runtime import cast_like


def rewritten(model: nn.Module, **settings: Any) -> GraphModule:
    lora = fxlora.rewrite(
        fxlora.trace(model), LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **settings})
    )
    torch.manual_seed(1)
    for p in lora.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    return lora


def targets(graph: GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes]


def changed(fast: GraphModule, name: str) -> int:
    return report(fast).step(name).changed


# ---- flatten -----------------------------------------------------------------------------------


def test_flatten_leaves_no_module_call_in_the_seed() -> None:
    fast = fxlora.optimize(rewritten(seed()))
    assert all(n.op != "call_module" for n in fast.graph.nodes)
    assert targets(fast).count(functions.add_product) == 2


def test_flatten_leaves_a_module_with_a_hook_and_the_hook_runs() -> None:
    model = seed()
    model[1].register_forward_hook(lambda m, a, out: out * 3)
    lora = rewritten(model)
    fast, x = fxlora.optimize(lora), torch.randn(3, 10)
    assert [r.where for r in report(fast).step("flatten").refused] == ["1"]
    assert torch.equal(fast(x), lora(x))


def test_flatten_leaves_a_subclass_with_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(10, 4), nn.ReLU(), nn.Linear(4, 4))
    lora, x = rewritten(model), torch.randn(3, 10)
    fast = fxlora.optimize(lora)
    assert "0" in targets(fast)
    assert torch.equal(fast(x), lora(x))


# ---- dropouts ----------------------------------------------------------------------------------


def test_dropouts_goes_on_following_train_and_eval() -> None:
    lora, x = rewritten(seed(), lora_dropout=0.5), torch.randn(3, 10)
    fast = fxlora.optimize(lora)
    for mode in (True, False):
        outs = []
        for graph in (fast, lora):
            torch.manual_seed(2)
            outs.append(graph.train(mode)(x))
        assert torch.equal(*outs)
    assert not torch.equal(fast.train()(x), fast.eval()(x))


# ---- casts -------------------------------------------------------------------------------------


def test_casts_removes_all_of_one_dtype_and_keeps_those_behind_a_dropout() -> None:
    assert cast_like not in targets(fxlora.optimize(rewritten(seed())))
    kept = fxlora.optimize(rewritten(seed(), lora_dropout=0.1))
    assert targets(kept).count(cast_like) == 2
    assert {r.why for r in report(kept).step("casts").refused} == {
        "what reads the cast is no plain product (a dropout, another adapter's cast)"
    }


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("mode", ["exact", "memory"])
def test_under_autocast_outputs_and_gradients_are_peft_s_bits(
    dtype: torch.dtype, dropout: float, mode: str
) -> None:
    _, theirs, lora, inputs = pair(dtype, lora_dropout=dropout)
    fast = fxlora.optimize(lora, mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        mine, peft_s = gradients(fast.train(), inputs), gradients(theirs.train(), inputs)
    assert torch.equal(mine[0], peft_s[0])
    other = named(theirs)
    for name, p in lora.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            assert torch.equal(p.grad, other[name].grad), name


# ---- shared casts ------------------------------------------------------------------------------


def test_shared_casts_keep_one_copy_of_x_for_siblings_and_peft_s_bits() -> None:
    _, theirs, lora, inputs = pair(torch.bfloat16, length=600)  # enough for it to pay
    fast = fxlora.optimize(lora)
    assert changed(fast, "shared_casts") == 3 * 3  # k and v after q; up after gate
    assert torch.equal(gradients(fast.train(), inputs)[0], gradients(theirs.train(), inputs)[0])
    other = named(theirs)
    trained = [(n, p) for n, p in lora.named_parameters() if p.requires_grad]
    assert all(torch.equal(p.grad, other[n].grad) for n, p in trained)
    copies = 3 * 3 * (2 * 600 * 32) * 4  # bytes of what k, v and up no longer keep
    assert saved(theirs, inputs) - saved(fast, inputs) == copies


# ---- scalings, products ------------------------------------------------------------------------


def test_a_scaling_that_is_no_power_of_two_leaves_gradients_exact_and_y_a_unit_off() -> None:
    lora, x = (
        rewritten(nn.Sequential(nn.Linear(10, 20)), target_modules=["0"], lora_alpha=6),
        torch.randn(64, 10),
    )
    fast = fxlora.optimize(lora)
    outs, grads = [], []
    for graph in (fast, lora):
        out = graph(x)
        out.backward(torch.ones_like(out))
        grads.append([p.grad.clone() for p in lora.parameters() if p.grad is not None])
        outs.append(out.detach())
        for p in lora.parameters():
            p.grad = None
    assert all(map(torch.equal, *grads))
    unit = torch.finfo(torch.float32).eps * outs[1].abs().max()
    assert (outs[0] - outs[1]).abs().max() <= unit


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10), (2, 2, 3, 10)])
def test_products_keep_the_bits_of_the_two_steps_for_every_number_of_dimensions(
    shape: tuple[int, ...],
) -> None:
    lora, x = rewritten(seed()), torch.randn(shape)
    assert torch.equal(fxlora.optimize(lora)(x), lora(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (600, 64), (4, 150, 64), (2, 2, 150, 64)])
def test_products_keep_the_bits_where_the_adapter_is_wider_than_the_base(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    lora = rewritten(nn.Sequential(nn.Linear(64, 64)).to(dtype), target_modules=["0"])
    fast, x = fxlora.optimize(lora), torch.randn(shape).to(dtype)
    assert changed(fast, "products") == 1
    outs, grads = [], []
    for graph in (fast, lora):
        given = x.clone().requires_grad_(True)
        out = graph(given)
        out.backward(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        trained = [p for p in lora.parameters() if p.requires_grad]
        grads.append([given.grad, *(p.grad.clone() for p in trained)])
        outs.append(out.detach())
        for p in trained:
            p.grad = None
    assert torch.equal(*outs)
    assert outs[0].dtype is dtype
    assert all(map(torch.equal, *grads))


def test_products_leave_a_rank_the_blas_adds_up_in_pieces() -> None:
    lora = rewritten(nn.Sequential(nn.Linear(300, 300)), target_modules=["0"], r=256)
    (left,) = report(fxlora.optimize(lora)).step("products").refused
    assert "above 128" in left.why


# ---- other ways to differentiate ---------------------------------------------------------------


def graph_of(out: torch.Tensor) -> str:
    """Returns the names of the nodes a backward pass from a tensor goes through."""
    names, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [n for n, _ in node.next_functions]
    return " ".join(n.name() for n in names)


class Siblings(nn.Module):
    """Two layers that read what one in front of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 512), nn.Linear(64, 512, bias=False)
        self.i = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.i(x)
        return torch.tanh(self.q(x)) * self.k(x)


def test_shared_casts_and_products_are_differentiated_twice_forward_and_by_torch_func() -> None:
    torch.manual_seed(0)
    net, x = Siblings().to(torch.bfloat16), torch.randn(1, 600, 64).to(torch.bfloat16)
    lora = rewritten(net, target_modules=["q", "k", "i"], init_lora_weights=False)
    fast = fxlora.optimize(lora)
    assert changed(fast, "shared_casts") == 1
    assert changed(fast, "products") == 3
    assert "_Again" in graph_of(fast(x))
    trained = {n: p for n, p in lora.named_parameters() if p.requires_grad}

    def loss(graph: nn.Module, values: Any) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(graph, values, (x,))
        return out.float().square().mean()

    def twice(graph: nn.Module) -> Any:
        first = torch.autograd.grad(loss(graph, {}), [*trained.values()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*trained.values()])

    for mine, plain in zip(twice(fast), twice(lora), strict=True):
        assert (mine - plain).abs().max() <= 0.02 * plain.abs().max()  # bf16 on the way
    mine, plain = (torch.func.grad(functools.partial(loss, g))(trained) for g in (fast, lora))
    assert all(torch.equal(mine[n], plain[n]) for n in trained)
    along = ({n: torch.ones_like(p) for n, p in trained.items()},)
    mine, plain = (
        torch.func.jvp(torch.func.grad(functools.partial(loss, g)), (trained,), along)[1]
        for g in (fast, lora)
    )
    for n in trained:  # the Hessian's product with a vector, forward over reverse
        assert (mine[n] - plain[n]).abs().max() <= 0.02 * plain[n].abs().max(), n


# ---- readings, the whole -----------------------------------------------------------------------


def test_readings_see_parameters_that_were_replaced_loaded_and_moved() -> None:
    lora, x = rewritten(seed()), torch.randn(3, 10)
    fast = fxlora.optimize(lora)
    fast.load_state_dict({k: v + 1 for k, v in fast.state_dict().items()}, assign=True)
    for name, p in fast.named_parameters():
        owner, _, last = name.rpartition(".")
        lora.get_submodule(owner)._parameters[last] = p
    assert torch.equal(fast(x), lora(x))
    assert torch.equal(fast.double()(x.double()), lora(x.double()))


def test_a_copy_of_an_optimized_graph_computes_with_its_own_parameters() -> None:
    lora, x = rewritten(seed()), torch.randn(3, 10)
    fast = fxlora.optimize(lora)
    before = fast(x).detach()
    twin = copy.deepcopy(fast)
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(fast(x), before)
    assert not twin(x).any()


def test_optimizing_changes_neither_the_rewritten_graph_nor_what_it_computes() -> None:
    lora, x = rewritten(seed()), torch.randn(3, 10)
    code, out = lora.code, lora(x)
    fxlora.optimize(lora)
    assert lora.code == code
    assert torch.equal(lora(x), out)


def test_an_adapter_saved_from_an_optimized_graph_is_the_one_of_the_plain_graph(
    tmp_path: Any,
) -> None:
    lora, x = rewritten(seed()), torch.randn(3, 10)
    fast = fxlora.optimize(lora)
    fxlora.save_adapter(fast, tmp_path)
    other = rewritten(copy.deepcopy(fxlora.facts.info(lora).model), init_lora_weights=False)
    quick = fxlora.optimize(other)
    fxlora.load_adapter(quick, tmp_path)
    assert torch.equal(quick(x), lora(x))


def test_optimizing_twice_is_optimizing_once() -> None:
    fast = fxlora.optimize(rewritten(seed()))
    again = fxlora.optimize(fast)
    assert all(s.changed == 0 for s in report(again).steps)
    assert again.code == fast.code


def test_several_active_adapters_keep_their_bits() -> None:
    lora = rewritten(seed())
    two = fxlora.adapters.add(lora, LoraConfig(target_modules=["0"], r=2), "other")
    two = fxlora.adapters.set_active(two, ["default", "other"])
    for p in two.parameters():
        p.data.add_(0.1)
    x = torch.randn(3, 10)
    for mode in MODES:
        assert torch.equal(fxlora.optimize(two, mode=mode)(x), two(x))


def test_an_unknown_mode_names_the_candidates() -> None:
    with pytest.raises(ConfigError, match=r"mode='exakt' is none of .* Did you mean 'exact'"):
        fxlora.optimize(rewritten(seed()), mode="exakt")
    with pytest.raises(TypeError, match=r"was not made by fxlora.optimize"):
        report(rewritten(seed()))


def test_the_report_prints_what_was_left_and_why() -> None:
    text = str(report(fxlora.optimize(rewritten(seed(), lora_dropout=0.1))))
    assert text.splitlines()[0] == "mode='exact'"
    assert "casts left 0 and 1 more: what reads the cast is no plain product" in text


def test_many_adapters_at_once_go_through_the_plain_graph() -> None:
    """docs/speed.md says so; an optimized graph refuses, it does not compute another number."""
    x = torch.randn(600, 64).bfloat16()
    lora = rewritten(nn.Sequential(nn.Linear(64, 64)).bfloat16(), target_modules=["0"])
    some = {n: torch.randn(3, *p.shape) for n, p in lora.named_parameters() if p.requires_grad}

    def run(graph: GraphModule, adapters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(graph, adapters, (x,))

    together = torch.func.vmap(lambda a: run(lora, a))(some)
    assert torch.equal(together[1], run(lora, {n: v[1] for n, v in some.items()}))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: run(fxlora.optimize(lora), a))(some)


def test_an_optimized_graph_is_exported_for_any_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) + self.k(x)

    x = torch.randn(600, 64).bfloat16()
    config = LoraConfig(r=4, target_modules=["q", "k"])
    fast = fxlora.optimize(fxlora.rewrite(fxlora.trace(Two().bfloat16(), (x,)), config))
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=4096)}}
    exported = torch.export.export(fast, (x,), dynamic_shapes=batch).module()
    for rows in (3, 600):
        assert torch.equal(exported(x[:rows]), fast(x[:rows]))
