"""The tracer: one kind of graph from either tracer, on other sizes and modes, of any structure."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, tensors

import fxlora
from fxlora.errors import GuardError, TraceError
from fxlora.facts import info


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [
        str(n.target) for n in graph.graph.nodes if n.op == "call_module" and n.meta["module_stack"]
    ]


class TestBothTracers:
    """What symbolic and concrete tracing agree on."""

    def test_sequential_needs_no_inputs_and_gives_the_graph_inputs_would_give(self) -> None:
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        symbolic, concrete = fxlora.trace(model), fxlora.trace(model, (torch.ones(2, 10),))
        assert calls(symbolic) == calls(concrete) == ["0", "1", "2"]
        x = torch.randn(3, 10)
        assert torch.equal(symbolic(x), concrete(x))

    @pytest.mark.parametrize("inputs", [(), (torch.ones(2, 4),)], ids=["symbolic", "concrete"])
    def test_aliases_keep_their_own_names(self, inputs: tuple[Any, ...]) -> None:
        class Aliased(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)
                self.b = self.a

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(self.a(x))

        assert calls(fxlora.trace(Aliased(), inputs)) == ["a", "b"]

    @pytest.mark.parametrize("inputs", [(), (torch.ones(2, 4),)], ids=["symbolic", "concrete"])
    def test_a_module_twice_in_a_sequential_is_called_by_both_names(self, inputs: Any) -> None:
        layer = nn.Linear(4, 4)
        assert calls(fxlora.trace(nn.Sequential(layer, nn.ReLU(), layer), inputs)) == [
            "0",
            "1",
            "2",
        ]

    @pytest.mark.parametrize("inputs", [(), (torch.ones(2, 4),)], ids=["symbolic", "concrete"])
    def test_functional_dropout_follows_train_and_eval(self, inputs: tuple[Any, ...]) -> None:
        class Dropping(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.dropout(x, 0.5, training=self.training)

        model = Dropping().eval()
        traced = fxlora.trace(model, inputs)
        x = torch.ones(2, 4)
        assert torch.equal(traced(x), x)
        traced.train()
        torch.manual_seed(3)
        dropped = traced(x)
        torch.manual_seed(3)
        assert torch.equal(dropped, F.dropout(x, 0.5, training=True))
        assert not model.training

    @pytest.mark.parametrize("inputs", [(), (torch.ones(2, 4),)], ids=["symbolic", "concrete"])
    def test_stochastic_depth_stays_one_node_and_follows_both_modes(self, inputs: Any) -> None:
        class DropPath(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if not self.training:
                    return x
                return x * (torch.rand(x.size(0), 1) > 0.5)

        model = nn.Sequential(nn.Linear(4, 4), DropPath())
        traced = fxlora.trace(model, inputs)
        assert calls(traced) == ["0", "1"]
        x = torch.randn(3, 4)
        for mode in (True, False):
            torch.manual_seed(3)
            expected = model.train(mode)(x)
            torch.manual_seed(3)
            assert torch.equal(traced.train(mode)(x), expected)

    def test_a_leaf_as_the_model_itself_is_traced_through(self) -> None:
        model = nn.Linear(4, 2)
        for traced in (fxlora.trace(model), fxlora.trace(model, (torch.ones(2, 4),))):
            x = torch.randn(3, 4)
            assert torch.equal(traced(x), model(x))


class TestInputsAndOutputs:
    """Structure in, structure out."""

    def test_nested_inputs_and_outputs_keep_their_structure(self) -> None:
        class Nested(nn.Module):
            def forward(
                self, batch: dict[str, Any], *, scale: float = 1.0, flag: Any = None
            ) -> Any:
                a, (b, c) = batch["a"], batch["rest"]
                return {"sum": a + b * scale, "pair": (c, [a - b]), "flag": flag}

        batch = {"a": torch.ones(2, 3), "rest": (torch.ones(2, 3), torch.zeros(2))}
        traced = fxlora.trace(Nested(), (batch,), {"scale": 2.0})
        other = {"a": torch.randn(5, 3), "rest": (torch.randn(5, 3), torch.randn(5))}
        out, expected = traced(other, scale=2.0), Nested()(other, scale=2.0)
        assert out.keys() == expected.keys()
        assert isinstance(out["pair"], tuple)
        assert isinstance(out["pair"][1], list)
        assert out["flag"] is None
        assert all(torch.equal(x, y) for x, y in zip(tensors(out), tensors(expected), strict=True))

    def test_a_constant_argument_is_fixed_and_another_value_is_refused_by_name(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
                return x * scale

        traced = fxlora.trace(Scaled(), (torch.ones(2),), {"scale": 2.0})
        with pytest.raises(GuardError, match=r"scale=3\.0.*traced with scale=2\.0"):
            traced(torch.ones(2), scale=3.0)

    def test_a_dataclass_and_a_cache_object_come_back_rebuilt(self) -> None:
        @dataclasses.dataclass
        class Out:
            y: torch.Tensor
            n: int

        class Cache:
            def __init__(self) -> None:
                self.layers: list[torch.Tensor] = []

        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                cache = Cache()
                cache.layers.append(x + 1)
                return Out(x * 2, 3), cache

        traced = fxlora.trace(Model(), (torch.ones(2),))
        x = torch.randn(2)
        out, cache = traced(x)
        assert isinstance(out, Out)
        assert torch.equal(out.y, x * 2)
        assert out.n == 3
        assert isinstance(cache, Cache)
        assert torch.equal(cache.layers[0], x + 1)
        traced(torch.zeros(2))
        assert torch.equal(cache.layers[0], x + 1), "a later call must not change an earlier result"

    def test_one_sequence_as_the_example_stands_for_any_batch(self) -> None:
        entry = ZOO["bert"]
        model = entry.build().eval()
        traced = fxlora.trace(model, (), {"input_ids": torch.full((1, 7), 5)})
        for size in ((1, 9), (4, 5)):
            x = torch.randint(0, 99, size)
            assert torch.equal(
                traced(input_ids=x).last_hidden_state, model(input_ids=x).last_hidden_state
            )


class TestGuards:
    """A call the graph does not stand for is refused, not miscomputed."""

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.size(1) > 4 else x * 3

    def test_a_branch_on_a_size_is_a_guard_with_its_meaning(self) -> None:
        traced = fxlora.trace(self.Branching(), (torch.ones(2, 8),))
        assert torch.equal(traced(torch.ones(3, 5)), torch.full((3, 5), 2.0))
        with pytest.raises(GuardError, match=r"s1 > 4, where s1 is x\.size\(1\)"):
            traced(torch.ones(2, 3))

    def test_a_size_the_weights_fix_is_refused_by_number(self) -> None:
        traced = fxlora.trace(nn.Sequential(nn.Linear(4, 2)), (torch.ones(2, 4),))
        with pytest.raises(
            GuardError, match=r"input\.size\(1\) is 5; this graph stands for 4 only"
        ):
            traced(torch.ones(2, 5))

    def test_a_missing_input_is_named(self) -> None:
        class Two(nn.Module):
            def forward(self, x: torch.Tensor, k: int = 0, y: Any = None) -> torch.Tensor:
                return x + y

        traced = fxlora.trace(Two(), (torch.ones(2), 0, torch.ones(2)))
        with pytest.raises(GuardError, match="y is missing"):
            traced(torch.ones(2))

    def test_a_mode_that_takes_another_path_is_refused(self) -> None:
        class Modal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.lin(x) if self.training else torch.tanh(x)

        traced = fxlora.trace(Modal().eval(), (torch.ones(2, 4),))
        traced(torch.ones(2, 4))
        traced.train()
        with pytest.raises(GuardError, match="traced in eval mode"):
            traced(torch.ones(2, 4))


class TestEffects:
    """In-place calls and random draws survive; the model does not change."""

    def test_in_place_writes_survive(self) -> None:
        class Writes(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                out = torch.zeros_like(x)
                out[:, 0] = x[:, 1]
                out.index_add_(1, torch.tensor([1]), x[:, :1])
                return out

        x = torch.randn(3, 4)
        traced = fxlora.trace(Writes(), (torch.ones(2, 4),))
        assert torch.equal(traced(x), Writes()(x))

    def test_an_identity_does_not_take_over_its_input(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.same = nn.Identity()
                self.lin = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.same(x)
                return self.lin(y) + x

        graph = fxlora.trace(Model(), (torch.ones(2, 4),)).graph
        add = next(n for n in graph.nodes if n.target == "add")
        assert [n.op for n in add.all_input_nodes] == ["call_module", "placeholder"]

    def test_train_mode_draws_random_numbers_in_the_model_s_order(self) -> None:
        class LayerDrop(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if self.training and torch.rand([]) < 0.0:
                    return x
                return F.dropout(x, 0.5, training=self.training)

        model = LayerDrop().eval()
        traced = fxlora.trace(model, (torch.ones(2, 4),))
        traced.train()
        model.train()
        torch.manual_seed(3)
        a = model(torch.ones(2, 4))
        torch.manual_seed(3)
        assert torch.equal(a, traced(torch.ones(2, 4)))

    def test_tracing_leaves_the_model_as_it_was(self) -> None:
        class Stateful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(4, 4)
                self.bn = nn.BatchNorm1d(4)
                self.seen: Any = None

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.seen = x
                return self.bn(self.lin(x))

        model = Stateful()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        traced = fxlora.trace(model, (torch.ones(2, 4),))
        assert model.seen is None
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert any("seen" in note for note in info(traced).notes)

    def test_a_failed_trace_puts_everything_back(self) -> None:
        class Failing(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum() > 0 else -x

        watched = ("__call__", "__getattr__")
        before = [nn.Module.__dict__[k] for k in watched], torch.SymBool.__bool__
        with pytest.raises(TraceError, match=r"x if x\.sum\(\) > 0"):
            fxlora.trace(Failing(), (torch.ones(2),))
        assert ([nn.Module.__dict__[k] for k in watched], torch.SymBool.__bool__) == before
        assert "training" not in nn.Module.__dict__
        assert "__getattribute__" not in nn.Module.__dict__
        assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)

    def test_another_thread_s_model_is_not_recorded(self) -> None:
        other = nn.Linear(3, 3)
        seen: list[torch.Tensor] = []

        class Waiting(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                t = threading.Thread(target=lambda: seen.append(other(torch.ones(1, 3))))
                t.start()
                t.join()
                return x + 1

        graph = fxlora.trace(Waiting(), (torch.ones(2),)).graph
        assert all(n.op != "call_module" or n.target == "_guards" for n in graph.nodes)
        assert type(seen[0]) is torch.Tensor


class TestModulesMadeInside:
    """A forward that builds modules."""

    def test_a_module_made_inside_forward_is_recorded_with_its_draws(self) -> None:
        class Makes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                made = nn.Linear(4, 4)  # BigBird changes to full attention like this
                return self.proj(x) + made(x)

        model = Makes()
        traced = fxlora.trace(model, (torch.ones(2, 4),))
        x = torch.randn(3, 4)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert torch.equal(traced(x), expected)


class TestKnownValues:
    """A branch on a value that follows from sizes alone goes the way eager code goes."""

    def test_writing_into_a_known_tensor_changes_what_is_known_of_it(self) -> None:
        class Written(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                flags = torch.zeros(x.size(0))
                before = bool(flags.any())
                flags.view(-1)[0] = 1  # through a view, too
                return x * 2 if flags.any() and not before else x * 3

        x = torch.randn(2, 3)
        assert torch.equal(fxlora.trace(Written(), (x,))(x), x * 2)

    def test_a_tensor_that_data_was_written_into_is_not_known(self) -> None:
        class Written(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                flags = torch.zeros(x.size(0))
                flags[0] = x[0, 0]
                return x * 2 if flags.any() else x * 3

        with pytest.raises(TraceError, match="by a tensor's values"):
            fxlora.trace(Written(), (torch.ones(2, 3),))

    def test_a_draw_is_not_known(self) -> None:
        class Drawn(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2 if torch.zeros(x.size(0)).uniform_().sum() > 0.5 else x * 3

        with pytest.raises(TraceError, match="by a tensor's values"):
            fxlora.trace(Drawn(), (torch.ones(2, 3),))

    def test_a_flag_made_of_sizes_reaches_attention_as_a_bool(self) -> None:
        class Attends(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.scaled_dot_product_attention(x, x, x, is_causal=x.size(1) > 1)

        traced = fxlora.trace(Attends(), (torch.ones(2, 5, 4),))
        x = torch.randn(3, 7, 4)
        assert torch.equal(traced(x), Attends()(x))
        with pytest.raises(GuardError, match=r"s1 > 1, where s1 is x\.size\(1\)"):
            traced(torch.ones(2, 1, 4))

    def test_an_index_mask_that_transformers_vmaps_is_recorded(self) -> None:
        from transformers import masking_utils

        class Masks(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                b, q, kv = (torch.arange(n) for n in (x.size(0), x.size(1), x.size(2)))
                near = lambda b, h, q, kv: (q - kv).abs() <= 1  # noqa: E731
                return masking_utils._vmap_expansion_sdpa(near)(b, torch.arange(1), q, kv)

        traced = fxlora.trace(Masks(), (torch.ones(2, 3, 4),))
        x = torch.ones(3, 6, 5)
        assert torch.equal(traced(x), Masks()(x))


class TestExamples:
    """Example inputs for transformers models, from the config alone."""

    @pytest.mark.parametrize(
        ("name", "settings", "expected"),
        [
            ("ViTForImageClassification", {"image_size": 32, "patch_size": 8},
             {"pixel_values": (2, 3, 32, 32)}),
            ("Wav2Vec2ForCTC", {}, {"input_values": (2, 8000)}),
            ("WhisperForConditionalGeneration", {"max_source_positions": 20},
             {"input_features": (2, 80, 40), "decoder_input_ids": (2, 10)}),
            ("BartForConditionalGeneration", {},
             {"input_ids": (2, 16), "decoder_input_ids": (2, 10)}),
            ("BartForSequenceClassification", {}, {"input_ids": (2, 16)}),
            ("GPT2ForSequenceClassification", {}, {"input_ids": (1, 16)}),
            ("GPT2ForSequenceClassification", {"pad_token_id": 0}, {"input_ids": (2, 16)}),
            ("PerceiverForMaskedLM", {}, {"input_ids": (2, 16)}),
            ("XmodForMaskedLM", {}, {"input_ids": (2, 16), "lang_ids": (2,)}),
            ("KyutaiSpeechToTextForConditionalGeneration", {}, {"input_ids": (2, 16, 33)}),
        ],
    )  # fmt: skip
    def test_example_inputs_have_the_sizes_of_the_config(
        self, name: str, settings: dict[str, Any], expected: dict[str, tuple[int, ...]]
    ) -> None:
        import transformers

        from fxlora.trace.examples import inputs

        cls = getattr(transformers, name)
        with torch.device("meta"):
            model = cls(cls.config_class(**{"num_hidden_layers": 1, **settings}))
        made = inputs(model)
        shapes = {k: tuple(v.shape) for k, v in made.items() if isinstance(v, torch.Tensor)}
        assert shapes == expected

    def test_a_classifier_without_padding_is_traced_on_one_row(self) -> None:
        from transformers import GPT2Config, GPT2ForSequenceClassification

        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)
        model = GPT2ForSequenceClassification(config).eval()
        traced = fxlora.trace(model)
        ids = torch.randint(3, 20, (1, 7))
        logits = traced(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits, model(input_ids=ids).logits)


class TestErrors:
    """An error names the line of the model's code and what to do."""

    def test_a_data_dependent_branch_names_its_line(self) -> None:
        class Data(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if x.max() > 1:
                    return x
                return -x

        with pytest.raises(TraceError, match=r"if x\.max\(\) > 1:`.*by a tensor's values"):
            fxlora.trace(Data(), (torch.ones(2),))

    def test_wrong_example_inputs_show_the_signature(self) -> None:
        with pytest.raises(TraceError, match=r"Linear\.forward\(input.*does not take"):
            fxlora.trace(nn.Linear(2, 2), (), {"wrong": torch.ones(2)})

    def test_a_model_that_needs_inputs_says_so(self) -> None:
        class Loops(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(x.size(0)):
                    x = x + 1
                return x

        with pytest.raises(TraceError, match=r"fxlora\.trace\(model, args, kwargs\)"):
            fxlora.trace(Loops())


class TestReplay:
    """Repeated blocks are traced once, and the graph is the one full tracing gives."""

    @pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "whisper", "qwen3_moe"])
    def test_replayed_graph_equals_the_fully_traced_one(self, name: str) -> None:
        entry = ZOO[name]
        model = entry.build()
        inputs = entry.inputs(*entry.sizes[0])
        fast = fxlora.trace(model, (), inputs)
        full = fxlora.trace(model, (), inputs, replay=False)
        assert info(fast).replayed > 0
        assert info(full).replayed == 0
        assert fast.code == full.code
        for a, b in zip(fast.graph.nodes, full.graph.nodes, strict=True):
            for key in ("module_stack", "shape", "dtype", "source", "grad_enabled"):
                assert a.meta.get(key) == b.meta.get(key), (a, key)

    def test_a_cache_keeps_blocks_from_being_copied_and_a_note_says_so(self) -> None:
        model, ids = ZOO["llama"].build(), torch.zeros(2, 8, dtype=torch.long)
        cached = info(fxlora.trace(model, (), {"input_ids": ids, "use_cache": True}))
        assert cached.replayed == 0
        (note,) = [n for n in cached.notes if "every block was run" in n]
        assert note.startswith("model.layers: ")
        assert "DynamicCache" in note
        assert "use_cache=False" in note
        plain = info(fxlora.trace(model, (), {"input_ids": ids, "use_cache": False}))
        assert plain.replayed > 0
        assert not any("every block was run" in n for n in plain.notes)

    def test_blocks_that_differ_in_what_they_read_are_traced_apart(self) -> None:
        class Block(nn.Module):
            def __init__(self, scale: float, index: int) -> None:
                super().__init__()
                self.lin, self.scale, self.index = nn.Linear(4, 4), scale, index

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.lin(x) * self.scale

        class Stack(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(
                    Block(s, i) for i, s in enumerate((1.0, 1.0, 2.0, 1.0, 1.0))
                )

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers:
                    x = layer(x)
                return x

        model = Stack()
        traced = fxlora.trace(model, (torch.ones(2, 4),))
        x = torch.randn(3, 4)
        assert torch.equal(traced(x), model(x))
        # The first block is a kind of its own (its input needs no gradient) and so is the third;
        # the index differs in every block but is never read.
        assert info(traced).replayed == 2

    def test_tracing_is_flat_in_depth(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        for layers in (4, 16):
            config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                                 num_attention_heads=4, vocab_size=99)  # fmt: skip
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            assert info(fxlora.trace(model)).replayed == layers - 1


# Model type -> how many experts, where there are any: their count makes the graph long, not deep.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "qwen2": {}, "qwen3": {},
    "phi3": {}, "opt": {}, "gpt_neox": {}, "cohere2": {}, "smollm3": {}, "mamba2": {},
    "bloom": {"n_layer": 6},
    "qwen3_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_replayed_equals_it_run_in_full(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{"num_hidden_layers": 6, **ARCHITECTURES[kind]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fast, full = fxlora.trace(model), fxlora.trace(model, replay=False)
    assert info(fast).replayed > 0
    assert info(fast).guards == info(full).guards
    for a, b in zip(fast.graph.nodes, full.graph.nodes, strict=True):
        # An autograd.Function is called through a method that every trace makes anew.
        same = a.target == b.target or str(a.target) == str(b.target)
        assert (a.name, a.op) == (b.name, b.op)
        assert same or a.target == "_guards"
        assert str((a.args, a.kwargs)) == str((b.args, b.kwargs))
        for key in ("module_stack", "shape", "dtype", "source", "grad_enabled"):
            assert a.meta.get(key) == b.meta.get(key), (a, key)


class Switched(nn.Module):
    """A block that asks for the mode, draws in train mode, and repeats a block of its own."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = F.dropout(self.lin(x), 0.5, training=self.training)
            return h, h.add(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(self.Inner() for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            torch.rand([])
        for inner in self.inner:
            _, x = inner(x)
        return F.dropout(self.norm(x), 0.25, training=self.training)


class Stacked(nn.Module):
    """Blocks that are called twice each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Switched() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


class TestRepeats:
    """Blocks in blocks, called again, in two modes: repeated where they need not be run."""

    @pytest.mark.parametrize("mode", [True, False])
    def test_blocks_in_blocks_that_switch_with_the_mode_give_the_fully_traced_graph(
        self, mode: bool
    ) -> None:
        model = Stacked().train(mode)
        fast = fxlora.trace(model, (torch.ones(2, 4),))
        full = fxlora.trace(model, (torch.ones(2, 4),), replay=False)
        assert info(fast).replayed > 4
        assert info(fast).mode is info(full).mode is None
        assert fast.code == full.code
        x = torch.randn(5, 4)
        for m in (model, fast, full):
            m.train()
        runs = []
        for m in (model, fast, full):
            torch.manual_seed(1)
            runs.append(m(x))
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])
        assert torch.equal(fast.eval()(x), model.eval()(x))

    def test_what_an_equal_call_gave_is_memory_of_its_own(self) -> None:
        class Twice(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                a, b = x * 2, x * 2
                a.add_(1)
                return a + b

        x = torch.randn(3, 4)
        traced = fxlora.trace(Twice(), (x,))
        assert torch.equal(traced(x), Twice()(x))
        add = next(n for n in traced.graph.nodes if n.target == "add_")
        assert add.meta["mutates"] == (add.args[0],)


class TestLazyCode:
    """Code is made when it is asked for, and made anew with a new graph."""

    def test_code_is_made_at_the_first_call_and_hooks_run_once(self) -> None:
        traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
        assert "forward" not in vars(type(traced))
        seen: list[int] = []
        traced.register_forward_hook(lambda *_: seen.append(1))
        traced(torch.ones(1, 4))
        assert seen == [1]
        assert "forward" in vars(type(traced))

    def test_the_signature_is_that_of_the_graph(self) -> None:
        traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
        assert list(inspect.signature(traced.forward).parameters) == ["input"]
        other = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
        assert "input" in inspect.signature(type(other).forward).parameters

    def test_a_new_graph_makes_new_code(self) -> None:
        traced = fxlora.trace(nn.Sequential(nn.Linear(4, 4)))
        before = traced.code
        graph = torch.fx.Graph()
        graph.output(graph.placeholder("input"))
        traced.graph = graph
        assert traced.code != before
        assert torch.equal(traced(torch.ones(2)), torch.ones(2))


POWERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "square": lambda h: h**2,
    "power": lambda h: h ** h.abs(),
    "exponent": lambda h: 2**h,
    "method": lambda h: torch.Tensor.__pow__(h, 2),
    "in place": lambda h: operator.ipow(h.clone(), 3),
    "numpy divisor": lambda h: h / numpy.sqrt(8),
    "numpy keyword": lambda h: torch.add(h, h, alpha=numpy.float32(2)),
    "numpy size": lambda h: h.view(numpy.int64(2), -1),
}


