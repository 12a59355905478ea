"""Rules 6xx: adapters a serving engine refuses or reads otherwise; silent unless an engine is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

from fxlora.lint.context import Context, shown
from fxlora.lint.finding import Hit, Rule, Severity

ENGINES = ("vllm",)
_Check = Callable[[Context], Iterator[Hit]]


def _served(check: _Check) -> _Check:
    @wraps(check)
    def when_served(context: Context) -> Iterator[Hit]:
        if context.options.serve:
            yield from check(context)

    return when_served


@_served
def served_output_layer(context: Context) -> Iterator[Hit]:
    """FXL601: an adapter on the layer that makes the logits."""
    for name in context.output_layers:
        if name in context.names:
            yield Hit(
                "its result is the model's logits: vLLM takes an adapter there for some "
                "architectures only",
                "leave it out, or merge the adapter before serving",
                site=name,
            )


@_served
def served_packed_projection(context: Context) -> Iterator[Hit]:
    """FXL602: an adapter on a fused projection."""
    parts: dict[str, list[str]] = {}
    for s in context.slices:
        if s.site in context.names:
            parts.setdefault(s.site, []).append(s.part)
    for name, held in parts.items():
        yield Hit(
            f"one adapter over {'/'.join(held)}: an engine that keeps those apart expects adapters "
            "under their own names",
            "check that the engine's class for this model lists the fused name, or split the "
            "adapter (A copied, B cut by rows) before serving",
            site=name,
        )


@_served
def served_variant(context: Context) -> Iterator[Hit]:
    """FXL603: a variant with parameters the engine does not know."""
    found = sorted({p.variant for p in context.adapted if p.variant and p.variant != "mica"})
    more = ["lora_bias"] if context.config.lora_bias else []
    for what in [*found, *more]:
        yield Hit(
            f"{what} is not served: the engine refuses the adapter or its extra tensors",
            "merge the adapter before serving, or train plain LoRA",
            subject=what,
        )


@_served
def served_whole_module(context: Context) -> Iterator[Hit]:
    """FXL604: trained weights that are no adapter."""
    what = [s.name for s in context.plan.saved] + [t.name for t in context.plan.tokens]
    if context.config.bias != "none":
        what.append(f"bias={context.config.bias!r}")
    if what:
        yield Hit(
            f"it trains more than adapters ({shown(what)}), which the engine refuses",
            "merge the adapter before serving, or do without",
            subject=shown(what, 1),
        )


@_served
def served_rank(context: Context) -> Iterator[Hit]:
    """FXL605: a rank above the engine's limit."""
    most = context.options.max_lora_rank
    for p in context.adapted:
        if p.r > most:
            yield Hit(
                f"r={p.r} is above the engine's max_lora_rank={most}",
                f"start it with --max-lora-rank {p.r}, and say so here with the same option",
                site=p.name,
            )


@_served
def served_patterns(context: Context) -> Iterator[Hit]:
    """FXL606: a scaling of its own, which the engine does not read."""
    for p in context.adapted:
        c = context.config
        plain = c.lora_alpha / c.r**0.5 if c.use_rslora else c.lora_alpha / c.r
        if abs(p.scaling - plain) > 1e-9:
            yield Hit(
                f"trained with scaling {p.scaling:g} and served with {plain:g}: the engine reads r "
                "and lora_alpha, and neither rank_pattern nor alpha_pattern",
                "keep alpha / r even, or fold the ratio into lora_B before serving",
                site=p.name,
            )


@_served
def served_layer_kind(context: Context) -> Iterator[Hit]:
    """FXL607: an adapter on a layer that is no linear map of activations."""
    for p in context.adapted:
        if p.kind not in ("Linear", "Conv1D"):
            yield Hit(
                f"{p.kind} adapters are not served by vLLM in this form",
                "leave it out, or merge the adapter before serving",
                site=p.name,
            )


