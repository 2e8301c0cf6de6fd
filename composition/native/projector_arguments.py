"""Compare a projector with the one that a native class has."""

import inspect
from typing import Any

from torch import nn

from ...modeling.projectors import PROJECTORS


#: Stands for an argument that the native class can express whatever it is.
FREE = object()

_WIDTHS = ("in_features", "out_features")


def projector_arguments(projector_config: dict) -> dict[str, Any]:
    """`type` and all arguments, those left out with what they are then; widths of layers as a list."""
    projector_class = PROJECTORS[projector_config["type"]]
    arguments = {}
    for base in reversed(projector_class.__mro__):
        if issubclass(base, nn.Module) and base is not nn.Module:
            arguments |= {
                name: parameter.default
                for name, parameter in inspect.signature(base.__init__).parameters.items()
                if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
            }
    arguments |= projector_config
    if "num_layers" in arguments:
        hidden = arguments["hidden_features"]
        if not isinstance(hidden, (list, tuple)):
            hidden = [hidden or arguments["out_features"]] * (arguments["num_layers"] - 1)
        arguments["hidden_features"] = list(hidden)
    if "norm" in arguments:
        usual = {None: None, "layer_norm": 1e-5}.get(arguments["norm"], 1e-6)
        eps = arguments["norm_eps"]
        arguments["norm_eps"] = usual if eps is None or arguments["norm"] is None else eps
    return arguments


def same_projector(projector_config: dict, expected: dict[str, Any]) -> list[tuple[bool, str]]:
    """Conditions for `require`: the type is the same, and every argument is the expected one, or its default.

    Args:
        expected: As a `projector_config`, without widths of input and output; arguments that may be anything are `FREE`.
    """
    if projector_config["type"] != expected["type"]:
        return [(False, f"its projector is {expected['type']!r}, not {projector_config['type']!r}")]
    found = projector_arguments(projector_config)
    grid, width = projector_config.get("aligned_grid"), projector_config.get("aligned_features")
    aligned = [
        (
            grid is None,
            f"its projector takes features as the tower gives them, without bringing them to a grid of "
            f'{"x".join(map(str, grid or ()))} first (swap with image_tokens="own")',
        ),
        (
            width is None,
            f"its projector takes features as the tower gives them, without mapping them to a width of {width} first",
        ),
    ]
    found = {name: value for name, value in found.items() if name not in ("aligned_grid", "aligned_features")}
    fixed = {name: value for name, value in expected.items() if value is not FREE}
    wanted = projector_arguments({**fixed, **{name: found[name] for name in _WIDTHS}})
    return aligned + [
        (
            expected.get(name) is FREE or found[name] == wanted.get(name),
            f"its projector has {name} {wanted.get(name)!r}",
        )
        for name in found
    ]
