"""Rules 4xx: scalings, modes and checkpointing: what goes wrong while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fxlora.lint.context import Context
from fxlora.lint.finding import Hit, Rule, Severity
from fxlora.lint.flow import cut_by_reentrant_checkpointing
from fxlora.plan import PlannedSite

LARGEST = 8.0  # alpha = 64 at r = 8 is the most a published recipe takes
UNEVEN = 4.0


def _scalings(
    when: Callable[[Context, PlannedSite], bool], says: str, fix: str
) -> Callable[[Context], Iterator[Hit]]:
    def check(context: Context) -> Iterator[Hit]:
        for p in context.adapted:
            if when(context, p):
                yield Hit(
                    says.format(s=f"{p.scaling:g}", alpha=f"{p.lora_alpha:g}", r=p.r),
                    fix.format(alpha=f"{p.lora_alpha / max(p.r, 1) * p.r**0.5:g}"),
                    site=p.name,
                )

    return check


def uneven_scaling(context: Context) -> Iterator[Hit]:
    """FXL405: scalings of one adapter that lie far apart."""
    rows = sorted((abs(p.scaling), p.name) for p in context.adapted if p.scaling)
    if rows and rows[-1][0] > UNEVEN * rows[0][0]:
        (low, first), (high, last) = rows[0], rows[-1]
        yield Hit(
            f"scalings go from {low:g} ({first}) to {high:g} ({last}), so one learning rate does "
            "not fit both",
            "give rank_pattern and alpha_pattern the same keys, so that alpha / r stays even",
            subject="scaling",
        )


def dropout_on_eval_model(context: Context) -> Iterator[Hit]:
    """FXL406: dropout that PEFT switches on in a model that is in eval mode."""
    if context.config.lora_dropout > 0 and not context.model.training:
        yield Hit(
            f"lora_dropout={context.config.lora_dropout:g} and the model is in eval mode: PEFT adds "
            "the adapters in train mode, so their dropout is on until the next eval()",
            "call model.train() before training and model.eval() after get_peft_model before any "
            "evaluation",
            subject="lora_dropout",
        )


def checkpointing_cuts_gradient(context: Context) -> Iterator[Hit]:
    """FXL407: reentrant checkpoints into which no gradient goes, so that none comes out."""
    if context.options.gradient_checkpointing != "reentrant" or context.options.input_require_grads:
        return
    cut = cut_by_reentrant_checkpointing(context.lora, context.blocks)
    for p in context.adapted:
        block = next((b for b in cut if p.name.startswith(f"{b}.")), None)
        if block is not None:
            yield Hit(
                "no input of its checkpointed block requires grad, so a reentrant checkpoint gives "
                "the adapter no gradient",
                'use gradient_checkpointing_kwargs={"use_reentrant": False}, or call '
                "model.enable_input_require_grads() first",
                site=p.name,
            )


def inference_mode(context: Context) -> Iterator[Hit]:
    """FXL408: a configuration that freezes its own adapters."""
    if context.config.inference_mode:
        bias = context.config.bias
        rest = f" but the biases of bias={bias!r}" if bias != "none" else ""
        yield Hit(
            f"inference_mode=True freezes every adapter: after get_peft_model nothing trains{rest}",
            "set config.inference_mode = False, or load a saved adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True)",
            subject="inference_mode",
        )


_W = Severity.WARNING
_MODEL = "model = nn.Sequential(OrderedDict(up=nn.Linear(64, 64), down=nn.Linear(64, 64)))\n"
RULES = (
    Rule(
        "FXL401", "zero-scaling", Severity.ERROR,
        _scalings(
            lambda _, p: p.scaling == 0, "lora_alpha={alpha} makes the scaling 0: the adapter has "
            "no effect and no gradient", "set lora_alpha above 0, such as r or 2 r",
        ),
        finds="A scaling of zero.",
        why="The adapter is multiplied by it, and so is its gradient: nothing trains. PEFT takes "
        "`lora_alpha=0` without a word.",
        example=_MODEL
        + 'report = lint(fxlora.trace(model), LoraConfig(target_modules=["up"], lora_alpha=0))',
        fix="Set `lora_alpha` (or the `alpha_pattern` value) above 0.",
    ),
    Rule(
        "FXL402", "negative-scaling", _W,
        _scalings(
            lambda _, p: p.scaling < 0, "lora_alpha={alpha} makes the scaling {s}", "take the minus "
            "away",
        ),
        finds="A negative scaling.",
        why="B can learn the sign, so it trains; tools that combine or merge adapters by their "
        "scaling (a square root of it for instance) do not expect it.",
        example=_MODEL
        + 'report = lint(fxlora.trace(model), LoraConfig(target_modules=["up"], lora_alpha=-8))',
        fix="Take the minus away: set `lora_alpha` above 0.",
    ),
    Rule(
        "FXL403", "large-scaling", _W,
        _scalings(
            lambda c, p: p.scaling > LARGEST and not c.config.use_rslora,
            "lora_alpha={alpha} over r={r} is a scaling of {s}, above 8",
            "take lora_alpha of r to 2 r, or a lower learning rate knowingly",
        ),
        finds="A scaling alpha / r above 8.",
        why="The scaling multiplies the update and its gradient. An alpha kept from a larger rank "
        "(or a rank lowered by `rank_pattern` under the same alpha) acts as a learning rate several "
        "times higher.",
        example=_MODEL
        + "config = LoraConfig(r=2, lora_alpha=64, target_modules=[\"up\"])\n"
        "report = lint(fxlora.trace(model), config)",
        fix="Take `lora_alpha` of r to 2 r; with `rank_pattern` set `alpha_pattern` too.",
    ),
    Rule(
        "FXL404", "rslora-large-alpha", _W,
        _scalings(
            lambda c, p: p.scaling > LARGEST and bool(c.config.use_rslora),
            "use_rslora scales by alpha / sqrt(r) = {s}: lora_alpha={alpha} was meant for alpha / r",
            "lora_alpha={alpha} gives the scaling alpha / r would have had",
        ),
        finds="`use_rslora` with a scaling alpha / sqrt(r) above 8.",
        why="An alpha chosen for alpha / r is sqrt(r) times too large after `use_rslora` is switched "
        "on: at r=64 eight times (arXiv 2312.03732 keeps alpha where it is small).",
        example=_MODEL
        + 'config = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules=["up"])\n'
        "report = lint(fxlora.trace(model), config)",
        fix="Divide `lora_alpha` by sqrt(r).",
    ),
    Rule(
        "FXL405", "uneven-scaling", _W, uneven_scaling,
        finds="Scalings of one adapter that are more than a factor of 4 apart.",
        why="`rank_pattern` without `alpha_pattern` (or the other way round) changes alpha / r where "
        "only the rank was meant to change: those layers learn at another rate.",
        example=_MODEL
        + 'config = LoraConfig(r=16, target_modules=["up", "down"], rank_pattern={"down": 2})\n'
        "report = lint(fxlora.trace(model), config)",
        fix="Give both patterns the same keys.",
    ),
    Rule(
        "FXL406", "dropout-on-eval-model", _W, dropout_on_eval_model, on=False,
        finds="`lora_dropout` above 0 on a model in eval mode. Off unless it is selected: a model "
        "fresh from `from_pretrained` is in eval mode too, and trainers switch it.",
        why="PEFT adds the adapters in train mode whatever the model's mode is, so an evaluation "
        "right after `get_peft_model` is random.",
        example=_MODEL
        + 'config = LoraConfig(r=2, target_modules=["up"], lora_dropout=0.1)\n'
        'report = lint(fxlora.trace(model.eval()), config, Settings(select=("FXL406",)))',
        fix="Call `train()` or `eval()` on the wrapped model before it is used.",
        threads=("huggingface/peft#3753",),
    ),
    Rule(
        "FXL407", "checkpointing-cuts-gradient", Severity.ERROR, checkpointing_cuts_gradient,
        needs="gradient_checkpointing",
        finds="With `--gradient-checkpointing reentrant`: adapters in a checkpointed block none of "
        "whose inputs requires grad. Decided from `requires_grad` of every node of the rewritten "
        "graph.",
        why="`torch.utils.checkpoint(use_reentrant=True)` runs the block under `no_grad` and records "
        "one function of the tensors that went in. With a frozen embedding the first block's input "
        "requires no grad, so neither does its output, and so on through the model: the loss has no "
        "gradient, or the first blocks silently get none.",
        example="""\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(OrderedDict(up=nn.Linear(8, 8))) for _ in range(2)
        )

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return x

