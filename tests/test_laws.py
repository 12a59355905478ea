"""The laws of trace, plan, rewrite and compare, over random small networks (see networks.py)."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from networks import (
    WIDTH,
    AliasedBlock,
    Batch,
    Branch,
    InPlace,
    Linear,
    Named,
    Net,
    Network,
    Norm,
    Part,
    networks,
    tensors,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

import fxlora
from fxlora.canonical import canonical
from fxlora.compare import certify
from fxlora.errors import ConfigError, GuardError, TraceError, UnsupportedError
from fxlora.facts import info
from fxlora.gradients import requires_grad
from fxlora.peft_side import common_name

NAMES = ("lin", "a", "b", "head", "one", "two", "back", "0", "up_lin", "spare")


def law(examples: int) -> Callable[[Any], Any]:
    """Runs a law over the same examples every time: a failure in CI is a failure at home."""
    return hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )


# ---- what is drawn, and how it is run ---------------------------------------------------------


class Config(LoraConfig):
    """A LoraConfig that prints what was set."""

    def __repr__(self) -> str:
        plain = LoraConfig()
        shown = {k: v for k, v in self.to_dict().items() if v != getattr(plain, k, None)}
        return f"Config({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


@st.composite
def configs(draw: Any, **fixed: Any) -> LoraConfig:
    """Draws a LoraConfig; `fixed` pins fields."""
    targets = st.one_of(
        st.just("all-linear"),
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True),
        st.sampled_from((r".*\.(lin|a|one)", "lin", r"body\.[01]\..*")),
    )
    chosen: dict[str, Any] = {
        "r": draw(st.sampled_from((1, 2, 3))),
        "lora_alpha": draw(st.sampled_from((1, 5))),
        "lora_dropout": draw(st.sampled_from((0.0, 0.3))),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(("none", "none", "all", "lora_only"))),
        "lora_bias": draw(st.sampled_from((False, False, True))),
        "target_modules": draw(targets),
        "rank_pattern": draw(st.sampled_from(({}, {"lin": 4}))),
        "alpha_pattern": draw(st.sampled_from(({}, {"lin|a": 7}))),
        "exclude_modules": draw(st.sampled_from((None, None, ["spare"], r".*\.b"))),
        "init_lora_weights": draw(st.sampled_from((True, True, "gaussian", False))),
        **fixed,
    }
    if chosen["lora_bias"] and chosen["init_lora_weights"] == "gaussian":
        chosen["init_lora_weights"] = True  # peft refuses the pair
    return Config(**chosen)


def plain_config(targets: Any = "all-linear", **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=5, target_modules=targets, **settings)


def trace(spec: Network, model: nn.Module, batch: int = 3, **how: Any) -> GraphModule:
    return fxlora.trace(model, *spec.inputs(batch), **how)


def state(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in (*model.parameters(), *model.buffers())]


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Puts batch-norm statistics back: the graph shares them with the model, as its weights."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, before in buffers:
                if not torch.equal(b, before):
                    b.copy_(before)


def run(model: nn.Module, inputs: tuple[Any, Any], seed: int = 5) -> list[torch.Tensor]:
    """Returns the output tensors under one seed."""
    args, kwargs = copy.deepcopy(inputs)
    torch.manual_seed(seed)
    with unmoved(model):
        return [t.detach() for t in tensors(model(*args, **kwargs))]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def planned(spec: Network, config: LoraConfig, **how: Any) -> tuple[Net, GraphModule, Any]:
    """Returns model, traced graph and plan; a configuration that adapts nothing is no example."""
    model = spec.build()
    traced = trace(spec, model, **how)
    try:
        return model, traced, fxlora.plan(traced, config)
    except ConfigError:
        hypothesis.reject()
        raise


def fill_b(lora: nn.Module, scale: float = 0.3) -> None:
    """Gives every lora_B numbers: with B = 0 almost every mistake computes the right output."""
    draw = torch.Generator().manual_seed(3)
    for name, p in lora.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * scale)


def guarded(graph: nn.Module, inputs: tuple[Any, Any]) -> list[torch.Tensor] | None:
    """Runs a graph; None when it says that it does not stand for these inputs."""
    try:
        return run(graph, inputs)
    except GuardError:
        return None


# ---- the trace is the model -----------------------------------------------------------------------


@law(50)
@given(networks(), st.sampled_from((1, 2, 3)), st.booleans())
def test_the_traced_graph_is_the_model_bit_for_bit_on_other_batches_and_in_both_modes(
    spec: Network, batch: int, dynamic: bool
) -> None:
    model = spec.build()
    hypothesis.assume(batch > 1 or "batch=True" not in repr(spec))  # batch norm wants two rows
    traced = trace(spec, model, batch, dynamic=dynamic)
    refused = 0
    for mode in (spec.training, not spec.training, spec.training):
        for size in (batch, 5, 2):
            inputs = spec.inputs(size, seed=size)
            traced.train(mode)
            model.train(mode)
            got = guarded(traced, inputs)
            if got is None:
                refused += 1
                assert not dynamic or "'batch'" in repr(spec) or not info(traced).dynamic
                assert size != batch
                continue
            assert equal(got, run(model, inputs)), (mode, size)
    assert refused < 9


@law(30)
@given(networks())
def test_the_traced_graph_keeps_the_names_and_the_flags_each_module_has(spec: Network) -> None:
    model = spec.build()
    traced = trace(spec, model)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [(n, id(p)) for n, p in traced.named_parameters(remove_duplicate=False)] == [
        (n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    inputs = spec.inputs(4, seed=4)  # as it stands, without train() or eval() in between
    got = guarded(traced, inputs)
    assert got is None or equal(got, run(model, inputs))


@law(30)
@given(networks(takes="plain"))
def test_a_trace_without_inputs_is_the_model_too(spec: Network) -> None:
    model = spec.build()
    try:
        traced = fxlora.trace(model)
    except TraceError:
        hypothesis.reject()
    assert list(traced.state_dict()) == list(model.state_dict())
    for size in (3, 5):
        inputs = spec.inputs(size, seed=size)
        assert equal(run(traced, inputs), run(model, inputs))


@law(25)
@given(networks(takes="plain"), configs())
def test_both_tracers_lead_to_the_same_plan(spec: Network, config: LoraConfig) -> None:
    _, _traced, plan = planned(spec, config)
    try:
        symbolic = fxlora.trace(spec.build())
    except TraceError:
        hypothesis.reject()
    assert fxlora.plan(symbolic, config).to_dict() == plan.to_dict()


@law(30)
@given(networks())
def test_replay_gives_the_graph_full_tracing_gives(spec: Network) -> None:
    model = spec.build()
    fast, full = trace(spec, model), trace(spec, model, replay=False)
    assert info(full).replayed == 0
    assert fast.code == full.code
    assert canonical(fast).digest == canonical(full).digest
    for a, b in zip(fast.graph.nodes, full.graph.nodes, strict=True):
        assert (a.op, str(a.target)) == (b.op, str(b.target))
        for key in (
            "module_stack",
            "shape",
            "dtype",
            "source",
            "grad_enabled",
            "alias",
            "handed_on",
        ):
            assert a.meta.get(key) == b.meta.get(key), (a, key)
        assert list(map(str, a.meta.get("mutates", ()))) == list(
            map(str, b.meta.get("mutates", ()))
        )


@law(25)
@given(networks())
def test_tracing_twice_gives_the_same_bytes(spec: Network) -> None:
    model = spec.build()
    first, second = trace(spec, model), trace(spec, spec.build())
    assert first.code == second.code
    assert info(first).guards == info(second).guards


# ---- nothing that is read is changed ----------------------------------------------------------------


def _facts(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        "parameters": [
            (n, id(p), p.data_ptr(), p.requires_grad, p.grad, p._version)
            for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(n, id(b), b._version) for n, b in model.named_buffers()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


@law(30)
@given(networks(), configs())
def test_no_step_changes_what_it_reads(spec: Network, config: LoraConfig) -> None:
    # Running a graph in train mode counts in the model's own batch-norm buffers, as the model does.
    hypothesis.assume(not (spec.training and "Norm(batch=True)" in repr(spec)))
    model = spec.build()
    facts, values, settings = _facts(model), state(model), copy.deepcopy(config.to_dict())
    inputs = spec.inputs(3)
    given = [t.clone() for t in tensors(list(inputs[0]) + list(inputs[1].values()))]
    random = torch.get_rng_state()
    traced = fxlora.trace(model, *inputs)
    assert torch.equal(random, torch.get_rng_state()), "tracing draws no random numbers"
    code, graph_facts = traced.code, _facts(traced)
    metas = [dict(n.meta) for n in traced.graph.nodes]
    try:
        plan = fxlora.plan(traced, config)
        text = str(plan)
        lora = fxlora.rewrite(traced, plan)
        assert str(plan) == text
        fill_b(lora)
        run(lora, inputs)
        fxlora.compare(model, config, *inputs)
    except ConfigError:
        pass
    except Exception as e:  # of peft's: it does not take every model
        if not type(e).__module__.startswith(("peft", "builtins")):
            raise
    assert _facts(model) == facts
    assert equal(state(model), values)
    assert config.to_dict() == settings
    assert traced.code == code
    assert _facts(traced) == graph_facts
    assert [dict(n.meta) for n in traced.graph.nodes] == metas
    after = list(tensors(list(inputs[0]) + list(inputs[1].values())))
    assert equal(given, after)


@law(30)
@given(networks(), configs(bias="none"))
def test_the_trainable_set_is_the_adapters(spec: Network, config: LoraConfig) -> None:
    _, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    expected = {
        f"{site.name}.{half}.default.{which}"
        for site in plan.adapted
        for half in ("lora_A", "lora_B")
        for which in ("weight", "bias")
        if which == "weight" or (config.lora_bias and half == "lora_B")
    }
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == expected
    assert plan.trainable == sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert plan.total == sum(p.numel() for p in lora.parameters())


@law(30)
@given(networks(), configs())
def test_base_weights_are_shared_without_copying_and_tied_stays_tied(
    spec: Network, config: LoraConfig
) -> None:
    model, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    ours = dict(lora.named_parameters(remove_duplicate=False))
    first: dict[int, nn.Parameter] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        assert ours[name].data_ptr() == p.data_ptr(), name
        assert ours[name] is not p, "a flag set on the graph must not reach the model"
        assert first.setdefault(id(p), ours[name]) is ours[name], f"{name} came untied"
    base = [n for n in ours if ".lora_" not in n]
    assert base == [n for n, _ in model.named_parameters(remove_duplicate=False)]


# ---- what the rewritten graph computes -----------------------------------------------------------------


@law(30)
@given(networks(), configs(lora_dropout=0.0, init_lora_weights=True, lora_bias=False))
def test_a_fresh_rewrite_is_the_identity_on_the_model(spec: Network, config: LoraConfig) -> None:
    _, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    for mode in (True, False):
        lora.train(mode)
        traced.train(mode)
        for size in (3, 5):
            inputs = spec.inputs(size, seed=size)
            got, expected = guarded(lora, inputs), guarded(traced, inputs)
            assert (got is None) == (expected is None)
            assert got is None or equal(got, expected)


def dense(model: nn.Module, lora: GraphModule, plan: Any) -> nn.Module:
    """Returns the model with W + s * B A in place of every adapted weight, tied ones apart."""
    out = copy.deepcopy(model)
    for site in plan.adapted:
        layer = out.get_submodule(site.name)
        a = lora.get_submodule(f"{site.name}.lora_A.default").weight.detach()
        b = lora.get_submodule(f"{site.name}.lora_B.default")
        delta = site.scaling * (b.weight.detach() @ a)
        layer.weight = nn.Parameter(
            layer.weight.detach() + (delta.T if site.kind == "Conv1D" else delta)
        )
        if b.bias is not None:
            extra = site.scaling * b.bias.detach()
            layer.bias = nn.Parameter(extra if layer.bias is None else layer.bias.detach() + extra)
    return out


@law(45)
@given(networks(double=True), configs(lora_dropout=0.0))
def test_the_branch_is_the_dense_update(spec: Network, config: LoraConfig) -> None:
    model, traced, plan = planned(spec, config)
    for site in plan.adapted:
        # A weight read past its module, or under the second name, keeps its base: as in PEFT.
        hypothesis.assume(all(c.through_module and c.path == site.name for c in site.site.calls))
    lora = fxlora.rewrite(traced, plan)
    fill_b(lora)
    merged = dense(model, lora, plan)
    for mode in (spec.training, not spec.training):
        lora.train(mode)
        merged.train(mode)
        inputs = spec.inputs(3, seed=1)
        got = guarded(lora, inputs)
        if got is None:
            continue
        torch.testing.assert_close(got, run(merged, inputs), rtol=1e-9, atol=1e-9)


@law(30)
@given(networks(), configs())
def test_strip_gives_the_traced_graph_back(spec: Network, config: LoraConfig) -> None:
    _, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    strip(lora)
    assert lora.code == traced.code


def strip(lora: GraphModule) -> None:
    """Takes every inserted node out again, by the role it carries."""
    graph = lora.graph
    bases: dict[str, Node] = {}
    added = [n for n in graph.nodes if n.meta.get("role", "base") != "base"]
    for node in graph.nodes:
        if node.meta.get("role") == "base":
            bases[node.meta["site"]] = node
        elif node.meta.get("role") is not None:
            for user in list(node.users):
                if user.meta.get("role", "base") == "base":
                    user.replace_input_with(node, bases[node.meta["site"]])
    for node in reversed(added):
        graph.erase_node(node)
    lora.recompile()


@law(30)
@given(networks(), configs())
def test_every_inserted_node_says_its_role_and_its_site(spec: Network, config: LoraConfig) -> None:
    _, traced, plan = planned(spec, config)
    lora = fxlora.rewrite(traced, plan)
    old = {n.name: n for n in traced.graph.nodes}
    new = {n.name: n for n in lora.graph.nodes}
    sites = {s.name for s in plan.adapted}
    for node in lora.graph.nodes:
        if node.name in old:
            kept = {k: v for k, v in node.meta.items() if k not in ("role", "site", "adapter")}
            assert _named(kept, new) == _named(old[node.name].meta, new)
            assert node.meta.get("role", "base") == "base"
        else:
            assert node.meta["site"] in sites
            assert node.meta["role"]
            assert node.meta["adapter"] == "default"
            assert node.meta["module_stack"]
            assert "shape" in node.meta
            assert "dtype" in node.meta


def _named(meta: dict[str, Any], new: dict[str, Node]) -> dict[str, Any]:
    """Names what a node writes into: by its site, whose result another node gives once it is adapted."""

    def name(written: Node) -> str:
        assert written.name in new
        return new[written.name].meta.get("site", written.name)

    return {k: tuple(map(name, v)) if k == "mutates" else v for k, v in meta.items()}


# ---- equal to peft ---------------------------------------------------------------------------------------


def assume_no_aliased_block(spec: Network) -> None:
    """Leaves out what `test_a_layer_inside_an_aliased_block_...` pins."""
    hypothesis.assume("AliasedBlock" not in repr(spec))


def wrapped(model: nn.Module, config: LoraConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model


def outputs_and_gradients(
    model: nn.Module, inputs: tuple[Any, Any]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    args, kwargs = copy.deepcopy(inputs)
    model.zero_grad()
    torch.manual_seed(5)
    with unmoved(model):
        outputs = list(tensors(model(*args, **kwargs)))
        losses = [t.square().mean() for t in outputs if t.requires_grad]
        if losses:
            sum(losses).backward()
    names = {common_name(n): p for n, p in model.named_parameters()}
    return [t.detach() for t in outputs], {n: p.grad for n, p in names.items() if p.requires_grad}


@law(50)
@given(networks(), configs())
def test_peft_computes_the_same_bits(spec: Network, config: LoraConfig) -> None:
    model = spec.build()
    traced = trace(spec, model)
    torch.manual_seed(1)
    ours, refusal = _attempt(lambda: fxlora.rewrite(traced, config))
    theirs, their_refusal = _attempt(lambda: wrapped(model, config))
    # A layer fxlora does not adapt yet is refused by name; docs/parity.md lists them.
    hypothesis.assume(not isinstance(refusal, UnsupportedError) or their_refusal is not None)
    assert (refusal is None) == (their_refusal is None), (refusal, their_refusal)
    if refusal is not None:
        assert isinstance(refusal, ConfigError)
        return
    other = {common_name(n): p for n, p in theirs.named_parameters()}
    mine = dict(ours.named_parameters())
    assert list(mine) == list(other)
    for name, p in mine.items():
        assert p.requires_grad == other[name].requires_grad, name
        assert p.dtype == other[name].dtype, name
        assert torch.equal(p, other[name]), name
    fill_b(ours)
    fill_b(theirs)
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        inputs = spec.inputs(3, seed=1)
        if guarded(ours, inputs) is None:
            assert info(ours).mode is not None
            continue
        a, grads_a = outputs_and_gradients(ours, inputs)
        b, grads_b = outputs_and_gradients(theirs, inputs)
        assert equal(a, b), mode
        assert grads_a.keys() == grads_b.keys()
        for name, g in grads_a.items():
            assert (g is None) == (grads_b[name] is None), (mode, name)
            assert g is None or torch.equal(g, grads_b[name]), (mode, name)


def _attempt(step: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return step(), None
    except Exception as e:
        return None, e


@law(30)
@given(networks(), configs())
def test_compare_agrees_and_certifies(spec: Network, config: LoraConfig) -> None:
    model, _, _ = planned(spec, config)
    result = fxlora.compare(model, config, *spec.inputs(3))
    assert result.equal, result.differences
    assert result.certificate.equal
    assert (result.trainable, result.total) == (result.peft_trainable, result.peft_total)
    floats = [t for t in run(model, spec.inputs(3)) if t.is_floating_point()]
    assert len(result.outputs) == len(floats), "an output that is not compared proves nothing"


# ---- the certificate can fail -----------------------------------------------------------------------------


def _branches(lora: GraphModule) -> Iterator[dict[str, Node]]:
    """Yields role -> node for every inserted branch, in order."""
    found: dict[str, Node] = {}
    for node in lora.graph.nodes:
        role = node.meta.get("role")
        if role in (None, "base"):
            continue
        found.setdefault(role, node) if role == "cast" else found.update({role: node})
        if role == "cast_back":
            yield found
            found = {}


def wrong_scaling(lora: GraphModule, branch: dict[str, Node]) -> None:
    x, scaling = branch["scale"].args
    branch["scale"].args = (x, scaling * 2)


def a_transpose(lora: GraphModule, branch: dict[str, Node]) -> None:
    node = branch["lora_A"]
    with lora.graph.inserting_before(node):
        turned = lora.graph.call_method("transpose", (node.args[0], 0, 1))
    node.args = (turned,)


def a_missing_site(lora: GraphModule, branch: dict[str, Node]) -> None:
    out = branch["cast_back"]
    out.replace_all_uses_with(out.args[1])


def no_dropout(lora: GraphModule, branch: dict[str, Node]) -> None:
    branch["dropout"].replace_all_uses_with(branch["dropout"].args[0])


def another_input(lora: GraphModule, branch: dict[str, Node]) -> None:
    node = branch["lora_A"]
    with lora.graph.inserting_before(node):
        other = lora.graph.call_function(torch.neg, (node.args[0],))
    node.args = (other,)


def a_base_that_trains(lora: GraphModule, branch: dict[str, Node]) -> None:
    site = branch["scale"].meta["site"]
    lora.get_submodule(site).weight.requires_grad_(True)


def swapped_halves(lora: GraphModule, branch: dict[str, Node]) -> None:
    branch["lora_A"].target, branch["lora_B"].target = (
        branch["lora_B"].target,
        branch["lora_A"].target,
    )


def an_add_the_other_way_round(lora: GraphModule, branch: dict[str, Node]) -> None:
    base, _scaled = branch["sum"].args
    branch["sum"].args = (base, base)


MUTATIONS = (
    wrong_scaling, a_transpose, a_missing_site, no_dropout, another_input, a_base_that_trains,
    swapped_halves, an_add_the_other_way_round,
)  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_one_mistake_at_one_call_fails_the_certificate(mutation: Any) -> None:
    caught = 0

    @law(9)
    @given(networks(), configs(lora_dropout=0.3), st.randoms(use_true_random=False))
    def check(spec: Network, config: LoraConfig, random: Any) -> None:
        nonlocal caught
        model, traced, plan = planned(spec, config)
        lora = fxlora.rewrite(traced, plan)
        theirs = fxlora.trace(wrapped(model, config), *spec.inputs(3))
        other = canonical(theirs, common_name)
        assert certify(canonical(lora), other).equal
        branches = [b for b in _branches(lora) if _is_read(b["cast_back"])]
        hypothesis.assume(branches)
        mutation(lora, random.choice(branches))
        assert not certify(canonical(lora), other).equal
        caught += 1

    check()
    assert caught


def _is_read(node: Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        at = todo.pop()
        if at.op == "output":
            return True
        todo += [u for u in at.users if u not in seen]
        seen.update(at.users)
    return False


# ---- gradients, statically ------------------------------------------------------------------------------------


class Flags(Interpreter):
    """Runs a graph and keeps every tensor, so that autograd's flag of each node can be read."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)

    def flags(self, inputs: tuple[Any, Any]) -> dict[Node, bool]:
        args, kwargs = copy.deepcopy(inputs)
        given = iter(args)
        values = [
            kwargs[str(n.target)] if str(n.target) in kwargs else next(given, *n.args[:1])
            for n in self.module.graph.nodes
            if n.op == "placeholder"
        ]
        torch.manual_seed(5)
        self.run(*values)
        return {n: v.requires_grad for n, v in self.env.items() if isinstance(v, torch.Tensor)}


