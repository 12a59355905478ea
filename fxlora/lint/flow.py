"""Questions of dataflow the rules ask: what routes, what is a tower, what makes the logits, which blocks repeat."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxlora.facts import info
from fxlora.gradients import requires_grad, target_name
from fxlora.sites import Site

# What hands a score on, element by element or as a view.
_SCORES = frozenset(
    "softmax log_softmax sigmoid to float half bfloat16 double type type_as view reshape squeeze "
    "unsqueeze flatten contiguous add mul div sub add_ mul_ masked_fill masked_fill_ where clamp "
    "cast_like tanh rsqrt softplus sqrt relu".split()
)
_SELECTS = frozenset(("topk", "argmax"))
_PRODUCTS = frozenset(
    "matmul bmm baddbmm einsum mm scaled_dot_product_attention multi_head_attention_forward "
    "flash_attn_func flex_attention linear cdist cosine_similarity".split()
)
_SIZES = frozenset(
    "size dim numel new_zeros new_ones new_empty new_full zeros_like ones_like".split()
)
_INDEXING = frozenset(
    "view reshape to long int contiguous getitem unsqueeze squeeze flatten".split()
)
TEXT, MEDIA = 1, 2


def _word(node: Node) -> str:
    return "getitem" if node.target is operator.getitem else target_name(node)


def calls_of(sites: Sequence[Site]) -> dict[Node, Site]:
    """Returns every node that multiplies by a site's weight, with the site."""
    return {c.node: s for s in sites for c in s.calls}


# ---- routers -----------------------------------------------------------------------------------


def routers(traced: GraphModule, sites: Sequence[Site]) -> dict[str, Node]:
    """Finds the linear maps whose scores choose what runs next.

    A router's output is scored (softmax, sigmoid, a bias, a mask), every score over the same
    features, and the best are taken by topk or argmax; what is taken leads on to other layers.

    Returns:
        Site name -> the node that selects.
    """
    calls = calls_of(sites)
    leads = _leads_to(traced, calls)
    found: dict[str, Node] = {}
    for site in sites:
        for call in site.calls:
            chosen = _selected(call.node, site.out_features)
            if chosen is not None and any(u in leads for u in chosen.users):
                found.setdefault(site.name, chosen)
    return found


def _leads_to(traced: GraphModule, calls: Collection[Node]) -> set[Node]:
    """Returns the nodes from which a call of a layer is reached."""
    leads: set[Node] = set()
    for node in reversed(traced.graph.nodes):
        if node in calls or any(u in leads for u in node.users):
            leads.add(node)
    return leads


def _selected(start: Node, features: int) -> Node | None:
    todo, seen = deque([start]), {start}
    while todo:
        for user in todo.popleft().users:
            if user in seen:
                continue
            seen.add(user)
            word = _word(user)
            if word in _SELECTS:
                return user
            shape = user.meta.get("shape")
            if shape and shape[-1] == features and (word in _SCORES or _is_activation(user)):
                todo.append(user)
    return None


def _is_activation(node: Node) -> bool:
    return node.op == "call_module" and not any(True for _ in _module(node).parameters())


def _module(node: Node) -> nn.Module:
    root: Any = node.graph.owning_module
    found: nn.Module = root.get_submodule(str(node.target))
    return found


# ---- towers ------------------------------------------------------------------------------------


def origins(traced: GraphModule) -> dict[Node, int]:
    """Returns, for every node, whether text tokens (TEXT) or media (MEDIA) flow into it.

    Text is an integer input that is looked up in an embedding; media is a floating-point input.
    """
    masks: dict[Node, int] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            masks[node] = _kind_of_input(node)
        elif _word(node) in _SIZES or (node.target is getattr and node.args[1] != "T"):
            masks[node] = 0
        else:
            masks[node] = 0
            for source in node.all_input_nodes:
                masks[node] |= masks[source]
    return masks


def _kind_of_input(node: Node) -> int:
    dtype = node.meta.get("dtype")
    if dtype is None:
        return 0
    if dtype.is_floating_point:
        return MEDIA
    todo, seen = deque([node]), {node}
    while todo:
        for user in todo.popleft().users:
            if user.target is F.embedding:
                return TEXT
            if user.op == "call_module" and isinstance(_module(user), nn.Embedding):
                return TEXT
            if _word(user) in _INDEXING and user not in seen:
                seen.add(user)
                todo.append(user)
    return 0


def tower(traced: GraphModule, sites: Sequence[Site]) -> tuple[str, ...]:
    """Finds the sites that see media only and whose result is written into the stream of tokens.

    Two towers that only meet in a product (CLIP's similarity, a decoder's cross-attention) are two
    halves of one model, and neither is the other's tower.
    """
    masks = origins(traced)
    if not any(_joins(n, masks) for n in traced.graph.nodes):
        return ()
    return tuple(s.name for s in sites if s.calls and all(masks[c.node] == MEDIA for c in s.calls))


def _joins(node: Node, masks: dict[Node, int]) -> bool:
    if node.op not in ("call_function", "call_method") or _word(node) in _PRODUCTS:
        return False
    # What only gathers results (an output class) joins nothing; a write in place does.
    if not (_is_float(node) or node.meta.get("mutates")):
        return False
    inputs = [n for n in node.all_input_nodes if _is_float(n)]
    return any(masks[n] == MEDIA for n in inputs) and any(masks[n] & TEXT for n in inputs)