traced = fxlora.trace(Model(), (torch.zeros(2, 3, dtype=torch.long),))
options = Options(gradient_checkpointing="reentrant")
report = lint(traced, LoraConfig(r=2, target_modules=["up"]), Settings(options=options))""",
        fix="Use the non-reentrant checkpoint, or `model.enable_input_require_grads()`, and say so "
        "with `--input-require-grads`.",
        threads=("huggingface/transformers#42489", "microsoft/LoRA#120"),
    ),
    Rule(
        "FXL408", "inference-mode", Severity.ERROR, inference_mode,
        finds="`inference_mode=True` in a configuration that is to train. The command line reads a "
        "saved configuration as one to train with, so it is silent there.",
        why="PEFT writes it into every adapter_config.json it saves and freezes every adapter made "
        "from it: with `get_peft_model(model, PeftConfig.from_pretrained(...))` nothing trains, and "
        "the backward pass fails with `element 0 of tensors does not require grad`.",
        example=_MODEL
        + 'config = LoraConfig(r=2, target_modules=["up"], inference_mode=True)\n'
        "report = lint(fxlora.trace(model), config)",
        fix="Set `config.inference_mode = False`, or load the adapter with "
        "`PeftModel.from_pretrained(..., is_trainable=True)`.",
        threads=("huggingface/peft#472", "huggingface/peft#2840"),
    ),
)  # fmt: skip
