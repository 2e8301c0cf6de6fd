"""What is trained beside the model, in a checkpoint of the trainer: heads of objectives and learned weights of losses."""

import os
from collections.abc import Mapping

from safetensors.torch import load_file, save_file
from torch import nn


#: In a checkpoint of the trainer; the exported model has no such file.
OBJECTIVES_NAME = "objectives.safetensors"
#: Under which the learned weights of losses are kept, beside the objectives' names.
LOSS_MIXING = "loss_mixing"


def save_heads(folder: str | os.PathLike, heads: Mapping[str, nn.Module]) -> None:
    """Write `objectives.safetensors`, if any of the heads has something to keep."""
    state = nn.ModuleDict(heads).state_dict()
    if state:
        path = os.path.join(folder, OBJECTIVES_NAME)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)


def load_heads(folder: str | os.PathLike, heads: Mapping[str, nn.Module]) -> None:
    """Give heads the weights that a checkpoint of `AnyVlmTrainer` has for them.

    Args:
        folder: The checkpoint.
        heads: By the names they had as `objectives`; some of them are enough.

    Raises:
        ValueError: the checkpoint has none, or others.
    """
    expected = {name: head for name, head in heads.items() if head.state_dict()}
    if not expected:
        return
    path = os.path.join(folder, OBJECTIVES_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no {OBJECTIVES_NAME}: it was not written by an AnyVlmTrainer with objectives that have weights "
            f"of their own ({', '.join(expected)}). Resume without these objectives, or start anew."
        )
    found = load_file(path)
    for name, head in expected.items():
        state = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        own = head.state_dict()
        other = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if other or state.keys() - own.keys():
            there = ", ".join(sorted({key.partition(".")[0] for key in found}))
            raise ValueError(
                f"The weights of {name} in {path} are not those of this {type(head).__name__} (weights there: {there}; "
                f"missing or of another shape: {', '.join(other) or 'none'}). Make it with the settings it was trained with."
            )
        head.load_state_dict(state)
