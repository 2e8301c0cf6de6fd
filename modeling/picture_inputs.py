"""The ways in which vision towers take pictures, in one table.

Most towers take `pixel_values` (B, C, H, W). Others take patches: packed one after another with the pictures' grids,
padded with their shapes, in one strip, or with a position each; and towers of video take frames. Each way is one row of
`PICTURE_INPUTS`, found by the arguments of the tower's `forward`. A row says which of the processor's outputs go along
and how plain pictures become what the tower takes, so that every tower also works with any image processor.

The facts about one tower (names of its arguments, patch size, …) were measured when the model was composed and are in
`vision_tower_spec`:

| key | meaning |
|---|---|
| `inputs` | a row of `PICTURE_INPUTS` |
| `arguments` | this module's name of an argument -> the tower's: `pixels`, `grids`, `mask`, … |
| `patch` | how patches are cut: `size`, `frames`, `form`, `block`; `null` for towers that take whole pictures |
| `num_frames` | frames of a clip, for towers of video |
| `num_tiles` | places for tiles of one picture, for towers that take tiles |
| `num_patches` | patches of one picture, for masked autoencoders |
| `by_size` | of `pictures_by_size`: the spec by which pictures of one size are run and read |
| `any_size` | pictures may have any size that is a multiple of the merged patches |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..configuration.instructions import INSTRUCTION_KEYS
from .plain_pictures import (
    as_clips,
    first_tile,
    in_strip,
    masks_of_patches,
    numbered_patches,
    packed_patches,
    padded_patches,
    positioned_patches,
    sized_pictures,
    unmasked_pictures,
    unpadded_pictures,
)


@dataclass(frozen=True)
class PictureInputs:
    """One way of taking pictures.

    Args:
        arguments: This module's name -> the names that towers use, one of which must be an argument of `forward`.
            `pixels` is not listed: see below.
        from_processor: This module's name -> what image processors call the same thing. With none of these in the
            inputs, `pixel_values` are plain pictures.
        optional: Arguments that a tower of this kind may lack.
        from_pictures: `(pictures (B, C, H, W), spec) -> {this module's name: tensor}`.
        is_patches: Pictures are cut into patches before the tower, or their size must be a multiple of its patches.
        any_size: Any multiple of the (merged) patches will do as the size of a picture.
        prepare: `(what the processor gave under this module's names, spec) -> what the tower takes`, where these differ.
        pixels: What towers of this kind call the pixels.
    """

    arguments: Mapping[str, tuple[str, ...]]
    from_processor: Mapping[str, str]
    from_pictures: Callable[[torch.Tensor, dict], dict[str, torch.Tensor]]
    optional: frozenset[str] = frozenset()
    is_patches: bool = True
    any_size: bool = True
    prepare: Callable[[dict[str, torch.Tensor], dict], dict[str, torch.Tensor]] = lambda tensors, spec: tensors
    pixels: tuple[str, ...] = ("pixel_values", "pixel_values_images", "pixel_values_videos")


#: Outputs of the processor, beside `pixel_values`, that say something about a picture to the model.
PROCESSOR_KEYS = (
    "image_grid_thw",
    "spatial_shapes",
    "pixel_attention_mask",
    "target_sizes",
    "image_position_ids",
    "image_sizes",
    *INSTRUCTION_KEYS,
)

#: All of the model's inputs that go along with `pixel_values`, or stand in their place.
IMAGE_INPUTS = (*PROCESSOR_KEYS, "original_sizes", "num_video_frames", "tower_features", "tower_grids")


#: The first row whose arguments the tower has is tried; a tower with none of the arguments takes pictures, or frames.
PICTURE_INPUTS: dict[str, PictureInputs] = {
    "packed_patches": PictureInputs(
        arguments={"grids": ("grid_thw", "image_grid_thw"), "merge_sizes": ("merge_sizes",)},
        optional=frozenset({"merge_sizes"}),
        from_processor={"grids": "image_grid_thw"},
        from_pictures=packed_patches,
        pixels=("pixel_values", "hidden_states"),
    ),
    "numbered_patches": PictureInputs(
        arguments={"mask": ("attention_mask",)},
        from_processor={},
        from_pictures=numbered_patches,
        pixels=("flattened_patches",),
    ),
    "padded_patches": PictureInputs(
        arguments={"shapes": ("spatial_shapes",), "mask": ("pixel_attention_mask", "attention_mask")},
        optional=frozenset({"mask"}),
        from_processor={"shapes": "spatial_shapes", "mask": "pixel_attention_mask"},
        from_pictures=padded_patches,
    ),
    "patch_strip": PictureInputs(
        arguments={"shapes": ("target_sizes",)},
        from_processor={"shapes": "target_sizes"},
        from_pictures=in_strip,
    ),
    "positioned_patches": PictureInputs(
        arguments={"positions": ("pixel_position_ids", "image_position_ids")},
        from_processor={"positions": "image_position_ids"},
        from_pictures=positioned_patches,
    ),
    "sized_pictures": PictureInputs(
        arguments={"sizes": ("image_sizes",)},
        from_processor={"sizes": "image_sizes"},
        from_pictures=sized_pictures,
    ),
    # Towers of whole pictures that take any size, but one in a batch. Only a run tells which do: no argument says so.
    "pictures_by_size": PictureInputs(
        arguments={"sizes": ()},
        from_processor={"sizes": "image_sizes"},
        from_pictures=sized_pictures,
        is_patches=False,
    ),
    "padded_pictures": PictureInputs(
        arguments={"patch_mask": ("patch_attention_mask",)},
        from_processor={"patch_mask": "pixel_attention_mask"},
        from_pictures=unpadded_pictures,
        prepare=masks_of_patches,
        is_patches=False,
    ),
    "tiles": PictureInputs(
        arguments={"aspect_ratio_ids": ("aspect_ratio_ids",), "aspect_ratio_mask": ("aspect_ratio_mask",)},
        from_processor={},
        from_pictures=first_tile,
        is_patches=False,
        any_size=False,
    ),
    "masked_pictures": PictureInputs(
        arguments={"noise": ("noise",)},
        from_processor={},
        from_pictures=unmasked_pictures,
        is_patches=False,
        any_size=False,
    ),
    "pictures": PictureInputs(
        arguments={},
        from_processor={},
        from_pictures=lambda pictures, spec: {"pixels": pictures},
        is_patches=False,
        any_size=False,
    ),
    "frames": PictureInputs(arguments={}, from_processor={}, from_pictures=as_clips, is_patches=False, any_size=False),
    "patches": PictureInputs(arguments={}, from_processor={}, from_pictures=padded_patches, any_size=False),
}


def tower_arguments(spec: dict, pixel_values: torch.Tensor, processor_outputs: Mapping) -> dict[str, torch.Tensor]:
    """The tower's arguments for a batch of pictures.

    Args:
        spec: `vision_tower_spec`.
        pixel_values: Plain pictures `(B, C, H, W)`, or what the tower's own image processor makes.
        processor_outputs: What it makes beside them, under the names of `PROCESSOR_KEYS`; empty for plain pictures.

    Raises:
        ValueError: something that the tower needs beside `pixel_values` is missing or does not belong to it.
    """
    inputs = PICTURE_INPUTS[spec["inputs"]]
    given = {key: value for key, value in processor_outputs.items() if value is not None}
    if not given:
        tensors = inputs.from_pictures(pixel_values, spec)
    else:
        names = {key: name for name, key in inputs.from_processor.items()}
        unknown = [key for key in given if key not in names]
        missing = [key for key, name in names.items() if key not in given and name in spec["arguments"]]
        if unknown or missing:
            raise ValueError(
                f"This vision tower takes pixel_values with {', '.join(names) or 'nothing else'}, but "
                + " and ".join([f"{key} is missing" for key in missing] + [f"{key} was passed" for key in unknown])
                + ". Pass everything that the processor returned: model(**inputs)."
            )
        row = spec["patch"]["form"] == "row"
        pixels = pixel_values.unsqueeze(0) if row else pixel_values  # image processors leave that axis to the model
        tensors = inputs.prepare({"pixels": pixels, **{names[key]: value for key, value in given.items()}}, spec)
        if "merge_sizes" in spec["arguments"]:
            tensors["merge_sizes"] = torch.full(
                (len(tensors["grids"]),), spec["patch"]["block"], device=pixel_values.device
            )
    return {spec["arguments"][name]: value for name, value in tensors.items() if name in spec["arguments"]}


def picture_kinds(parameters: Mapping) -> dict[str, dict[str, str]]:
    """The rows of `PICTURE_INPUTS` that the arguments of a tower's `forward` allow, and in each the tower's names.

    A tower that has a row's own arguments is not tried with whole pictures; one without takes pictures, frames, or
    patches in a fixed grid, and only a run can tell which.
    """
    kinds = {}
    for kind, row in PICTURE_INPUTS.items():
        options = {"pixels": row.pixels, **row.arguments}
        found = {name: next((o for o in names if o in parameters), None) for name, names in options.items()}
        if any(option is None and name not in row.optional for name, option in found.items()):
            continue
        kinds[kind] = {name: option for name, option in found.items() if option}
        if row.arguments:
            break
    return kinds
