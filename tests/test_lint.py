"""Every rule of the linter: a model that triggers it, one that nearly does, and a page that says why."""

from __future__ import annotations

import copy
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxlora
from fxlora.errors import ConfigError
from fxlora.facts import info
from fxlora.lint import Options, Report, Settings, Severity, lint
from fxlora.lint.catalog import RULES, SUBJECTS, rule, selected
from fxlora.lint.pages import HEADER, index, page

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """Layers by name, and what to do with them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._own = forward

    def forward(self, *args: Any) -> Any:
        return self._own(self, *args)


def linear(*features: int) -> nn.Linear:
    return nn.Linear(*(features if len(features) == 2 else features * 2))


def chain(**layers: Any) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


X = torch.zeros(2, 4)
IDS = torch.zeros(2, 3, dtype=torch.long)


def check(
    model: nn.Module, targets: Any, *args: Any, settings: Settings | None = None, **config: Any
) -> Report:
    """Lints a model with rank 2 unless it says otherwise."""
    made = LoraConfig(**{"r": 2, "target_modules": targets, **config})
    return lint(fxlora.trace(model, args), made, settings)


def served(**options: Any) -> Settings:
    return Settings(options=Options(serve="vllm", **options))


def options(**values: Any) -> Settings:
    return Settings(options=Options(**values))


def stack(*blocks: nn.Module) -> nn.Module:
    def run(m: Any, x: Any) -> Any:
        for block in m.layers:
            x = block(x)
        return x

    return Net(run, layers=nn.ModuleList(blocks))


def embedded() -> nn.Module:
    def run(m: Any, ids: Any) -> Any:
        x = m.words(ids)
        for block in m.layers:
            x = block(x)
        return x

    return Net(
        run, words=nn.Embedding(32, 8), layers=nn.ModuleList(chain(up=linear(8)) for _ in "ab")
    )


class Branch(nn.Module):
    """A block of a hybrid: with an MLP, or with another part under another name."""

    def __init__(self, part: str) -> None:
        super().__init__()
        setattr(self, part, chain(up_proj=linear(4)) if part == "mlp" else chain(mix=linear(4)))
        self.part = part

    def forward(self, x: Any) -> Any:
        return getattr(self, self.part)(x)


# ---- near misses: what a rule that is too broad would report ---------------------------------------


class Holder(nn.Module):
    """A stack of maps, as the experts of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 4, 4))


def router_free(forward: Callable[..., Any]) -> Report:
    model = Net(forward, router=linear(4), out=linear(4))
    return check(model, ["router", "out"], X)


def two_towers() -> Report:
    def run(m: Any, ids: Any, pixels: Any) -> Any:
        return m.text(m.words(ids)).mean(1) @ m.vision(pixels).mean(1).t()

    model = Net(
        run, words=nn.Embedding(9, 4), text=chain(q_proj=linear(4)), vision=chain(q_proj=linear(4))
    )
    return check(model, ["q_proj"], IDS, torch.zeros(2, 3, 4))


def cross_attended() -> Report:
    def run(m: Any, ids: Any, sound: Any) -> Any:
        q, k = m.text(m.words(ids)), m.encoder(sound)
        return F.scaled_dot_product_attention(q, k, k)

    model = Net(
        run, words=nn.Embedding(9, 4), text=chain(q_proj=linear(4)), encoder=chain(q_proj=linear(4))
    )
    return check(model, ["q_proj"], IDS, torch.zeros(2, 5, 4))


def only_the_tower(targets: Any = ("vision.q_proj",)) -> Report:
    def run(m: Any, ids: Any, pixels: Any) -> Any:
        return m.text(torch.cat([m.vision(pixels), m.words(ids)], 1))

    model = Net(
        run, words=nn.Embedding(9, 4), text=chain(q_proj=linear(4)), vision=chain(q_proj=linear(4))
    )
    return check(
        model, targets if isinstance(targets, str) else list(targets), IDS, torch.zeros(2, 5, 4)
    )


