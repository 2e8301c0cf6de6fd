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
| `any_size` | pictures may have any size that is a multiple of the merged patches |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..configuration.instructions import INSTRUCTION_KEYS


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

#: All of the model's inputs that go along with `pixel_values`.
IMAGE_INPUTS = (*PROCESSOR_KEYS, "original_sizes", "num_video_frames")


def cut_patches(pictures: torch.Tensor, patch: dict) -> torch.Tensor:
    """Pictures `(B, C, H, W)` to patches `(B, num_patches, C, size, size)`.

    Row by row; with `block` > 1 in blocks of block x block patches, the order of towers that merge neighbours.
    """
    batch_size, channels, height, width = pictures.shape
    size, block = patch["size"], patch["block"]
    rows, columns = height // size // block, width // size // block
    patches = pictures.reshape(batch_size, channels, rows, block, size, columns, block, size)
    return patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch_size, -1, channels, size, size)


def _patch_rows_and_columns(pictures: torch.Tensor, spec: dict) -> torch.Tensor:
    """`(B, 2)`, int64."""
    size = spec["patch"]["size"]
    shape = torch.tensor([pictures.shape[-2] // size, pictures.shape[-1] // size], device=pictures.device)
    return shape.expand(pictures.shape[0], 2)


def _packed(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches of all pictures one after another, in one of four forms: `"flat"` `(total, C * frames * size * size)`
    (Qwen2-VL, Wang et al. 2024; a still picture stands for each frame of a patch), `"channels_first"`
    `(total, C, size, size)`, the same as one `"row"` `(1, total, C, size, size)`, or `"channels_last"`
    `(total, size, size, C)`; and grids `(B, 3)` of frames, rows and columns."""
    patch = spec["patch"]
    patches = cut_patches(pictures, patch).flatten(0, 1)
    if patch["form"] == "flat":
        patches = patches.unsqueeze(2).expand(-1, -1, patch["frames"], -1, -1).flatten(1)
    elif patch["form"] == "row":
        patches = patches.unsqueeze(0)
    elif patch["form"] == "channels_last":
        patches = patches.permute(0, 2, 3, 1)
    shapes = _patch_rows_and_columns(pictures, spec)
    merge_sizes = torch.full((len(pictures),), patch["block"], device=pictures.device)
    grids = torch.cat([torch.ones_like(shapes[:, :1]), shapes], dim=1)
    return {"pixels": patches, "grids": grids, "merge_sizes": merge_sizes}


def _padded(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, size * size * C)` with shapes `(B, 2)` and a mask of the true ones (NaFlex, SigLIP 2,
    Tschannen et al. 2025)."""
    patches = cut_patches(pictures, spec["patch"]).permute(0, 1, 3, 4, 2).flatten(2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pictures.device)
    return {"pixels": patches, "shapes": _patch_rows_and_columns(pictures, spec), "mask": mask}


def _numbered(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, 2 + size * size * C)`, each behind its row and column, counted from 1, and a mask
    (Pix2Struct, Lee et al. 2022)."""
    padded = _padded(pictures, spec)
    columns = int(padded["shapes"][0, 1])
    index = torch.arange(padded["pixels"].shape[1], device=pictures.device)
    places = torch.stack([index // columns + 1, index % columns + 1], dim=-1).to(pictures.dtype)
    places = places.expand(len(pictures), -1, -1)
    return {"pixels": torch.cat([places, padded["pixels"]], dim=-1), "mask": padded["mask"]}


def _strip(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches of all pictures side by side in one strip `(1, C, size, total * size)`, with shapes `(B, 2)`
    (MiniCPM-V)."""
    patches = cut_patches(pictures, spec["patch"]).flatten(0, 1)
    strip = patches.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
    return {"pixels": strip, "shapes": _patch_rows_and_columns(pictures, spec).int()}


def _sized(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Pictures as they are, with the height and width `(B, 2)` of each; others are padded below and to the right, and the
    tower cuts that off (Pixtral, Agrawal et al. 2024)."""
    sizes = torch.tensor(pictures.shape[-2:], device=pictures.device).expand(len(pictures), 2)
    return {"pixels": pictures, "sizes": sizes}


def _unpadded(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Pictures as they are, all of whose patches `(B, rows, columns)` are seen (NaViT, Dehghani et al. 2023; Idefics2)."""
    size = spec["patch"]["size"]
    rows, columns = pictures.shape[-2] // size, pictures.shape[-1] // size
    return {
        "pixels": pictures,
        "patch_mask": torch.ones(len(pictures), rows, columns, dtype=torch.bool, device=pictures.device),
    }


def _masks_of_patches(tensors: dict[str, torch.Tensor], spec: dict) -> dict[str, torch.Tensor]:
    """The mask of pixels `(B, H, W)`, 0 at padding, as one of patches: those that lie in the picture as a whole."""
    size = spec["patch"]["size"]
    squares = tensors["patch_mask"].bool().unfold(1, size, size).unfold(2, size, size)
    return {**tensors, "patch_mask": squares.flatten(3).all(-1)}


def _positioned(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, size * size * C)`, each with its column and row `(B, num_patches, 2)` (Gemma 4)."""
    patches = cut_patches(pictures, spec["patch"]).permute(0, 1, 3, 4, 2).flatten(2)
    rows, columns = (int(count) for count in _patch_rows_and_columns(pictures, spec)[0])
    index = torch.arange(rows * columns, device=pictures.device)
    positions = torch.stack([index % columns, index // columns], dim=-1)
    return {"pixels": patches, "positions": positions.expand(len(pictures), -1, -1)}


def _first_tile(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """The picture as the first of `max_num_tiles` tiles `(B, 1, tiles, C, H, W)`, the others masked (Llama 3.2)."""
    num_tiles = spec["num_tiles"]
    batch_size = len(pictures)
    pixels = pictures.new_zeros(batch_size, 1, num_tiles, *pictures.shape[1:])
    pixels[:, 0, 0] = pictures
    ids = torch.ones(batch_size, 1, dtype=torch.long, device=pictures.device)
    mask = torch.zeros(batch_size, 1, num_tiles, dtype=torch.long, device=pictures.device)
    mask[..., 0] = 1
    return {"pixels": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _unmasked(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Whole pictures, with the "noise" by whose order a masked autoencoder drops patches: rising, so that with
    `mask_ratio` 0 (set when composed) all patches stay, in order (He et al. 2021)."""
    noise = torch.arange(spec["num_patches"], device=pictures.device, dtype=torch.float32)
    return {"pixels": pictures, "noise": noise.expand(len(pictures), -1)}


def _frames(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """A clip `(B, frames, C, H, W)`: one that is given, or a still picture for each frame."""
    if pictures.ndim == 5:
        return {"pixels": pictures}
    return {"pixels": pictures.unsqueeze(1).expand(-1, spec["num_frames"], -1, -1, -1)}


#: The first row whose arguments the tower has is tried; a tower with none of the arguments takes pictures, or frames.
PICTURE_INPUTS: dict[str, PictureInputs] = {
    "packed_patches": PictureInputs(
        arguments={"grids": ("grid_thw", "image_grid_thw"), "merge_sizes": ("merge_sizes",)},
        optional=frozenset({"merge_sizes"}),
        from_processor={"grids": "image_grid_thw"},
        from_pictures=_packed,
        pixels=("pixel_values", "hidden_states"),
    ),
    "numbered_patches": PictureInputs(
        arguments={"mask": ("attention_mask",)},
        from_processor={},
        from_pictures=_numbered,
        pixels=("flattened_patches",),
    ),
    "padded_patches": PictureInputs(
        arguments={"shapes": ("spatial_shapes",), "mask": ("pixel_attention_mask", "attention_mask")},
        optional=frozenset({"mask"}),
        from_processor={"shapes": "spatial_shapes", "mask": "pixel_attention_mask"},
        from_pictures=_padded,
    ),
    "patch_strip": PictureInputs(
        arguments={"shapes": ("target_sizes",)},
        from_processor={"shapes": "target_sizes"},
        from_pictures=_strip,
    ),
    "positioned_patches": PictureInputs(
        arguments={"positions": ("pixel_position_ids", "image_position_ids")},
        from_processor={"positions": "image_position_ids"},
        from_pictures=_positioned,
    ),
    "sized_pictures": PictureInputs(
        arguments={"sizes": ("image_sizes",)},
        from_processor={"sizes": "image_sizes"},
        from_pictures=_sized,
    ),
    "padded_pictures": PictureInputs(
        arguments={"patch_mask": ("patch_attention_mask",)},
        from_processor={"patch_mask": "pixel_attention_mask"},
        from_pictures=_unpadded,
        prepare=_masks_of_patches,
        is_patches=False,
    ),
    "tiles": PictureInputs(
        arguments={"aspect_ratio_ids": ("aspect_ratio_ids",), "aspect_ratio_mask": ("aspect_ratio_mask",)},
        from_processor={},
        from_pictures=_first_tile,
        is_patches=False,
        any_size=False,
    ),
    "masked_pictures": PictureInputs(
        arguments={"noise": ("noise",)}, from_processor={}, from_pictures=_unmasked, is_patches=False, any_size=False
    ),
    "pictures": PictureInputs(
        arguments={},
        from_processor={},
        from_pictures=lambda pictures, spec: {"pixels": pictures},
        is_patches=False,
        any_size=False,
    ),
    "frames": PictureInputs(arguments={}, from_processor={}, from_pictures=_frames, is_patches=False, any_size=False),
    "patches": PictureInputs(arguments={}, from_processor={}, from_pictures=_padded, any_size=False),
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