@law(50)
@given(networks(), configs(), st.booleans())
def test_static_requires_grad_is_autograd_s_flag(
    spec: Network, config: LoraConfig, frozen: bool
) -> None:
    # Pinned below: a leaf inside a container input, and a write to an adapted layer's output.
    model = spec.build()
    model.requires_grad_(not frozen)
    graphs = [trace(spec, model)]
    with contextlib.suppress(ConfigError):
        graphs.append(fxlora.rewrite(graphs[0], config))
    for graph in graphs:
        with unmoved(graph):
            seen = Flags(graph).flags(spec.inputs(3))
        static = requires_grad(graph)
        wrong = {n.name: flag for n, flag in seen.items() if static[n] != flag}
        assert not wrong, graph.code


# ---- cases the search found, each with the smallest network that shows it -----------------------


def spec_of(cls: type[nn.Module], options: dict[str, Any], **fields: Any) -> Network:
    return Network((Part(cls, tuple(options.items())),), **fields)


def test_a_layer_inside_an_aliased_block_is_adapted_at_both_calls() -> None:
    spec = spec_of(AliasedBlock, {})
    result = fxlora.compare(spec.build(), plain_config(), *spec.inputs(3))
    assert result.equal, result.differences


def test_compare_runs_what_a_dataclass_output_holds() -> None:
    spec = spec_of(Linear, {"bias": True}, gives="dataclass")
    result = fxlora.compare(spec.build(), plain_config(), *spec.inputs(3))
    assert len(result.outputs) == 2
    assert len(result.gradients) == 2