def tower_by_name() -> Report:
    def run(m: Any, ids: Any, pixels: Any) -> Any:
        return m.text(torch.cat([m.vision(pixels), m.words(ids)], 1))

    model = Net(
        run, words=nn.Embedding(9, 4), text=chain(q_proj=linear(4)), vision=chain(to_text=linear(4))
    )
    return check(model, ["to_text", "q_proj"], IDS, torch.zeros(2, 5, 4))


def tied(same: bool, **config: Any) -> Report:
    model = chain(a=linear(4), up=linear(4), b=linear(4))
    if same:
        model.b.weight = model.a.weight
    else:
        model.b.weight.data.copy_(model.a.weight.data)
    return check(model, config.pop("targets", ["b"]), **config)


def wide(alpha: float, dtype: str) -> Report:
    model = chain(up=nn.Linear(4096, 4096, device="meta"))
    return check(model, ["up"], r=8, lora_alpha=alpha, settings=options(dtype=dtype))


class Odd(nn.Linear):
    """A Linear with a forward of its own that is still a linear map, like Falcon's."""

    def forward(self, x: Any) -> Any:
        return x @ self.weight.T + self.bias


def fused_beside() -> Report:
    def run(m: Any, x: Any) -> Any:
        gate, up = m.both(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    return check(Net(run, both=linear(4, 8), down=linear(4)), ["down"], X, settings=served())


def frozen_head() -> Report:
    model = Net(
        lambda m, i: m.head(m.up(m.w(i))), w=nn.Embedding(32, 8), up=linear(8), head=linear(8, 32)
    )
    return check(model, ["up"], IDS, settings=served())


def inner_vocabulary() -> Report:
    def run(m: Any, ids: Any) -> Any:
        return m.end(m.wide(m.words(ids)))

    model = Net(run, words=nn.Embedding(32, 8), wide=linear(8, 32), end=linear(32, 8))
    return check(model, ["wide", "end"], IDS, settings=served())


NEAR: dict[str, list[Callable[[], Report]]] = {
    "FXL001": [
        lambda: check(
            chain(up=linear(4)), ["up"], lora_alpha=0, settings=Settings(sites={"u*": ("FXL4",)})
        ),
    ],
    "FXL100": [lambda: check(chain(proj=linear(4)), ["proj"])],
    "FXL101": [
        lambda: check(chain(a=chain(q_proj=linear(4)), q=linear(4)), ["a.q_proj"]),
        lambda: check(chain(q_proj=linear(4)), "q_.*|nothing"),
    ],
    "FXL102": [
        lambda: check(stack(Branch("mlp"), Branch("mixer"), Branch("mixer")), ["up_proj"], X),
        lambda: check(stack(Branch("mlp"), Branch("mlp")), ["up_proj"], X),
        lambda: check(
            stack(*(chain(mlp=chain(**{n: linear(4)})) for n in ("up", "fused"))), ["up"], X,
            layers_to_transform=[0], layers_pattern="layers",
        ),
        lambda: check(
            stack(*(chain(mlp=chain(**{n: linear(4)})) for n in ("up", "fused"))), ["up", "fused"], X
        ),
    ],
    "FXL103": [
        lambda: check(
            stack(*(chain(up=linear(4)) for _ in range(4))), ["up"], X, layers_to_transform=[0, 2],
            layers_pattern="layers",
        ),
        lambda: check(stack(*(chain(up=linear(4), down=linear(4)) for _ in range(4))), ["up"], X),
    ],
    "FXL104": [lambda: check(chain(up=linear(8)), ["up"], rank_pattern={"^u.": 1})],
    "FXL105": [
        lambda: check(
            chain(up=linear(8), down=linear(8)), ["up", "down"], rank_pattern={"up": 1, "down": 2}
        ),
        lambda: check(chain(up=linear(8)), ["up"], rank_pattern={"up": 1, ".*p": 1}),
    ],
    "FXL106": [
        # a gate without a choice
        lambda: router_free(lambda m, x: m.out(x) * m.router(x).softmax(-1)),
        # a choice of positions: the scores are a product of two projections
        lambda: router_free(lambda m, x: m.out(x[(m.router(x) @ x.t()).topk(1, -1)[1][:, 0]])),
        # a choice after which nothing runs: a prediction
        lambda: router_free(lambda m, x: m.router(m.out(x)).softmax(-1).topk(2, -1)),
        # a choice over something else than the scores of the layer
        lambda: router_free(lambda m, x: m.out(x[m.router(x).sum(-1).topk(2)[1]])),
        lambda: router_free(lambda m, x: m.out(x[m.router(x).flatten().topk(2)[1] // 4])),
    ],
    "FXL107": [
        two_towers, cross_attended, only_the_tower, lambda: only_the_tower(r".*vision\..*"),
        tower_by_name,
    ],
    "FXL108": [
        lambda: check(chain(up=linear(4), score=linear(4)), ["up"], modules_to_save=["score"]),
        lambda: check(chain(up=linear(4), score=linear(4)), ["up"], task_type="SEQ_CLS"),
    ],
    "FXL109": [
        lambda: check(
            chain(up=linear(4), lm_head=linear(4), head=linear(4)), ["up"],
            modules_to_save=["lm_head"],
        ),
        # two modules, by the task type's head and no entry of the user's
        lambda: check(
            chain(up=linear(4), a=chain(score=linear(4)), score=linear(4)), ["up"],
            task_type="SEQ_CLS",
        ),
    ],
    "FXL110": [
        lambda: check(
            Net(lambda m, x: m.q(x) @ m.w, q=linear(4), w=nn.Parameter(torch.ones(4, 4))),
            "all-linear", X,
        ),
        lambda: check(
            Net(lambda m, x: torch.bmm(m.q(x), m.e.w), q=linear(4), e=Holder()), "all-linear",
            torch.zeros(2, 3, 4), target_parameters=["e.w"],
        ),
        lambda: check(
            Net(lambda m, x: m.q(x) @ m.inner.weight, q=linear(4), inner=linear(4)), ["q"], X
        ),
        lambda: check(
            Net(lambda m, x: torch.bmm(m.q(x), m.e), q=linear(4), e=nn.Parameter(torch.ones(2, 4, 4))),
            ["q"], torch.zeros(2, 3, 4),
        ),
    ],
    "FXL111": [
        lambda: check(
            chain(up=linear(4), gate=linear(4)), ["up", "gate"], exclude_modules=["gate"]
        ),
        lambda: check(chain(up=linear(4), gate=linear(4)), ["up", "gate"], exclude_modules=".*te"),
    ],
    "FXL112": [
        lambda: check(chain(up=linear(4), gate=linear(4)), "all-linear", exclude_modules=["gate"]),
        lambda: check(chain(up=linear(4), gate=linear(4)), ["up"]),
    ],
    "FXL113": [
        lambda: check(chain(a=Odd(4, 4), b=linear(4)), ["a", "b"], X),
        lambda: check(Net(lambda m, x: m.b(m.a(input=x)), a=linear(4), b=linear(4)), ["b"], X),
        lambda: check(
            Net(lambda m, x: m.b(x) @ m.a.weight, a=linear(4), b=linear(4)),
            ["b"], X, target_parameters=["a.weight"],
        ),
    ],
    "FXL201": [
        lambda: check(Net(lambda m, x: F.linear(m.a(x), m.b.weight), a=linear(4), b=linear(4)), ["a"], X),
        lambda: check(
            Net(lambda m, x: m.mha(x, x, x, need_weights=False)[0],
                mha=nn.MultiheadAttention(4, 2, batch_first=True)),
            ["mha"], torch.zeros(2, 3, 4),
        ),
    ],
    "FXL202": [
        lambda: check(Net(lambda m, x: m.a(m.a(x)), a=linear(4)), ["a"], X),
        lambda: check(Net(lambda m, x: m.a(x) + m.a.bias, a=linear(4)), ["a"], X),
    ],
    "FXL203": [lambda: check(Net(lambda m, x: m.b(x), a=linear(4), b=linear(4)), ["b"], X)],
    "FXL204": [lambda: check(Net(lambda m, x: m.a(x).detach() + m.a(x), a=linear(4)), ["a"], X)],
    "FXL205": [lambda: check(Net(lambda m, x: [m.a(x), m.a(x)][1], a=linear(4)), ["a"], X)],
    "FXL301": [
        lambda: check(chain(a=linear(64, 4)), ["a"], r=4),
        lambda: check(chain(a=nn.Conv2d(4, 16, 3)), ["a"], torch.zeros(1, 4, 5, 5), r=16),
    ],
    "FXL302": [
        lambda: check(chain(a=linear(12)), ["a"], r=6),
        lambda: check(chain(a=linear(64, 2)), ["a"], r=8),  # FXL301 says it already
    ],
    "FXL401": [lambda: check(chain(a=linear(4)), ["a"], lora_alpha=0.001)],
    "FXL402": [lambda: check(chain(a=linear(4)), ["a"], lora_alpha=1)],
    "FXL403": [
        lambda: check(chain(a=linear(16)), ["a"], r=8, lora_alpha=64),
        lambda: check(chain(a=linear(64)), ["a"], r=16, lora_alpha=256, use_rslora=True),
    ],
    "FXL404": [
        lambda: check(chain(a=linear(128)), ["a"], r=64, lora_alpha=64, use_rslora=True),
        lambda: check(chain(a=linear(128)), ["a"], r=2, lora_alpha=32),
    ],
    "FXL405": [
        lambda: check(chain(a=linear(64), b=linear(64)), ["a", "b"], r=8, rank_pattern={"a": 2}),
        lambda: check(
            chain(a=linear(64), b=linear(64)), ["a", "b"], r=16, lora_alpha=16,
            rank_pattern={"a": 1}, alpha_pattern={"a": 1},
        ),
    ],
    "FXL406": [
        lambda: check(
            chain(a=linear(4)).train(), ["a"], lora_dropout=0.1, settings=Settings(select=("ALL",))
        ),
        lambda: check(chain(a=linear(4)).eval(), ["a"], settings=Settings(select=("ALL",))),
        lambda: check(chain(a=linear(4)).eval(), ["a"], lora_dropout=0.1),
    ],
    "FXL407": [
        lambda: check(
            embedded(), ["up"], IDS, settings=options(gradient_checkpointing="non-reentrant")
        ),
        lambda: check(
            embedded(), ["up"], IDS,
            settings=options(gradient_checkpointing="reentrant", input_require_grads=True),
        ),
        lambda: check(
            embedded(), ["up", "words"], IDS, settings=options(gradient_checkpointing="reentrant")
        ),
    ],
    "FXL408": [
        lambda: check(chain(a=linear(4)), ["a"], inference_mode=False),
        lambda: check(chain(a=linear(4)), ["a"], bias="all"),
    ],
    "FXL501": [
        lambda: tied(False), lambda: tied(True, targets=["up"]),
        lambda: check(Net(lambda m, x: m.a(m.a(x)), a=linear(4)), ["a"], X),
    ],
    "FXL502": [
        lambda: tied(False, targets=["up"], modules_to_save=["b"]),
        lambda: tied(True, targets=["a"]),
    ],
    "FXL503": [
        lambda: wide(32, "bfloat16"), lambda: wide(4, "float16"), lambda: wide(0, "bfloat16"),
        lambda: wide(4, ""),
    ],
    "FXL504": [
        lambda: check(chain(a=nn.Conv2d(8, 8, 3)), ["a"], torch.zeros(1, 8, 5, 5)),
        lambda: check(chain(a=linear(8)), ["a"], lora_bias=True),
    ],
    "FXL505": [lambda: check(chain(a=Odd(8, 8)), ["a"], torch.zeros(2, 8), lora_dropout=0.1)],
    "FXL601": [inner_vocabulary, frozen_head, lambda: check(embedded(), ["up"], IDS, settings=served())],
    "FXL602": [
        fused_beside,
        lambda: check(
            Net(lambda m, x: m.a(x)[:, 0], a=linear(4)), ["a"], torch.zeros(2, 3, 4),
            settings=served(),
        ),
    ],
    "FXL603": [lambda: check(chain(a=linear(8)), ["a"], use_rslora=True, settings=served())],
    "FXL604": [lambda: check(chain(a=linear(8)), ["a"], bias="none", settings=served())],
    "FXL605": [
        lambda: check(chain(a=linear(64)), ["a"], r=16, settings=served()),
        lambda: check(chain(a=linear(64)), ["a"], r=32, settings=served(max_lora_rank=32)),
    ],
    "FXL606": [
        lambda: check(
            chain(a=linear(64), b=linear(64)), ["a", "b"], r=8, lora_alpha=16,
            rank_pattern={"a": 4}, alpha_pattern={"a": 8}, settings=served(),
        ),
    ],
    "FXL607": [lambda: check(embedded(), ["up"], IDS, settings=served())],
}  # fmt: skip


def example(rule_id: str) -> Report:
    """Runs the example of a rule's page."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(HEADER + rule(rule_id).example, names)
    found: Report = names["report"]
    return found


@pytest.mark.parametrize("rule_id", [r.id for r in RULES])
def test_the_example_of_a_page_triggers_its_rule_and_no_other(rule_id: str) -> None:
    found = example(rule_id)
    assert {f.rule for f in found} == {rule_id}
    assert all(f.severity == rule(rule_id).severity for f in found)
    assert all(f.message and f.fix for f in found)


@pytest.mark.parametrize(
    ("rule_id", "near"), [(k, n) for k, all_ in NEAR.items() for n in all_],
    ids=[f"{k}-{i}" for k, all_ in NEAR.items() for i, _ in enumerate(all_)],
)  # fmt: skip
def test_what_nearly_triggers_a_rule_does_not(rule_id: str, near: Callable[[], Report]) -> None:
    found = near()
    assert "FXL100" not in {f.rule for f in found}, "a near miss that adapts nothing shows nothing"
    assert [str(f) for f in found if f.rule == rule_id] == []


def test_every_rule_has_a_near_miss() -> None:
    assert set(NEAR) == {r.id for r in RULES}


@pytest.mark.parametrize("need", sorted({r.needs for r in RULES if r.needs}))
def test_a_rule_about_the_run_is_silent_until_the_run_is_described(need: str) -> None:
    for r in RULES:
        if r.needs != need:
            continue
        names: dict[str, Any] = {"__name__": "example"}
        quiet = re.sub(r", Settings\(options=.*?\)\)|, Settings\(options=options\)", "", r.example)
        code = re.sub(r"(report = lint\(.*?)(, Settings\(options=(?:options|Options\(.*?\))\))", r"\1", r.example)  # fmt: skip
        exec(HEADER + (code if code != r.example else quiet), names)
        assert r.id not in {f.rule for f in names["report"]}, r.id


# ---- the catalogue and its pages -----------------------------------------------------------------


def test_ids_and_names_are_unique_and_grouped_by_subject() -> None:
    assert len({r.id for r in RULES}) == len({r.name for r in RULES}) == len(RULES)
    assert [r.id for r in RULES] == sorted(r.id for r in RULES)
    assert {r.id[3] for r in RULES} == set(SUBJECTS)
    assert all(re.fullmatch(r"FXL\d{3}", r.id) and re.fullmatch(r"[a-z-]+", r.name) for r in RULES)


@pytest.mark.parametrize("rule_id", [r.id for r in RULES])
def test_every_rule_has_a_page_and_the_page_is_the_code_s(rule_id: str) -> None:
    path = ROOT / "docs" / "lint" / f"{rule_id}.md"
    if os.environ.get("FXLORA_WRITE_DOCS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(page(rule(rule_id)), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert text == page(rule(rule_id))
    for part in ("What it finds", "Why it matters", "An example that triggers it", "The fix"):
        assert len(text.partition(f"## {part}\n")[2].strip()) > 20, part


def test_no_page_is_left_of_a_rule_that_is_gone() -> None:
    assert {p.stem for p in (ROOT / "docs" / "lint").glob("*.md")} == {r.id for r in RULES}


def test_the_overview_lists_every_rule() -> None:
    path = ROOT / "docs" / "lint.md"
    text = path.read_text(encoding="utf-8")
    head, mark, _ = text.partition("## The rules\n")
    assert mark
    if os.environ.get("FXLORA_WRITE_DOCS"):
        path.write_text(f"{head}{mark}\n{index()}", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == f"{head}{mark}\n{index()}"


@pytest.mark.parametrize(
    "page_path", sorted((ROOT / "docs" / "lint").glob("*.md")), ids=lambda p: p.stem
)
def test_every_link_of_a_page_leads_somewhere(page_path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page_path.read_text(encoding="utf-8")):
        assert target.startswith("https://github.com/") or (page_path.parent / target).exists()


def test_a_thread_is_a_repository_and_a_number() -> None:
    threads = [t for r in RULES for t in r.threads]
    assert threads
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", t) for t in threads)


def test_a_selector_is_an_id_a_name_a_start_or_a_word() -> None:
    assert [r.id for r in selected("bypassed-adapter")] == ["FXL201"]
    assert [r.id for r in selected("fxl3")] == ["FXL301", "FXL302"]
    assert selected("ALL") == RULES
    assert [r.id for r in RULES if r not in selected("DEFAULT")] == ["FXL406"]
    with pytest.raises(ConfigError, match="Did you mean 'bypassed-adapter'"):
        selected("bypased-adapter")


# ---- the run -------------------------------------------------------------------------------------


def test_a_plan_and_its_configuration_find_the_same() -> None:
    traced = fxlora.trace(chain(a=linear(4), b=linear(4)))
    config = LoraConfig(r=8, target_modules=["a", "b", "c"])
    assert lint(traced, config) == lint(traced, fxlora.plan(traced, config))


def test_equal_layers_of_repeated_blocks_are_one_finding() -> None:
    found = check(stack(*(chain(up=linear(4)) for _ in range(12))), ["up"], X, r=8)
    (one,) = found
    assert one.where == "layers.*.up"
    assert one.sites == tuple(f"layers.{i}.up" for i in range(12))
    assert str(one).startswith(
        "FXL301 rank-above-layer: layers.*.up (x12): r=8 on a weight of 4 x 4"
    )


def test_findings_come_worst_first() -> None:
    model = chain(a=linear(4), b=linear(4))
    found = check(model, ["a", "zzz"], r=8, lora_alpha=0, exclude_modules=["q"])
    assert [f.rule for f in found] == ["FXL401", "FXL101", "FXL301", "FXL111"]
    assert (found.count(Severity.ERROR), found.count(Severity.NOTE)) == (1, 1)


def test_nothing_is_changed_and_the_random_state_stays() -> None:
    model = chain(a=linear(4), b=linear(4))
    traced, config = fxlora.trace(model), LoraConfig(r=2, target_modules=["a"])
    before, fields, code = torch.get_rng_state(), config.to_dict(), str(traced.graph)
    lint(traced, config)
    assert torch.equal(before, torch.get_rng_state())
    assert (config.to_dict(), str(traced.graph)) == (fields, code)
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_on_meta_is_not_factored() -> None:
    model = chain(a=nn.Linear(64, 64, device="meta"))
    assert len(check(model, ["a"], init_lora_weights="pissa")) == 0


def test_without_a_configuration_there_is_nothing_to_check() -> None:
    with pytest.raises(ConfigError, match="needs a LoraConfig or a plan"):
        lint(fxlora.trace(chain(a=linear(4))))


def trained(scale: float) -> GraphModule:
    """Returns an adapter whose update has a known size beside the weight's."""
    torch.manual_seed(0)
    traced = fxlora.trace(chain(up=linear(64)))
    lora = fxlora.rewrite(traced, LoraConfig(r=8, lora_alpha=8, target_modules=["up"]))
    with torch.no_grad():
        lora.get_parameter("up.lora_B.default.weight").copy_(torch.randn(64, 8) * scale)
    return lora


@pytest.mark.parametrize(("scale", "dtype", "lost"), [
    (1e-3, "bfloat16", True), (1e-1, "bfloat16", False), (1e-3, "float16", False),
    (1e-4, "float16", True), (1e-4, "float32", False),
])  # fmt: skip
def test_the_drift_of_a_trained_adapter_is_measured(scale: float, dtype: str, lost: bool) -> None:
    lora = trained(scale)
    found = lint(lora, settings=options(dtype=dtype))
    assert [f.rule for f in found] == ["FXL503"] * lost
    assert all("measured" in f.message for f in found)
    # The same, from the merged weights themselves.
    own = info(lora).base.get_parameter("up.weight").detach()
    merged = fxlora.merge(lora).get_parameter("up.weight").detach()
    wanted = getattr(torch, dtype)
    kept = merged.to(wanted).double() - own.to(wanted).double()
    update = merged.double() - own.double()
    assert (float((kept - update).norm() / update.norm()) > 0.1) is lost


def test_the_bound_before_training_bounds_what_is_measured() -> None:
    from fxlora.lint.context import Context
    from fxlora.lint.rules_merging import _expected, _measured

    for scale in (1e-3, 3e-3, 1e-2, 1e-1):
        lora = trained(scale)
        facts = info(lora)
        told = Options(dtype="bfloat16", trained_b=scale)
        context = Context(facts.base, facts.plan, told, lora)
        (site,) = facts.plan.adapted
        measured = _measured(context, site, torch.bfloat16)
        assert measured is not None
        # The bound is of a root mean square over random A and B: a tenth for their draw.
        assert measured < 1.1 * _expected(context, site, torch.bfloat16)
        assert measured > _expected(context, site, torch.bfloat16) / 4


def test_an_entry_that_hits_one_other_name_and_one_that_hits_two_are_both_broad() -> None:
    one = check(chain(up=linear(4), lm_head=linear(4)), ["up"], modules_to_save=["head"])
    assert [f.rule for f in one] == ["FXL109"]
    two = check(
        chain(up=linear(4), a=chain(head=linear(4)), head=linear(4)), ["up"],
        modules_to_save=["head"],
    )  # fmt: skip
    assert [f.rule for f in two] == ["FXL109"]


def test_the_bound_is_the_formula_of_its_page() -> None:
    """bfloat16, in = 4096, r = 8, alpha = 4: 2^-8 / sqrt 3 * rms(W) / (s sqrt r rms(A) b)."""
    (one,) = wide(4, "bfloat16")
    a = 1 / (3 * 4096) ** 0.5  # nn.Linear's own rms(W), and that of A
    share = 2**-8 / 3**0.5 * a / (0.5 * 8**0.5 * a * 0.01)
    assert f"loses up to {100 * share:.0f} % of the update" in one.message


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_cuts_what_the_linter_says_it_cuts() -> None:
    """Runs the checkpoints, block by block, as a transformers model does."""
    from torch.utils.checkpoint import checkpoint

    for targets, cut in ((["up"], {"layers.0.up", "layers.1.up"}), (["up", "words"], set())):
        model = embedded()
        found = check(model, targets, IDS, settings=options(gradient_checkpointing="reentrant"))
        assert {s for f in found for s in f.sites} == cut
        from peft import get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        inner: Any = wrapped.base_model.model
        x = inner.words(IDS)
        for block in inner.layers:
            x = checkpoint(block, x, use_reentrant=True)
        assert x.requires_grad is not bool(cut)


def test_a_router_s_own_words_do_not_matter() -> None:
    found = check(
        Net(lambda m, x: m.b(x) * m.a(x).sigmoid().topk(1, -1)[0] + m.b(x), a=linear(4), b=linear(4)),
        ["a"], X,
    )  # fmt: skip
    assert "FXL106" not in {f.rule for f in found}  # the choice scales, and nothing runs after it

    def switch(m: Any, x: Any) -> Any:
        return m.b(m.maps[m.a(x).softmax(-1).argmax(-1)] * x)

    one = Net(switch, a=linear(4), b=linear(4), maps=nn.Parameter(torch.ones(4, 4)))
    assert [f.where for f in check(one, ["a", "b"], X) if f.rule == "FXL106"] == ["a"]

    def run(m: Any, x: Any) -> Any:
        best, index = (m.a(x).sigmoid() + m.tilt).topk(2, -1)
        return m.b(torch.einsum("bkd,bk->bd", m.maps[index], best))

    model = Net(run, a=linear(4), b=linear(4), tilt=nn.Parameter(torch.zeros(4)),
                maps=nn.Parameter(torch.ones(4, 4)))  # fmt: skip
    assert [f.where for f in check(model, ["a", "b"], X) if f.rule == "FXL106"] == ["a"]


def test_the_fused_rows_an_unmatched_name_means_are_named() -> None:
    def run(m: Any, x: Any) -> Any:
        gate, up = m.gate_up_proj(x).chunk(2, -1)
        return F.silu(gate) * up

    found = check(Net(run, gate_up_proj=linear(4, 12)), ["gate_up_proj", "up_proj"], X)
    (one,) = [f for f in found if f.rule == "FXL101"]
    assert "(here it is rows 6:12 of 'gate_up_proj')" in one.message


def test_severities_and_ignores_are_the_settings() -> None:
    model = chain(a=linear(4))
    quiet = Settings(ignore=("FXL3", "zero-scaling"))
    assert len(check(model, ["a"], r=8, lora_alpha=0, settings=quiet)) == 0
    loud = Settings(select=("FXL301",), severity={"rank-above-layer": "error"})
    (one,) = check(model, ["a"], r=8, lora_alpha=0, settings=loud)
    assert (one.rule, one.severity) == ("FXL301", Severity.ERROR)
    assert replace(loud, fail_on="never").threshold is None


# ---- what PEFT builds and cannot run -------------------------------------------------------------


class _Stack(nn.Module):
    """Reads a list of parameters past the list, which no wrapper can stand in for."""

    def __init__(self, made: type[nn.Module]) -> None:
        super().__init__()
        self.b = nn.Linear(4, 4)
        w = nn.Parameter(torch.ones(4, 4))
        self.e = nn.ParameterList([w]) if made is nn.ParameterList else nn.ParameterDict({"0": w})

    def forward(self, x: Any) -> Any:
        return self.b(x @ (self.e[0] if isinstance(self.e, nn.ParameterList) else self.e["0"]))


def _named() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(input=x)), a=linear(4), b=linear(4))


def _named_lookup() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(input=x)), a=nn.Embedding(9, 4), b=linear(4))


