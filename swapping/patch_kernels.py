"""Patch embeddings for patches of another size: FlexiViT's pseudo-inverse resize.

A kernel `w` gives a patch `x` the value `<x, w>`. If the patch is resized by a linear map `B`, the kernel that changes the
value least, on average over patches of covariance `S`, is `pinv(sqrt(S) B^T) sqrt(S) w` (Beyer et al. 2023, "FlexiViT: One
Model for All Patch Sizes", section 3.4). For larger patches nothing is lost, whatever `S` is: `<B x, w'> = <x, w>` exactly.
Resizing the kernel as if it were a picture would change the size of all activations.

`S` is that of natural pictures here, whose neighbouring pixels are alike, and `B` is bicubic, as image processors resize.
Measured with DINOv2-S and two photographs, the cosine distance of patch tokens from those of patches of 14 pixels: 0.0003
and 0.0016 for 28 pixels (0.002 and 0.008 with a bilinear `B`), 0.0055 and 0.0097 for 7 (0.011 and 0.016 with a bilinear `B`
and the identity for `S`).
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..modeling.picture_inputs import PICTURE_INPUTS


Size = tuple[int, int]


#: Correlation of neighbouring pixels of photographs.
_CORRELATION = 0.95


def resize_matrix(size: Size, new_size: Size) -> torch.Tensor:
    """`B`: bicubic resizing of a patch, row by row, as a matrix `(new pixels, pixels)`, float64.

    Args:
        size, new_size: Pixels `(height, width)` of a patch.
    """
    height, width = size
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    resized = nn.functional.interpolate(basis, size=new_size, mode="bicubic", align_corners=False, antialias=True)
    return resized.flatten(1).T


def resampled_kernel(kernel: torch.Tensor, new_size: Size) -> torch.Tensor:
    """A kernel `(…, height, width)` for patches of `new_size` pixels, `(…, *new_size)` in the kernel's dtype."""
    size = tuple(kernel.shape[-2:])
    if size == tuple(new_size):
        return kernel.clone()
    root = _root_of_covariance(size)
    resampling = torch.linalg.pinv(root @ resize_matrix(size, new_size).T) @ root
    resampled = kernel.flatten(-2).to("cpu", torch.float64) @ resampling.T
    return resampled.unflatten(-1, new_size).to(kernel.device, kernel.dtype)


def _root_of_covariance(size: Size) -> torch.Tensor:
    """Of the pixels of natural patches, `(pixels, pixels)`, float64: alike the nearer they are to each other."""
    rows, columns = (torch.arange(edge, dtype=torch.float64) for edge in size)
    places = torch.cartesian_prod(rows, columns)
    return torch.linalg.cholesky(_CORRELATION ** torch.cdist(places, places)).T


@dataclass(frozen=True)
class PatchKernel:
    """A tensor of weights for the pixels of a patch.

    Args:
        patch, new_patch: Pixels along each edge of a patch.
        order, new_order: For a layer that takes flat patches, for each of their values its place in planes
            `(frames, channels, patch, patch)`, int64; `None` for a convolution.
    """

    patch: int
    new_patch: int
    order: torch.Tensor | None = None
    new_order: torch.Tensor | None = None

    def resize(self, weight: torch.Tensor) -> torch.Tensor:
        """A convolution's `(width, channels, …, patch, patch)`, or a layer's `(width, values)`, for the new patches."""
        new_size = (self.new_patch, self.new_patch)
        if self.order is None:
            return resampled_kernel(weight, new_size)
        planes = torch.empty_like(weight)
        planes[:, self.order] = weight
        resampled = resampled_kernel(planes.unflatten(1, (-1, self.patch, self.patch)), new_size)
        return resampled.flatten(1)[:, self.new_order]

    def describe(self) -> str:
        return f"kernel over patches of {self.patch} pixels resampled for {self.new_patch} by pseudo-inverse"


def find_patch_kernel(
    shape: tuple[int, ...], new_shape: tuple[int, ...], spec: dict, patch: int, new_patch: int, channels: int
) -> PatchKernel | None:
    """What a tensor of these shapes, with the old and the new patches, must be; `None` if no kernel over patches.

    In what order the values of a flat patch stand is seen by cutting a picture whose pixels are numbered.

    Args:
        spec: The `vision_tower_spec` of the tower.
    """
    if patch == new_patch or len(shape) != len(new_shape) or shape[0] != new_shape[0]:
        return None
    if len(shape) >= 4 and (shape[-2:], new_shape[-2:]) == ((patch, patch), (new_patch, new_patch)):
        return PatchKernel(patch, new_patch)
    if len(shape) == 2 and spec["patch"]:
        order, new_order = (_order_of_values(spec, edge, channels) for edge in (patch, new_patch))
        if (shape[1], new_shape[1]) == (order.numel(), new_order.numel()):
            return PatchKernel(patch, new_patch, order, new_order)
    return None


def _order_of_values(spec: dict, patch: int, channels: int) -> torch.Tensor:
    pixels = channels * patch * patch
    picture = torch.arange(pixels, dtype=torch.float64).reshape(1, channels, patch, patch)
    one_patch = {**spec, "patch": {**spec["patch"], "size": patch, "block": 1}}
    values = PICTURE_INPUTS[spec["inputs"]].from_pictures(picture, one_patch)["pixels"].flatten().long()
    # A still picture stands for every frame of a patch, so that each pixel comes once for each.
    is_pixel = values[:, None] == values[None]
    frame = (is_pixel.tril(-1)).sum(1)
    return frame * pixels + values
