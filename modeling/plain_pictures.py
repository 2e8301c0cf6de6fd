"""Plain pictures to what towers take: the functions `from_pictures` of the table in `modeling/picture_inputs.py`.

Each takes pictures `(B, C, H, W)` and `vision_tower_spec`, and gives tensors under that module's names of arguments.
"""

import torch


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


def packed_patches(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
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


def padded_patches(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, size * size * C)` with shapes `(B, 2)` and a mask of the true ones (NaFlex, SigLIP 2,
    Tschannen et al. 2025)."""
    patches = cut_patches(pictures, spec["patch"]).permute(0, 1, 3, 4, 2).flatten(2)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pictures.device)
    return {"pixels": patches, "shapes": _patch_rows_and_columns(pictures, spec), "mask": mask}


def numbered_patches(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, 2 + size * size * C)`, each behind its row and column, counted from 1, and a mask
    (Pix2Struct, Lee et al. 2022)."""
    padded = padded_patches(pictures, spec)
    columns = int(padded["shapes"][0, 1])
    index = torch.arange(padded["pixels"].shape[1], device=pictures.device)
    places = torch.stack([index // columns + 1, index % columns + 1], dim=-1).to(pictures.dtype)
    places = places.expand(len(pictures), -1, -1)
    return {"pixels": torch.cat([places, padded["pixels"]], dim=-1), "mask": padded["mask"]}


def in_strip(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches of all pictures side by side in one strip `(1, C, size, total * size)`, with shapes `(B, 2)`
    (MiniCPM-V)."""
    patches = cut_patches(pictures, spec["patch"]).flatten(0, 1)
    strip = patches.permute(1, 2, 0, 3).flatten(2).unsqueeze(0)
    return {"pixels": strip, "shapes": _patch_rows_and_columns(pictures, spec).int()}


def sized_pictures(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Pictures as they are, with the height and width `(B, 2)` of each; others are padded below and to the right, and the
    tower cuts that off (Pixtral, Agrawal et al. 2024)."""
    sizes = torch.tensor(pictures.shape[-2:], device=pictures.device).expand(len(pictures), 2)
    return {"pixels": pictures, "sizes": sizes}


def unpadded_pictures(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Pictures as they are, all of whose patches `(B, rows, columns)` are seen (NaViT, Dehghani et al. 2023; Idefics2)."""
    size = spec["patch"]["size"]
    rows, columns = pictures.shape[-2] // size, pictures.shape[-1] // size
    return {
        "pixels": pictures,
        "patch_mask": torch.ones(len(pictures), rows, columns, dtype=torch.bool, device=pictures.device),
    }


def masks_of_patches(tensors: dict[str, torch.Tensor], spec: dict) -> dict[str, torch.Tensor]:
    """The mask of pixels `(B, H, W)`, 0 at padding, as one of patches: those that lie in the picture as a whole."""
    size = spec["patch"]["size"]
    squares = tensors["patch_mask"].bool().unfold(1, size, size).unfold(2, size, size)
    return {**tensors, "patch_mask": squares.flatten(3).all(-1)}


def positioned_patches(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Patches `(B, num_patches, size * size * C)`, each with its column and row `(B, num_patches, 2)` (Gemma 4)."""
    patches = cut_patches(pictures, spec["patch"]).permute(0, 1, 3, 4, 2).flatten(2)
    rows, columns = (int(count) for count in _patch_rows_and_columns(pictures, spec)[0])
    index = torch.arange(rows * columns, device=pictures.device)
    positions = torch.stack([index % columns, index // columns], dim=-1)
    return {"pixels": patches, "positions": positions.expand(len(pictures), -1, -1)}


def first_tile(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """The picture as the first of `max_num_tiles` tiles `(B, 1, tiles, C, H, W)`, the others masked (Llama 3.2)."""
    num_tiles = spec["num_tiles"]
    batch_size = len(pictures)
    pixels = pictures.new_zeros(batch_size, 1, num_tiles, *pictures.shape[1:])
    pixels[:, 0, 0] = pictures
    ids = torch.ones(batch_size, 1, dtype=torch.long, device=pictures.device)
    mask = torch.zeros(batch_size, 1, num_tiles, dtype=torch.long, device=pictures.device)
    mask[..., 0] = 1
    return {"pixels": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def unmasked_pictures(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """Whole pictures, with the "noise" by whose order a masked autoencoder drops patches: rising, so that with
    `mask_ratio` 0 (set when composed) all patches stay, in order (He et al. 2021)."""
    noise = torch.arange(spec["num_patches"], device=pictures.device, dtype=torch.float32)
    return {"pixels": pictures, "noise": noise.expand(len(pictures), -1)}


def as_clips(pictures: torch.Tensor, spec: dict) -> dict[str, torch.Tensor]:
    """A clip `(B, frames, C, H, W)`: one that is given, or a still picture for each frame."""
    if pictures.ndim == 5:
        return {"pixels": pictures}
    return {"pixels": pictures.unsqueeze(1).expand(-1, spec["num_frames"], -1, -1, -1)}
