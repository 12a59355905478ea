"""Where PEFT's number or behaviour is not what LoRA means: a table, each entry held by a test.

fxlora computes what LoRA means. A comparison names what applies to a plan, measures it by building
PEFT's mistake into a second graph (`fxlora.rewrite.rewrite_as_peft`), and checks that this graph is
what PEFT runs. So a fix upstream shows as a difference, not as a lie. Checked against peft 0.21.2.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fxlora.config import init_name
from fxlora.layers import is_conv
from fxlora.plan import Plan, PlannedSite

FAST_PATH = "encoder_fast_path"
_PEFT = "https://github.com/huggingface/peft"


class Case(NamedTuple):
    """One adapted site of a plan, with what is looked up once for all of them.

    Attributes:
        plan: the plan.
        site: the adapted site.
        layer: its live layer; None for a bare parameter.
        model: the live model.
        holders: id of a parameter -> how many modules hold it.
        encoders: prefixes of the names inside an nn.TransformerEncoderLayer.
    """

    plan: Plan
    site: PlannedSite
    layer: Any
    model: nn.Module
    holders: dict[int, int]
    encoders: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """One known deviation of PEFT's.

    Attributes:
        name: a stable name; for `when="forward"` also what `rewrite_as_peft` reproduces.
        what: what PEFT does, in one sentence.
        thread: where it is discussed upstream; "" when we know of no thread.
        when: "forward" (other outputs), "merge", "save" or "mode".
        applies: whether it bears on a site.
    """

    name: str
    what: str
    thread: str
    when: str
    applies: Callable[[Case], bool]


@dataclass(frozen=True)
class Divergence:
    """A known deviation that bears on a plan.

    Attributes:
        name, what, thread, when: as `Known` has them.
        sites: the sites it bears on.
        size: the largest difference it makes to an output; None where it was not run.
    """

    name: str
    what: str
    thread: str
    when: str
    sites: tuple[str, ...]
    size: float | None = None

    def __str__(self) -> str:
        size = "" if self.size is None else f", by up to {self.size:.3g}"
        more = f" and {len(self.sites) - 2} more" if len(self.sites) > 2 else ""
        thread = f" ({self.thread})" if self.thread else ""
        return f"{self.name}{size}: {self.what}{thread}; at {', '.join(self.sites[:2])}{more}"


def _doubled(c: Case) -> bool:
    return c.site.rule == "attention"


def _dilated(c: Case) -> bool:
    return is_conv(c.site.kind) and any(d != 1 for d in c.layer.dilation)


def _padded(c: Case) -> bool:
    return is_conv(c.site.kind) and c.layer.padding_mode != "zeros"


def _limited(c: Case) -> bool:
    return c.site.kind == "Embedding" and c.layer.max_norm is not None


def _residual(plan: Plan) -> bool:
    how = init_name(plan.config)
    named = isinstance(how, str) and how.startswith(("pissa", "olora"))
    return named or plan.config.kasa_config is not None


def _is_tied(c: Case) -> bool:
    owner, _, last = c.site.site.weight_name.rpartition(".")
    return c.holders[id(getattr(c.model.get_submodule(owner), last))] > 1


def _tied_base(c: Case) -> bool:
    return _residual(c.plan) and c.site.form == "branch" and _is_tied(c)


def _tied_merge(c: Case) -> bool:
    aliased = any(not call.through_module for call in c.site.site.calls)
    return _is_tied(c) or (aliased and c.site.form != "delta")


def _flat_kernel(c: Case) -> bool:
    return c.site.kind == "Conv3d" and tuple(c.layer.kernel_size)[:2] == (1, 1)


def _niter(c: Case) -> bool:
    return "_niter_" in str(init_name(c.plan.config)) and c.site.form == "branch"


def _unsorted(c: Case) -> bool:
    """Whether sorting the pattern keys changes which of them is the first to match."""
    for pattern in (c.plan.config.rank_pattern, c.plan.config.alpha_pattern):
        hits = [k for k in pattern if re.match(rf"(.*\.)?({k})$", c.site.name)]
        if hits and sorted(hits)[0] != hits[0] and pattern[sorted(hits)[0]] != pattern[hits[0]]:
            return True
    return False


def _eval_dropout(c: Case) -> bool:
    return c.plan.config.lora_dropout > 0 and c.site.form == "branch" and not c.model.training


def _own_forward(c: Case) -> bool:
    return c.site.kind == "Linear" and c.site.form == "branch" and not maps_by_weight(c.layer)


def _in_encoder(c: Case) -> bool:
    return c.site.name.startswith(c.encoders)


def _turned(c: Case) -> bool:
    return init_name(c.plan.config) == "olora" and c.site.kind == "Conv1D"


def maps_by_weight(layer: Any) -> bool:
    """Whether a linear layer computes F.linear(x, weight, bias), so that a merge can replace it."""
    plain = type(layer).forward in (nn.Linear.forward,)
    held = isinstance(layer._parameters.get("weight"), nn.Parameter)
    return plain and held and not layer._forward_hooks and not layer._forward_pre_hooks


KNOWN: tuple[Known, ...] = (
    Known(
        "attention_out_proj_doubled",
        "nn.MultiheadAttention's out_proj gets W + 2 s B A, and half the gradient",
        f"{_PEFT}/pull/3774", "forward", _doubled,
    ),
    Known(
        "conv_dilation", "lora_A of a dilated convolution has no dilation, so it is another map",
        f"{_PEFT}/issues/3697", "forward", _dilated,
    ),
    Known(
        "conv_padding_mode", "lora_A of a convolution pads with zeros whatever padding_mode says",
        f"{_PEFT}/issues/3697", "forward", _padded,
    ),
    Known(
        "embedding_max_norm", "a forward of an Embedding with max_norm rescales lora_embedding_A in "
        "place", "", "forward", _limited,
    ),
    Known(
        "olora_conv1d", "OLoRA factors a Conv1D's weight the wrong way round: it fails, or a square "
        "one is off from the first step", "", "forward", _turned,
    ),
    Known(
        "tied_base_changed", "PiSSA, OLoRA and KaSA change a tied weight for its other user too",
        f"{_PEFT}/issues/2777", "forward", _tied_base,
    ),
    Known(
        "tied_merge", "merging into a weight that is tied, aliased or read elsewhere changes its other "
        "users too",
        f"{_PEFT}/issues/2777", "merge", _tied_merge,
    ),
    Known(
        "conv3d_merge", "merging a Conv3d whose first two kernel sizes are 1 fails", "", "merge",
        _flat_kernel,
    ),
    Known(
        "own_forward_merge", "merging takes a Linear subclass with a forward, a parametrization or "
        "hooks of its own for a plain one", "", "merge", _own_forward,
    ),
    Known(
        "pissa_niter_reload", "a reload draws the randomized SVD again, so the base it restores is "
        "another one", "", "save", _niter,
    ),
    Known(
        "sorted_patterns", "saving sorts rank_pattern and alpha_pattern, and the first matching key "
        "is then another one", "", "save", _unsorted,
    ),
    Known(
        FAST_PATH, "nn.TransformerEncoderLayer in eval mode without gradients reads its "
        "weights past the adapters, which then do nothing", "", "mode", _in_encoder,
    ),
    Known(
        "eval_dropout", "adapters added to a model in eval mode start in train mode, with dropout",
        f"{_PEFT}/issues/3753", "mode", _eval_dropout,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Deliberate:
    """One configuration that fxlora answers differently from PEFT, and means to.

    Attributes:
        name: a stable name.
        field: the LoraConfig field it is about; "" when any may be.
        peft: what PEFT does.
        ours: what fxlora does.
        why: the reason.
    """

    name: str
    field: str
    peft: str
    ours: str
    why: str


DELIBERATE: tuple[Deliberate, ...] = (
    Deliberate(
        "wrong_type", "",
        "takes a value of the wrong type that it never reads, or that Python happens to make "
        "something of: lora_alpha=True is 1, modules_to_save='head' is read letter by letter",
        "ConfigTypeError", "the value does not mean what it says",
    ),
    Deliberate(
        "unread_value", "",
        "takes a rank of 0, or a broken regular expression, where no layer makes it read the value",
        "ConfigError", "it is wrong whatever the model, and fails on the next one",
    ),
    Deliberate(
        "constructor_rules", "", "checks fields against each other in LoraConfig's constructor only",
        "ConfigError for a field set afterwards too", "the rules hold whenever a field was set",
    ),
    Deliberate(
        "negative_dropout", "lora_dropout", "reads a negative lora_dropout as no dropout",
        "ConfigError", "a sign error trains without the dropout that was asked for",
    ),
    Deliberate(
        "not_finite", "", "takes nan and inf, for lora_alpha, alpha_pattern and lora_dropout",
        "ConfigError", "every output is NaN, or the dropout that was asked for is not there",
    ),
    Deliberate(
        "pissa_without_scaling", "init_lora_weights",
        "draws PiSSA with lora_alpha <= 0, which makes adapter and base weight NaN", "ConfigError",
        "PiSSA divides by the scaling and takes a root",
    ),
    Deliberate(
        "mica_in_capitals", "init_lora_weights",
        "draws MiCA's lora_B for 'MICA', and then trains it, which MiCA does not", "ConfigError",
        "only 'mica' is MiCA",
    ),
    Deliberate(
        "init_not_read", "init_lora_weights", "reads any string as True on an nn.Embedding",
        "ConfigError for a string that names no initialisation", "a typing error goes unseen",
    ),
    Deliberate(
        "init_from_data", "init_lora_weights",
        "draws as if nothing was said for 'eva' and 'lora_ga' without their preparation",
        "UnsupportedError", "the initialisation that was asked for needs data",
    ),
    Deliberate(
        "rank_above_the_weight", "init_lora_weights",
        "makes an adapter of a smaller rank, with the scaling of the larger one, for PiSSA and OLoRA",
        "ConfigError", "r and scaling are not what the configuration says",
    ),
    Deliberate(
        "olora_on_conv1d", "init_lora_weights",
        "factors the transposed weight of a Conv1D, so lora_A and lora_B have each other's sizes",
        "factors the weight as (out, in)", "PEFT's adapter fails when it runs, or changes the output",
    ),
    Deliberate(
        "tied_weight_changed", "init_lora_weights",
        "PiSSA, OLoRA and KaSA write the changed weight of one tied layer into the other",
        "the changed weight belongs to the adapted layer only",
        "the other layer's adapter, if it has one, does not make up for the change",
    ),
    Deliberate(
        "no_rows", "trainable_token_indices",
        "wraps an embedding for an empty list of rows, and fails when it runs", "ConfigError",
        "an empty list is no index",
    ),
    Deliberate(
        "negative_row", "trainable_token_indices",
        "makes rows for negative indices, and fails when it runs or merges", "ConfigError",
        "index_copy takes no negative index",
    ),
    Deliberate(
        "init_of_a_parameter", "init_lora_weights",
        "factors the weight of the layer that holds a parameter, whichever parameter it is",
        "ConfigError", "target_modules factors a linear layer's weight",
    ),
    Deliberate(
        "tokens_of_an_adapted_layer", "trainable_token_indices",
        "puts the rows of a tied embedding below the adapter of the output layer",
        "UnsupportedError", "rows and adapter would both own the weight",
    ),
    Deliberate(
        "rows_of_a_saved_module", "trainable_token_indices",
        "refuses an entry that is in modules_to_save too, compares the two as written, and otherwise "
        "hangs the rows over the copy of the module, which fails when it runs", "ConfigTypeError",
        "the names may differ where the module is the same",
    ),
    Deliberate(
        "attention_and_its_projection", "target_modules",
        "hangs a second adapter on the out_proj of an adapted nn.MultiheadAttention, where no forward "
        "reaches it", "UnsupportedError", "the attention's adapter covers out_proj",
    ),
    Deliberate(
        "parameter_of_a_layer", "target_parameters",
        "takes the weight of a convolution, an Embedding or a Conv1D for a matrix or a stack of them",
        "UnsupportedError", "target_modules adapts such a layer as what it is",
    ),
    Deliberate(
        "parameter_of_a_whole", "target_parameters",
        "parametrizes a module that torch computes as a whole (Bilinear, LSTM, a LayerNorm of two "
        "dimensions)", "UnsupportedError", "an adapter is added where a forward in Python reads it",
    ),
    Deliberate(
        "saved_inside_saved", "modules_to_save",
        "copies a module twice that an entry hits inside one another entry hits", "UnsupportedError",
        "one of the copies is never called",
    ),
    Deliberate(
        "adapter_inside_saved", "modules_to_save",
        "copies a module together with the adapters inside it, and trains the copy of each as well",
        "ConfigTypeError", "a module is adapted or trained as a whole",
    ),
    Deliberate(
        "saved_part_of_an_adapter", "modules_to_save",
        "copies the base layer inside an adapter for an entry such as 'layer', which base_layer ends "
        "with", "UnsupportedError", "the model has no module of that name",
    ),
    Deliberate(
        "task_of_generation", "task_type",
        "raises AttributeError for CAUSAL_LM and SEQ_2_SEQ_LM where the model has no "
        "prepare_inputs_for_generation", "the plan",
        "the field says nothing of the graph, and inject_adapter_in_model takes it",
    ),
    Deliberate(
        "mamba_kernels", "target_modules",
        "refuses out_proj and conv1d of Mamba models, whose kernels read the weights directly",
        "a plan with a warning", "the traced graph calls them as layers",
    ),
)  # fmt: skip


def divergences(plan: Plan, model: nn.Module) -> tuple[Divergence, ...]:
    """Returns what of the table bears on a plan.

    Args:
        plan: for a trace of `model`.
        model: the live model; read.
    """
    return tuple(_found(plan, model))


def _found(plan: Plan, model: nn.Module) -> Iterator[Divergence]:
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    encoders = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)
    )
    cases = [Case(plan, p, _layer(model, p), model, holders, encoders) for p in plan.adapted]
    for known in KNOWN:
        hit = [c.site.name for c in cases if known.applies(c)]
        if known.name == "tied_merge":
            hit += _rows_shared(plan, model, holders)
        if hit:
            # What a mode does to a model that is in it is in its outputs.
            now = known.name == FAST_PATH and not model.training
            when = "forward" if now else known.when
            yield Divergence(known.name, known.what, known.thread, when, tuple(hit))


def _rows_shared(plan: Plan, model: nn.Module, holders: dict[int, int]) -> list[str]:
    """Returns the layers whose rows train and whose weight another layer holds without them."""
    weights = {
        t.name: id(getattr(model.get_submodule(t.name), "weight", None)) for t in plan.tokens
    }
    same = Counter(weights.values())
    return [name for name, weight in weights.items() if holders[weight] > same[weight]]


def _layer(model: nn.Module, p: PlannedSite) -> Any:
    return None if p.kind == "Parameter" else model.get_submodule(p.site.owner)


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float | None:
    """Returns the largest difference between two lists of tensors; None when there is none to see."""
    sizes = [distance(x, y) for x, y in zip(a, b, strict=True) if x.numel()]
    return worst(sizes) if sizes else None


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the largest difference of two tensors of one shape.

    NaN in the same place on both sides is no difference, nor is the same infinity; NaN against a
    number is NaN, which is no size.

    >>> nan, inf = float("nan"), float("inf")
    >>> distance(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.5]))
    0.5
    >>> distance(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0]))
    nan
    """
    if not a.numel():
        return 0.0
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    x, y = a.double(), b.double()
    same = (x == y) | (x.isnan() & y.isnan())
    return float((x - y).abs().masked_fill(same, 0.0).max())


def worst(sizes: Iterable[float]) -> float:
    """Returns the largest of some differences; NaN, which has no size, is worse than any.

    >>> worst([1.0, float("nan"), 2.0]), worst([])
    (nan, 0.0)
    """
    return max(sizes, key=lambda s: (math.isnan(s), s), default=0.0)