_UP = "model = nn.Sequential(OrderedDict(up=nn.Linear(64, 64), down=nn.Linear(64, 64)))\n"
_END = 'report = lint(fxlora.trace(model), config, Settings(options=Options(serve="vllm")))'
RULES = (
    Rule(
        "FXL601", "served-output-layer", Severity.WARNING, served_output_layer, needs="serve",
        finds="With `--serve vllm`: an adapter on the layer whose result is the model's logits, told "
        "by the dataflow to the output.",
        why="vLLM takes LoRA on `lm_head` only where the model's class lists it; elsewhere the "
        "adapter does not load.",
        example="""\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up = nn.Embedding(32, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 32)

    def forward(self, ids):
        return self.head(self.up(self.words(ids)))

traced = fxlora.trace(Model(), (torch.zeros(2, 3, dtype=torch.long),))
config = LoraConfig(r=2, target_modules=["up", "head"])
report = lint(traced, config, Settings(options=Options(serve="vllm")))""",
        fix="Leave it out, or merge before serving.",
        threads=("vllm-project/vllm#33234",),
    ),
    Rule(
        "FXL602", "served-packed-projection", Severity.NOTE, served_packed_projection,
        needs="serve",
        finds="With `--serve vllm`: an adapter on a fused projection, of which the graph reads "
        "several parts (`qkv_proj`, `gate_up_proj`).",
        why="Engines fuse q, k and v themselves and look for adapters under one set of names. Phi-3 "
        "adapters named `qkv_proj` were refused by vLLM for `expected target modules in ['q_proj', "
        "...]`; newer versions list both for some models.",
        example="""\
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(8, 32)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate) * up

config = LoraConfig(r=2, target_modules=["gate_up_proj"])
traced = fxlora.trace(Gated(), (torch.randn(2, 8),))
report = lint(traced, config, Settings(options=Options(serve="vllm")))""",
        fix="Check the engine's version, or split the adapter: A is copied, B cut by the rows "
        "`fxlora plan` names.",
        threads=("vllm-project/vllm#4715", "vllm-project/vllm#4915"),
    ),
    Rule(
        "FXL603", "served-variant", Severity.ERROR, served_variant, needs="serve",
        finds="With `--serve vllm`: DoRA, KaSA, BD-LoRA or `lora_bias`.",
        why="vLLM refuses the configuration, or the tensor (`lora_magnitude_vector is unsupported "
        "LoRA weight`).",
        example=_UP + 'config = LoraConfig(r=2, target_modules=["up"], use_dora=True)\n' + _END,
        fix="Merge before serving.",
        threads=("vllm-project/vllm#6983",),
    ),
    Rule(
        "FXL604", "served-whole-module", Severity.ERROR, served_whole_module, needs="serve",
        finds="With `--serve vllm`: `modules_to_save`, `trainable_token_indices`, a task type's head "
        "or trained biases.",
        why="vLLM raises `only supports modules_to_save being None`.",
        example=_UP
        + 'config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"])\n'
        + _END,
        fix="Merge before serving.",
        threads=("vllm-project/vllm#9280",),
    ),
    Rule(
        "FXL605", "served-rank", Severity.ERROR, served_rank, needs="serve",
        finds="With `--serve vllm`: a rank above `--max-lora-rank` (16 unless you say otherwise, as "
        "in vLLM).",
        why="`LoRA rank 64 is greater than max_lora_rank 16`.",
        example=_UP + 'config = LoraConfig(r=32, target_modules=["up"])\n' + _END,
        fix="Start the engine with a larger limit and tell the linter.",
        threads=("vllm-project/vllm#2847",),
    ),
    Rule(
        "FXL606", "served-patterns", Severity.ERROR, served_patterns, needs="serve",
        finds="With `--serve vllm`: a layer whose scaling `rank_pattern` or `alpha_pattern` changes.",
        why="vLLM reads `r`, `lora_alpha` and `use_rslora` of the configuration and drops the fields "
        "it does not know (`vllm/lora/peft_helper.py`), so the adapter loads and is scaled "
        "otherwise than it was trained.",
        example=_UP
        + 'config = LoraConfig(r=4, target_modules=["up"], alpha_pattern={"up": 32})\n'
        + _END,
        fix="Keep alpha / r even over all layers, or fold the ratio into lora_B before serving.",
    ),
    Rule(
        "FXL607", "served-layer-kind", Severity.ERROR, served_layer_kind, needs="serve",
        finds="With `--serve vllm`: an adapter on a convolution, an embedding, a bare parameter or "
        "nn.MultiheadAttention.",
        why="The engine replaces linear layers of its own; tensors for anything else are refused or, "
        "for an embedding, taken for some architectures only.",
        example="""\
model = nn.Sequential(OrderedDict(conv=nn.Conv2d(8, 8, 3)))
config = LoraConfig(r=2, target_modules=["conv"])
"""
        + _END,
        fix="Merge before serving.",
        threads=("vllm-project/vllm#33234",),
    ),
)  # fmt: skip
