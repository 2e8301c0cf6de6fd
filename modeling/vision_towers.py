"""Build and call any vision tower, and get its patches as `(num_images, num_features, width)` with their grid.

The tower is the bare transformers model. How to call it and where its patches are was measured once, when the model
was composed, and is read here from `vision_tower_spec`:

| key | meaning |
|---|---|
| `inputs`, `arguments`, `patch`, `num_frames`, `num_tiles` | how it takes pictures, see `picture_inputs.py` |
| `call_kwargs` | further arguments, such as `return_dict` and `interpolate_pos_encoding` |
| `output` | `"last_hidden_state"`, `"pooler_output"` (merged patches), `"feature_maps"` (a backbone's) or `"tensor"` |
| `layout` | a key of `LAYOUTS` |
| `num_prefix_tokens`, `num_suffix_tokens` | tokens at either end that are no patches: CLS, registers, detection |
| `merge_size` | patches of the input along each edge of one feature, for towers that take patches |
| `hidden_size` | width of the features that are read, summed over the layers read |
| `image_size` | pixels `[height, width]` of one picture; of an example where the size is free |
| `grid` | `[rows, columns]` of features of such a picture |
"""

import contextlib
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ..configuration.image_tokens import image_grid
from .parts import own_model_class
from .picture_inputs import picture_kinds, tower_arguments


#: What the axes of a tower's features mean; B pictures, N places or H x W of them, C channels.
LAYOUTS = {
    "sequence": "(B, N, C)",
    "channels_first": "(B, C, H, W)",
    "channels_last": "(B, H, W, C)",
    "packed": "(places of all pictures, C), or with an axis of one in front",
    "tiles": "(B, 1, tiles, N, C), of which the first tile holds the picture",
}