NOT_RUN: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str, str]] = {
    "keyword": (
        _named, X, {"target_modules": ["a", "b"]},
        "a", "called with its input by keyword, input=: PEFT's wrapper takes it by position only",
    ),
    "keyword-lookup": (
        _named_lookup, IDS, {"target_modules": ["a", "b"]}, "a", "by keyword, input=",
    ),
    "keyword-weight": (
        _named, X, {"target_modules": ["b"], "target_parameters": ["a.weight"]},
        "a.weight", "called with its input by keyword, input=",
    ),
    "list": (
        lambda: _Stack(nn.ParameterList), X,
        {"target_modules": ["b"], "target_parameters": ["e.0"]},
        "e.0", "read outside its module's own calls",
    ),
    "dict": (
        lambda: _Stack(nn.ParameterDict), X,
        {"target_modules": ["b"], "target_parameters": ["e.0"]},
        "e.0", "read outside its module's own calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_peft_builds_and_cannot_run_is_told(name: str) -> None:
    make, given, settings, site, message = NOT_RUN[name]
    config = LoraConfig(r=2, **settings)
    with pytest.raises(TypeError):
        get_peft_model(make(), copy.deepcopy(config))(given)
    found = [f for f in lint(fxlora.trace(make(), (given,)), config) if f.rule == "FXL113"]
    assert [f.sites for f in found] == [(site,)]
    assert message in found[0].message


def test_a_weight_that_the_wrapper_hands_on_is_no_failure() -> None:
    model = Net(lambda m, x: m.b(x) @ m.a.weight, a=linear(4), b=linear(4))
    config = LoraConfig(r=2, target_modules=["b"], target_parameters=["a.weight"])
    get_peft_model(copy.deepcopy(model), copy.deepcopy(config))(X)
    plan = fxlora.plan(fxlora.trace(model, (X,)), config)
    assert not any("fails when it runs" in w for w in plan.warnings)