def _is_float(node: Node) -> bool:
    dtype = node.meta.get("dtype")
    return dtype is not None and dtype.is_floating_point


def unentered_tower(traced: GraphModule, sites: Sequence[Site]) -> tuple[str, ...]:
    """Finds the sites of a tower the traced inputs never enter, such as a model of images on text.

    The tower is told by its input layer, a convolution that is not called either; what else is not
    called (the projector behind it) goes with it.
    """
    entered = {f.path for n in traced.graph.nodes for f in n.meta.get("module_stack", ())}
    idle = [s for s in sites if not s.calls and s.kind != "Parameter" and s.name not in entered]
    if not any(s.kind.startswith("Conv") and s.kind != "Conv1D" for s in idle):
        return ()
    return tuple(s.name for s in idle if s.name.rpartition(".")[0] not in entered - {""})


# ---- the output layer --------------------------------------------------------------------------


def output_layers(traced: GraphModule, sites: Sequence[Site]) -> tuple[str, ...]:
    """Finds the sites whose result is the model's logits over its vocabulary."""
    words = {s.in_features for s in sites if s.kind == "Embedding" and s.calls}
    calls = calls_of(sites)
    output = next(n for n in reversed(traced.graph.nodes) if n.op == "output")
    todo, seen, found = deque(output.all_input_nodes), set(output.all_input_nodes), []
    while todo:
        node = todo.popleft()
        site = calls.get(node)
        if site is not None:
            if site.out_features in words and site.kind != "Embedding":
                found.append(site.name)
            continue
        if node.op == "call_module" and any(True for _ in _module(node).parameters()):
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return tuple(s.name for s in sites if s.name in found)


# ---- repeated blocks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The equal blocks of one nn.ModuleList.

    Attributes:
        path: the list's name.
        indices: the blocks of one class, in order.
    """

    path: str
    indices: tuple[int, ...]

    def prefix(self, index: int) -> str:
        """Returns the name of a block with its dot."""
        return f"{self.path}.{index}."


def blocks(traced: GraphModule, sites: Sequence[Site]) -> tuple[Blocks, ...]:
    """Finds the repeated blocks: the children of one class of every nn.ModuleList."""
    types = info(traced).module_types
    own = {s.name for s in sites}
    found: list[Blocks] = []
    for path, kind in types.items():
        if not issubclass(kind, nn.ModuleList):
            continue
        by_class: dict[type, list[int]] = {}
        index = 0
        while f"{path}.{index}" in types:
            if f"{path}.{index}" not in own:
                by_class.setdefault(types[f"{path}.{index}"], []).append(index)
            index += 1
        found += [Blocks(path, tuple(i)) for i in by_class.values() if len(i) > 1]
    return tuple(found)


# ---- gradient checkpointing --------------------------------------------------------------------


def cut_by_reentrant_checkpointing(
    lora: GraphModule, repeated: Sequence[Blocks]
) -> tuple[str, ...]:
    """Finds the blocks that give no gradient when each is checkpointed with `use_reentrant=True`.

    A reentrant checkpoint runs its block under no_grad and records one autograd function over the
    tensors that go in. When none of those requires grad, nothing that comes out does, whatever
    trains inside (torch.utils.checkpoint).
    """
    roots = [b.prefix(i)[:-1] for b in repeated for i in b.indices]
    # The outermost blocks: those are what a model checkpoints.
    outer = {r for r in roots if not any(r.startswith(f"{o}.") for o in roots)}
    flags = requires_grad(lora)
    held: dict[Node, str] = {n: _block_of(n, outer) for n in lora.graph.nodes}
    alive = dict.fromkeys(sorted(outer), False)
    entered: set[str] = set()
    real: dict[Node, bool] = {}
    for node in lora.graph.nodes:
        block = held[node]
        for source in node.all_input_nodes:
            if block and held[source] != block and source.op != "get_attr":
                entered.add(block)
                alive[block] |= real[source]
        real[node] = flags[node] and _still(lora, node, real) and (not block or alive[block])
    return tuple(b for b in roots if b in outer and b in entered and not alive[b])


def _block_of(node: Node, outer: Collection[str]) -> str:
    return next((f.path for f in node.meta.get("module_stack", ()) if f.path in outer), "")


def _still(lora: GraphModule, node: Node, real: dict[Node, bool]) -> bool:
    if node.op in ("get_attr", "placeholder") or "requires_grad" in node.meta:
        return True
    if target_name(node) == "requires_grad_":
        return True  # asked for by a hook of what comes before the blocks
    if node.op == "call_module":
        module = lora.get_submodule(str(node.target))
        if any(p is not None and p.requires_grad for p in module._parameters.values()):
            return True
    return any(real[n] for n in node.all_input_nodes)


# ---- parameters --------------------------------------------------------------------------------


def holders(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields (name, identity) of every parameter of every module, each module once."""
    for name, module in model.named_modules():
        for last, p in module.named_parameters(recurse=False):
            yield (f"{name}.{last}" if name else last), id(p)


def weight_of(model: nn.Module, site: Site) -> torch.Tensor:
    """Returns the live weight of a site."""
    owner, _, last = site.weight_name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), last)
    return found