def vision_tower_class(vision_config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The model class for a config: of `AutoModel`, of `AutoBackbone`, or the one that stands beside the config.

    Some vision parts are in no mapping of transformers (those of metaclip_2, blip_2, qwen2_vl, …). Their class is in
    the modeling file of the config's folder: of the classes made for this config, the first that takes pixels.
    """
    own_class = own_model_class(AutoModel, vision_config)
    if own_class is not None:
        return own_class
    for mapping in (MODEL_MAPPING, MODEL_FOR_BACKBONE_MAPPING):
        if type(vision_config) in mapping:
            found = mapping[type(vision_config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    module_name = type(vision_config).__module__.replace(".configuration_", ".modeling_")
    if module_name == type(vision_config).__module__:
        return None
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return None
    towers = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and picture_kinds(inspect.signature(value.forward).parameters)
    ]
    stated = [tower for tower in towers if tower.config_class is type(vision_config)]
    # In transformers 5.20 the tower of got_ocr2 names the type of its config only where it takes one.
    built_from = [tower for tower in towers if tower.__init__.__annotations__.get("config") is type(vision_config)]
    return next(iter(stated or built_from), None)


def build_vision_tower(vision_config: PreTrainedConfig) -> nn.Module:
    """The bare tower, with random weights."""
    tower_class = vision_tower_class(vision_config)
    if tower_class is None:
        raise ValueError(f"transformers has no model class for the vision tower {vision_config.model_type!r}.")
    return tower_class._from_config(vision_config)


@contextlib.contextmanager
def graph_if_trained(tower: nn.Module) -> Iterator[None]:
    """A tower none of whose parameters require a gradient is frozen: it runs in `eval()` and without a graph."""
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    if frozen and tower.training:
        tower.eval()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        yield


def call_vision_tower(
    vision_tower: nn.Module,
    spec: dict,
    pixel_values: torch.Tensor,
    layer: int | Sequence[int] | None = None,
    processor_outputs: Mapping | None = None,
) -> list[torch.Tensor]:
    """Run the tower and return the raw features of the chosen layers, in the tower's own layout.

    Args:
        pixel_values: Plain pictures `(num_images, channels, height, width)`, or what the tower's own image processor
            makes of them, with the rest of it in `processor_outputs`.
        layer: `None` for the output that `spec` names, or one index or several into `hidden_states`.
    """
    if spec["inputs"] == "pictures_by_size":
        return [_call_by_size(vision_tower, spec, pixel_values, layer, processor_outputs or {})]
    arguments = tower_arguments(spec, pixel_values, processor_outputs or {})
    arguments.update(spec["call_kwargs"])
    if layer is None:
        outputs = vision_tower(**arguments)
        return [select_output(outputs, spec["output"])]
    outputs = vision_tower(**arguments, output_hidden_states=True)
    layers = [layer] if isinstance(layer, int) else list(layer)
    return [outputs.hidden_states[index] for index in layers]


def _call_by_size(
    vision_tower: nn.Module,
    spec: dict,
    pixel_values: torch.Tensor,
    layer: int | Sequence[int] | None,
    processor_outputs: Mapping,
) -> torch.Tensor:
    """Features `(num_images, most features, hidden_size)` of pictures of several sizes, those of one size in one run.

    Args:
        pixel_values: Pictures, padded below and to the right to the largest of them.
        processor_outputs: With `image_sizes`, height and width of each without its padding; or empty.
    """
    sizes = processor_outputs.get("image_sizes")
    sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values) if sizes is None else map(tuple, sizes.tolist())
    indices: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        indices.setdefault(size, []).append(index)
    features: dict[int, torch.Tensor] = {}
    for (height, width), of_size in indices.items():
        raw_features = call_vision_tower(
            vision_tower, spec["by_size"], pixel_values[of_size, :, :height, :width], layer
        )
        grids = [image_grid(spec, height, width)] * len(of_size)
        features.update(zip(of_size, read_features(raw_features, spec["by_size"], grids)))
    return nn.utils.rnn.pad_sequence([features[index] for index in sorted(features)], batch_first=True)


def select_output(outputs, name: str) -> torch.Tensor:
    """One output of a tower by the name that `vision_tower_spec["output"]` gives it."""
    if name == "tensor":
        return outputs
    if name == "feature_maps":
        return outputs.feature_maps[-1]
    return outputs[name]


def to_sequence(features: torch.Tensor, layout: str) -> torch.Tensor:
    """Raw features in any layout to `(num_images, num_features, width)`, row by row for maps.

    For `"packed"` the features of all pictures come one after another, as one picture.
    """
    if layout == "channels_first":
        return features.flatten(2).transpose(1, 2)
    if layout == "channels_last":
        return features.flatten(1, 2)
    if layout == "packed":
        return features.reshape(1, -1, features.shape[-1])
    if layout == "tiles":
        return features[:, 0, 0]
    return features


def read_features(
    raw_features: list[torch.Tensor], spec: dict, grids: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """Features of each picture `(rows * columns, hidden_size)`, without the tokens that are no patches.

    Args:
        grids: Rows and columns of features of each picture.

    Raises:
        ValueError: the tower gives features of another width or number than was measured.
    """
    sequences = [to_sequence(features, spec["layout"]) for features in raw_features]
    features = sequences[0] if len(sequences) == 1 else torch.cat(sequences, dim=-1)
    if features.shape[-1] != spec["hidden_size"]:
        raise ValueError(
            f"The vision tower gives features of width {features.shape[-1]}, but the config was made for "
            f"{spec['hidden_size']}. Compose the model again with this tower."
        )
    sizes = [math.prod(grid) for grid in grids]
    if spec["layout"] == "packed":
        if features.shape[1] != sum(sizes):
            raise ValueError(f"The vision tower gives {features.shape[1]} features, but the grids {sum(sizes)}.")
        return list(features[0].split(sizes))
    features = features[:, spec["num_prefix_tokens"] : features.shape[1] - spec["num_suffix_tokens"]]
    if spec["inputs"] == "padded_pictures":
        padded = max(rows for rows, _ in grids), max(columns for _, columns in grids)
        if math.prod(padded) != features.shape[1]:
            raise ValueError(
                f"Pictures of up to {padded[0]}x{padded[1]} features were padded further than to the largest of them: the "
                f"tower gives {features.shape[1]}. Pass what the processor made of all of them in one call."
            )
        places = features.unflatten(1, padded)
        return [sample[:rows, :columns].flatten(0, 1) for sample, (rows, columns) in zip(places, grids)]
    # A batch of pictures of several sizes is padded at the end.
    return [sample[:size] for sample, size in zip(features, sizes)]