@pytest.mark.parametrize("name", POWERS)
def test_powers_and_numpy_s_scalars_are_code_that_runs(name: str) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return POWERS[name](self.lin(x))

    model, x = One(), torch.randn(6, 4)
    torch.testing.assert_close(fxlora.trace(model, (x,))(x), model(x), equal_nan=True)


TYPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float": lambda h: (h > 0).type(torch.FloatTensor) * h,
    "long": lambda h: h + h.type(torch.LongTensor),
    "by name": lambda h: h.type(dtype=torch.DoubleTensor),
    "text": lambda h: h.type("torch.HalfTensor"),
    "dtype": lambda h: h.type(torch.bfloat16),
    "the default": lambda h: (h > 0).type(torch.Tensor),
}


@pytest.mark.parametrize("name", TYPES)
def test_legacy_tensor_types_are_code_that_runs(name: str) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return TYPES[name](self.lin(x))

    model, x = One(), torch.randn(6, 4)
    expected = model(x)
    # Without inputs torch.fx's own tracer runs, which has no word for torch.Tensor itself.
    for args in ((x,), ()) if name != "the default" else ((x,),):
        found = fxlora.trace(model, args)(x)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


ATTENTION: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    # name -> (heads of q, heads of k and v), arguments
    "plain": ((4, 4), {}),
    "causal": ((4, 4), {"is_causal": True}),
    "dropout and scale": ((4, 4), {"dropout_p": 0.5, "scale": 0.3}),
    "grouped": ((4, 2), {"enable_gqa": True}),
    "mask of bools": ((4, 4), {"attn_mask": torch.bool}),
    "mask of floats": ((4, 4), {"attn_mask": torch.float32}),
    "one head for all": ((4, 1), {}),
    "frozen": ((4, 4), {"requires_grad": False}),
    "three dimensions": ((0, 0), {}),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_on_meta_is_traced_as_by_torch_s_own_calls(name: str, dynamic: bool) -> None:
    """The stand-in gives the metadata and the conditions on sizes that the real one gives."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fxlora.trace import operators

    (heads, others), given = ATTENTION[name]
    found = []
    for function in (
        operators.on_fakes(F.scaled_dot_product_attention),
        F.scaled_dot_product_attention,
    ):
        env = ShapeEnv() if dynamic else None
        with FakeTensorMode(shape_env=env) as mode:
            wanted = given.get("requires_grad", True)

            def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                made = torch.empty(shape, dtype=dtype, device="meta")
                return mode.from_tensor(made, static_shapes=None if dynamic else True)

            def heads_of(count: int, length: int, width: int) -> torch.Tensor:
                made = (
                    fake(2, length, count, width).transpose(1, 2)
                    if count
                    else fake(2, length, width)
                )
                return made.requires_grad_(wanted)  # noqa: B023

            q, k, v = heads_of(heads, 5, 8), heads_of(others, 7, 8), heads_of(others, 7, 6)
            kwargs = {n: a for n, a in given.items() if n != "requires_grad"}
            if "attn_mask" in kwargs:
                kwargs["attn_mask"] = fake(2, 1, 5, 7, dtype=kwargs["attn_mask"])
            out = function(q, k, v, **kwargs)
        equal = {str(g.expr) for g in env.guards if "Eq(" in str(g.expr)} if env else set()
        facts = (
            out.shape,
            out.stride(),
            out.dtype,
            out.device.type,
            out.requires_grad,
            out.is_leaf,
        )
        found.append((str(facts), equal))
    assert found[0] == found[1]
