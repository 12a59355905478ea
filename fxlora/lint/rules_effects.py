"""Rules 2xx: adapters that are listed and trained and reach no output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fxlora.lint.context import Context
from fxlora.lint.finding import Hit, Rule, Severity

_FIX = {
    "bypassed": "leave it out with exclude_modules, adapt the module that reads the weight (of "
    "nn.MultiheadAttention the attention itself, not its out_proj), or adapt every use with "
    "reach='uses', which peft cannot",
    "partial": "call the module everywhere, accept that the other reads keep the base weight, or "
    "adapt them too with reach='uses', which peft cannot",
    "inert": "leave it out, or trace and train with inputs that reach it",
    "cut": "take away what stops the gradient, or leave the layer out",
    "dead": "leave it out: nothing uses what it computes",
}


def _checker(verdict: str) -> Callable[[Context], Iterator[Hit]]:
    def check(context: Context) -> Iterator[Hit]:
        elsewhere = set(context.unentered) if verdict == "inert" else set()
        if len(elsewhere & context.names) == len(context.adapted):
            elsewhere = set()  # nothing but the tower is adapted, so FXL107 says nothing
        for e in context.effects:
            if e.verdict == verdict and e.site not in elsewhere:
                # A node's number is another one in every block.
                reason = re.sub(r"_\d+\b", "", e.reason)
                yield Hit(f"{_SAYS[verdict]}: {reason}", _FIX[verdict], site=e.site)

    return check


_SAYS = {
    "bypassed": "the adapter changes nothing",
    "partial": "the adapter holds for some uses of the weight only",
    "inert": "the adapter never runs",
    "cut": "the adapter gets no gradient",
    "dead": "the adapter reaches no output",
}
_CASES = """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        {}

traced = fxlora.trace(Model(), (torch.randn(2, 4),))
report = lint(traced, LoraConfig(r=2, target_modules=["a", "b"]))"""


RULES = (
    Rule(
        "FXL201", "bypassed-adapter", Severity.ERROR, _checker("bypassed"),
        finds="An adapter on a layer whose weight every use reads past the module: "
        "`F.linear(x, layer.weight)`, fused kernels, the `out_proj` of nn.MultiheadAttention.",
        why="PEFT wraps modules. The wrapper is never called, so the adapter is attached, listed as "
        "trainable, stepped by the optimizer and saved, and the model is the base model.",
        example=_CASES.format("return F.linear(x, self.a.weight) + self.b(x)"),
        fix="Leave the layer out, target the module that does the reading where PEFT knows it "
        "(nn.MultiheadAttention), or change the model's code to call the layer.",
        threads=("helicalAI/helical#405", "unslothai/unsloth-zoo#1242", "huggingface/peft#761"),
    ),
    Rule(
        "FXL202", "partially-bypassed-adapter", Severity.WARNING, _checker("partial"),
        finds="An adapter on a layer of which some uses go through the module and others read the "
        "weight past it, or by another name of the module.",
        why="The two uses then compute with different weights, and a merge changes both: the merged "
        "model is not the one that was trained.",
        example=_CASES.format("return self.b(self.a(x)) + F.linear(x, self.a.weight)"),
        fix="Call the module everywhere, or leave the layer out.",
        threads=("huggingface/peft#761",),
    ),
    Rule(
        "FXL203", "inert-adapter", Severity.ERROR, _checker("inert"),
        finds="An adapter on a layer that is never called on the traced path.",
        why="It trains nothing and costs memory in the optimizer and the checkpoint. When the layer "
        "belongs to a branch other inputs take, trace with those inputs. The tower of a model that "
        "was traced on text alone is FXL107's.",
        example=_CASES.format("return self.b(x)"),
        fix="Leave it out, or trace with the inputs you train on.",
        threads=("helicalAI/helical#405",),
    ),
    Rule(
        "FXL204", "cut-adapter", Severity.ERROR, _checker("cut"),
        finds="An adapter whose every path to an output passes a `detach`, a `no_grad`, an integer, "
        "or a function such as `round` whose derivative is zero everywhere.",
        why="Its value reaches the output and its gradient never comes back: B stays zero.",
        example=_CASES.format("return self.a(x).detach() + self.b(x)"),
        fix="Take away what stops the gradient, or leave the layer out. The message names it.",
        threads=("huggingface/transformers#42489",),
    ),
    Rule(
        "FXL205", "dead-adapter", Severity.ERROR, _checker("dead"),
        finds="An adapter on a layer that runs and whose result nothing uses that leads to an output.",
        why="It costs compute and memory and trains nothing.",
        example=_CASES.format("self.a(x)\n        return self.b(x)"),
        fix="Leave it out.",
        threads=("helicalAI/helical#405",),
    ),
)  # fmt: skip
