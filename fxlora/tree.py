"""Where the parts of an adapter hang in a module tree: in the containers peft has there."""

from __future__ import annotations

from typing import Any

from torch import nn

_CONTAINERS = {
    "lora_dropout": nn.ModuleDict, "lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict,
    "lora_embedding_A": nn.ParameterDict, "lora_embedding_B": nn.ParameterDict,
    "lora_magnitude_vector": nn.ModuleDict, "lora_diag": nn.ParameterDict,
    "lora_dora_base": nn.ModuleDict, "modules_to_save": nn.ModuleDict,
    "trainable_tokens_delta": nn.ParameterDict,
}  # fmt: skip


def hang(root: nn.Module, path: str, part: nn.Module | nn.Parameter) -> None:
    """Hangs a part of an adapter below its site, in the containers peft has there."""
    owner, _, adapter = path.rpartition(".")
    above, _, kind = owner.rpartition(".")
    parent = _reach(root, above)
    container = parent._modules.get(kind)
    if container is None:
        made: Any = _CONTAINERS[kind]
        container = made()
        container.train(parent.training)
        parent.add_module(kind, container)
    if isinstance(part, nn.Module):
        part.train(parent.training)
    held: Any = container
    held[adapter] = part


def _reach(root: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path, making `base_layer` and `token_adapter` levels as needed."""
    module = root
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            child = nn.Module()
            child.train(module.training)
            module.add_module(name, child)
        module = child
    return module