def test_compare_leaves_batch_norm_statistics_alone() -> None:
    spec = Network((Part(Norm, (("batch", True),)), Part(Linear, (("bias", True),))), training=True)
    model = spec.build()
    before = state(model)
    fxlora.compare(model, plain_config(), *spec.inputs(3))
    assert equal(state(model), before)


@pytest.mark.parametrize("takes", ["nested", "dataclass", "named"])
def test_a_tensor_inside_a_container_input_may_require_grad(takes: str) -> None:
    spec = spec_of(Linear, {"bias": True}, takes=takes, grad=True)
    graph = trace(spec, spec.build().requires_grad_(False))
    seen, static = Flags(graph).flags(spec.inputs(3)), requires_grad(graph)
    assert {n: static[n] for n in seen} == seen


@pytest.mark.parametrize("how", ["add_", "statement"])
def test_a_write_to_an_adapted_layer_s_output_writes_to_the_sum(how: str) -> None:
    spec = spec_of(InPlace, {"how": how})
    lora = fxlora.rewrite(trace(spec, spec.build()), plain_config())
    written = next(n for n in lora.graph.nodes if n.meta.get("mutates"))
    assert written.meta["mutates"] == (written.args[0],)
    seen, static = Flags(lora).flags(spec.inputs(3)), requires_grad(lora)
    assert {n: static[n] for n in seen} == seen


