"""Models whose modules have meaningless names."""

from collections.abc import Callable
from typing import Any

from torch import nn


def rename_children(root: nn.Module) -> Callable[[str], str]:
    """Gives every module attribute a meaningless name, and returns the way back for dotted paths.

    The model's own code goes on using the old names; only the module tree shows the new ones.
    """
    old_name: dict[str, str] = {}
    for module in list(root.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential) or not module._modules:
            continue  # numbers are positions, not names; modules without children keep their class
        new_name = {name: f"x{len(old_name) + number}y" for number, name in enumerate(module._modules)}
        old_name |= {new: old for old, new in new_name.items()}
        module._modules = {new_name[name]: child for name, child in module._modules.items()}

        module.__class__ = type(type(module).__name__, (type(module),), {"__getattr__": finder(new_name, type(module))})
    return lambda path: ".".join(old_name.get(part, part) for part in path.split("."))


def finder(new_name: dict[str, str], kind: type[nn.Module]) -> Callable[[nn.Module, str], Any]:
    """A __getattr__ that finds a renamed child by its old name."""

    def find(self: nn.Module, name: str) -> Any:
        return self._modules[new_name[name]] if name in new_name else kind.__getattr__(self, name)

    return find
