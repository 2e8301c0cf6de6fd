"""The parts of a model and their parameters, also inside PEFT's wrappers."""

import sys
from collections.abc import Iterator

from torch import nn

from ...modeling.base_model import AnyVlmModel
from ...modeling.bottleneck_adapters import ADAPTER_NAME


class ModelParts:
    """What can be named in a table of parts.

    Args:
        model: A composed model, or a module that holds one, such as a `PeftModel`.

    Raises:
        TypeError: there is no composed model in it.
    """

    def __init__(self, model: nn.Module):
        found = next(((name, child) for name, child in model.named_modules() if isinstance(child, AnyVlmModel)), None)
        if found is None:
            raise TypeError(
                f"There is no composed model in this {type(model).__name__}. Pass what anyvlm.compose gave, or a "
                "PeftModel around it."
            )
        self.prefix = f"{found[0]}." if found[0] else ""
        self.inner = found[1]
        self.parameters = dict(model.named_parameters())
        #: Never used by PEFT's wrappers: the weights that a copy in `modules_to_save` stands for.
        self.replaced: set[str] = set()
        self.adapters: set[str] = set()
        #: Adapters that are part of the model itself.
        self.bottlenecks = {name for name in self.parameters if f".{ADAPTER_NAME}." in name}
        for name, is_adapter in _of_peft(model):
            (self.adapters if is_adapter else self.replaced).add(name)
        self.bottlenecks -= self.replaced
        self.adapters -= self.bottlenecks  # where PEFT keeps them beside its own

    def adapters_of(self, kind: str) -> set[str]:
        """Names of adapters' parameters: `lora`, `dora` (PEFT's), `bottleneck`, or `adapters` for all."""
        of_peft = self.adapters if kind != "bottleneck" else set()
        return of_peft | (self.bottlenecks if kind in ("bottleneck", "adapters") else set())

    @property
    def names(self) -> list[str]:
        """The parts that have parameters, in the model's order."""
        return list(dict.fromkeys(self.name_within(name).split(".", 1)[0] for name in self.parameters))

    def name_within(self, parameter: str) -> str:
        """A parameter's name in the composed model. What a wrapper adds beside the model keeps its own."""
        return parameter.removeprefix(self.prefix)

    def of(self, part: str) -> list[str]:
        """Names, in the whole model, of a part's parameters; a part is a module, at any depth, or a parameter."""
        return [name for name in self.parameters if f"{self.name_within(name)}.".startswith(f"{part}.")]

    def module(self, part: str) -> nn.Module | None:
        """`None` where the part is a parameter."""
        try:
            return self.inner.get_submodule(part)
        except AttributeError:
            return None


def _of_peft(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Names of parameters that PEFT added (`True`) or that it has put out of use (`False`)."""
    if "peft" not in sys.modules:  # then nobody can have used it
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(remove_duplicate=False)]
        if isinstance(module, BaseTunerLayer):
            added = tuple(f"{name}.{kept}." for kept in module.adapter_layer_names)
            yield from ((parameter, True) for parameter in own if f"{parameter}.".startswith(added))
        elif isinstance(module, ModulesToSaveWrapper):
            saved = f"{name}.modules_to_save."
            yield from ((parameter, True) for parameter in own if parameter.startswith(saved))
            yield from ((parameter, False) for parameter in own if parameter.startswith(f"{name}.original_module."))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield from ((parameter, True) for parameter in own if not parameter.startswith(f"{name}.original_module."))