def test_a_graph_takes_the_example_it_was_traced_with() -> None:
    spec = spec_of(Branch, {"on": "batch", "setting": 1})
    model = spec.build()
    traced = trace(spec, model, batch=1)
    assert equal(run(traced, spec.inputs(1)), run(model, spec.inputs(1)))


class _Told(nn.Module):
    """A block whose parent writes the setting it shares with it, between the calls."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.settings = settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.settings["gain"]


class _Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"gain": 1.0}
        self.layers = nn.ModuleList(_Told(self.settings) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            self.settings["gain"] = float(i + 1)
            x = layer(x)
        return x


def test_a_setting_written_between_blocks_is_read_again() -> None:
    model, x = _Telling(), torch.randn(3, WIDTH)
    assert torch.equal(fxlora.trace(model, (x,))(x), model(x))


def test_the_specs_print_and_build_the_same_network_twice() -> None:
    @law(20)
    @given(networks())
    def check(spec: Network) -> None:
        first, second = spec.build(), spec.build()
        assert list(first.state_dict()) == list(second.state_dict())
        assert all(map(torch.equal, state(first), state(second)))
        assert equal(run(first, spec.inputs(3)), run(second, spec.inputs(3)))
        assert repr(spec).startswith("Network(parts=(")

    check()


def test_the_laws_can_fail() -> None:
    spec = spec_of(Linear, {"bias": True})
    model = spec.build()
    lora = fxlora.rewrite(trace(spec, model), plain_config())
    fill_b(lora)
    inputs = spec.inputs(3)
    assert not equal(run(lora, inputs), run(model, inputs)), "nonzero B must show in the output"
    assert list(tensors(Batch(torch.ones(WIDTH), Named(torch.ones(WIDTH)))))[1].shape == (WIDTH,)
