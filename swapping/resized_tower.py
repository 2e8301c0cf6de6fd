"""The same vision tower for pictures, or patches, of another size.

Which tensors depend on the size is measured: the tower is built for the new size without weights, and the shapes are
compared. What kept its shape is copied bit for bit. A tensor that did not is a table of positions
(`position_tables.py`), a kernel over patches (`patch_kernels.py`), or the tower is refused.
"""

import copy
import itertools
import logging

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..composition.errors import CompositionError
from ..composition.image_processors import config_size
from ..composition.probe import probe_vision_tower
from ..composition.running import device_of, in_mode, num_channels, synthetic_pictures
from ..composition.tower_inputs import patch_edge
from ..configuration.image_tokens import image_grids
from ..modeling.picture_inputs import tower_arguments
from ..modeling.vision_towers import call_vision_tower, read_features
from .patch_kernels import PatchKernel, find_patch_kernel
from .position_tables import (
    RESAMPLINGS,
    PositionTable,
    SizeChange,
    find_flat_table,
    find_position_table,
)
from .resized_config import resized_config, stated_patch_size


logger = logging.getLogger(__name__)

Size = tuple[int, int]
#: A tower that states no size is tried with pictures of so many patches (merged ones) along each edge.
_PATCHES = 8
#: Features that differ by this part of their size are the same.
_ROUNDING = 1e-5


def resized_tower(
    vision_tower: nn.Module, image_size: int | Size | None = None, patch_size: int | None = None
) -> tuple[nn.Module, list[str]]:
    """A tower of the same class for another size of pictures or patches, with the weights of this one, which stays.

    Tables of positions are interpolated in the way in which the tower itself does it where it can, so that it gives the
    features that it would give then; else bicubic, and antialiased if they shrink, and linear for offsets between places.
    Kernels over patches are resampled by FlexiViT's pseudo-inverse resize (Beyer et al. 2023).

    Args:
        vision_tower: The bare transformers model.
        image_size: Pixels, one edge or `(height, width)`. Default: the same.
        patch_size: Pixels along each edge of a patch. Default: the same.

    Returns:
        The tower, and a sentence on each tensor that is not the old one's bit for bit; a tower none of whose weights
        depends on the size, and whose config does not state it, is returned itself.

    Raises:
        CompositionError: the tower has a tensor that depends on the size in a way that is not known, states no such size,
            or does not run with the new one.
    """
    name = type(vision_tower).__name__
    config = vision_tower.config
    patch, new_patch = stated_patch_size(config), patch_size or stated_patch_size(config)
    edge = _PATCHES * patch_edge(config)
    old_size = config_size(config) or _pair(edge)
    new_size = _pair(image_size) if image_size is not None else config_size(config) or _pair(edge // patch * new_patch)
    if patch_size is None and config_size(config) is None:
        _probed(vision_tower, new_size, f"{name} states no image_size that could be changed")
        return vision_tower, [f"{name} takes pictures of {new_size[0]}x{new_size[1]} pixels as it is."]
    new_config = resized_config(config, new_size, patch_size)
    old_tensors = vision_tower.state_dict()
    shapes = _shapes(vision_tower, new_config, f"{name} cannot be built for {_spoken(new_size, patch_size)}")
    if shapes.keys() != old_tensors.keys():
        differing = sorted(shapes.keys() ^ old_tensors.keys())
        raise CompositionError(
            f"{name} is not what its config builds: {len(differing)} tensors are in one of them alone, such as "
            f"{differing[0]}. Load the tower as AutoModel.from_pretrained does."
        )
    changed = {
        key: (tuple(tensor.shape), shapes[key])
        for key, tensor in old_tensors.items()
        if tuple(tensor.shape) != shapes[key]
    }
    parameters = dict(vision_tower.named_parameters())
    # A buffer is computed from the config, so the new one's own is right.
    learned = {key: both for key, both in changed.items() if key in parameters}
    spec = _probed(vision_tower, old_size, f"{name} does not run with pictures of its own size")
    change = _measure_change(vision_tower, spec, old_size, new_size, (patch, new_patch))
    found = _recognised(learned, spec, change, num_channels(config))
    unknown = next((key for key in learned if found[key] is None), None)
    if unknown is not None:
        shape, new_shape = learned[unknown]
        raise CompositionError(
            f"{name} has a tensor {unknown} of shape {shape}, which would be of shape {new_shape} for "
            f"{_spoken(new_size, patch_size)}; it is neither a table of positions nor a kernel over patches, so it cannot "
            "be resized. Keep the size that the tower was made for."
        )

    with torch.random.fork_rng():  # weights are drawn, and then overwritten
        new_tower = type(vision_tower)._from_config(new_config, dtype=vision_tower.dtype).to(device_of(vision_tower))
    kept = {key: tensor for key, tensor in old_tensors.items() if key not in changed}
    new_tower.load_state_dict(kept, strict=False)
    way: tuple = (None, None)
    _write(new_tower, old_tensors, found, way)
    for key, parameter in new_tower.named_parameters():
        parameter.requires_grad_(parameters[key].requires_grad)
    new_tower.train(vision_tower.training)
    new_spec = _probed(new_tower, new_size, f"{name} does not run with {_spoken(new_size, patch_size)}")
    if patch_size is None and any(isinstance(table, PositionTable) for table in found.values()):
        way = _towers_own_way(vision_tower, new_tower, new_spec, old_tensors, found, new_size)
        _write(new_tower, old_tensors, found, way)
    return new_tower, [f"{key}: {_described(found[key], way)}" for key in learned]


def fit_to_size(vision_tower: nn.Module, image_size: int | Size) -> nn.Module:
    """The tower itself if it takes pictures of this size, if need be by interpolating its positions in every call; else
    `resized_tower`.

    Raises:
        CompositionError: it cannot be resized either.
    """
    return fitted_tower(vision_tower, image_size)[0]


def fitted_tower(vision_tower: nn.Module, image_size: int | Size) -> tuple[nn.Module, list[str]]:
    """As `fit_to_size`, with a sentence on each tensor that was resized; none if the tower stays."""
    try:
        probe_vision_tower(vision_tower, _pair(image_size))
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way at a size that is not its own
        logger.info("%s is resized, since it says: %s", type(vision_tower).__name__, error)
        return resized_tower(vision_tower, image_size)
    return vision_tower, []


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _spoken(image_size: Size, patch_size: int | None) -> str:
    patches = f" and patches of {patch_size}x{patch_size}" if patch_size else ""
    return f"pictures of {image_size[0]}x{image_size[1]} pixels{patches}"


def _probed(vision_tower: nn.Module, image_size: Size, what: str) -> dict:
    try:
        return probe_vision_tower(vision_tower, image_size)
    except Exception as error:  # noqa: BLE001 - a tower may fail in any way; what it said is reported
        raise CompositionError(f"{what}: {error}") from error


def _shapes(vision_tower: nn.Module, config: PreTrainedConfig, what: str) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a tower of this class and config has."""
    errors = []
    for device in ("meta", "cpu"):  # a class that computes with tensors when it is built needs real ones
        try:
            with torch.random.fork_rng(), torch.device(device):
                built = type(vision_tower)._from_config(copy.deepcopy(config))
        except Exception as error:  # noqa: BLE001 - a class may fail in any way; what it said is reported
            errors.append(error)
        else:
            return {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    raise CompositionError(
        f"{what} ({type(errors[-1]).__name__}: {errors[-1]}). Most towers take squares alone, of a multiple of their "
        "patches."
    ) from errors[-1]


def _measure_change(
    vision_tower: nn.Module, spec: dict, old_size: Size, new_size: Size, patches: tuple[int, int]
) -> SizeChange:
    prefix, suffix = spec["num_prefix_tokens"], spec["num_suffix_tokens"]
    return SizeChange(
        image_size=old_size,
        new_image_size=new_size,
        patch_size=patches[0],
        new_patch_size=patches[1],
        # Some tokens may have no row (registers), and a row for CLS may be in a table without it in the sequence (ViTPose).
        beside=(*((front, back) for front in range(prefix, -1, -1) for back in dict.fromkeys((suffix, 0))), (1, 0)),
        beside_of_rows=_tokens_beside_places(vision_tower, spec),
        num_frames=spec.get("num_frames", 1),
    )


def _recognised(
    shapes: dict[str, tuple], spec: dict, change: SizeChange, channels: int
) -> dict[str, PositionTable | PatchKernel | None]:
    """What each tensor is whose old and new shape is given."""
    found: dict[str, PositionTable | PatchKernel | None] = {
        key: find_patch_kernel(*both, spec, change.patch_size, change.new_patch_size, channels)
        or find_position_table(*both, change)
        for key, both in shapes.items()
    }
    tables = [(*shapes[key], table) for key, table in found.items() if isinstance(table, PositionTable)]
    return {key: found[key] or find_flat_table(*both, tables) for key, both in shapes.items()}


def _tokens_beside_places(vision_tower: nn.Module, spec: dict) -> dict[int, Size]:
    """Number of tokens in a sequence inside the tower -> how many at its start and its end are no places.

    Tokens that are no places (CLS, registers) enter a tower equal for every picture; so two pictures are run, and the
    first sequence of each length tells, before attention has mixed its tokens.
    """
    pictures = synthetic_pictures(2, num_channels(vision_tower.config), tuple(spec["image_size"]))
    pictures = pictures.to(device_of(vision_tower), vision_tower.dtype)
    found: dict[int, Size] = {}

    def look(module: nn.Module, inputs: tuple, keywords: dict) -> None:
        for tensor in (*inputs, keywords.get("hidden_states")):
            if not isinstance(tensor, torch.Tensor) or tensor.ndim < 3 or tensor.shape[:-2].numel() % 2:
                continue
            halves = tensor.reshape(2, -1, *tensor.shape[-2:])
            is_place = (halves[0] != halves[1]).any(-1).any(0).nonzero().flatten().tolist()
            if is_place:
                found.setdefault(tensor.shape[-2], (is_place[0], tensor.shape[-2] - 1 - is_place[-1]))

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in vision_tower.modules()]
    try:
        with torch.no_grad(), in_mode(vision_tower):
            vision_tower(**tower_arguments(spec, pictures, {}), **spec["call_kwargs"])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _write(tower: nn.Module, old_tensors: dict, found: dict, way: tuple) -> None:
    """The resized tensors into their places."""
    tensors = tower.state_dict()
    for key, resized in found.items():
        own_way = () if isinstance(resized, PatchKernel) else (way[resized.is_of_offsets],)
        tensors[key].copy_(resized.resize(old_tensors[key], *own_way))


def _towers_own_way(
    old_tower: nn.Module, new_tower: nn.Module, new_spec: dict, old_tensors: dict, found: dict, size: Size
) -> tuple:
    """Resamplings of places and of offsets with which the new tower gives most nearly what the old one gives of pictures
    of the new size, if it takes them; else `None`, the usual ones."""
    usual = (None, None)
    try:
        old_spec = probe_vision_tower(old_tower, size)
    except Exception:  # noqa: BLE001 - a tower of one size may fail in any way
        return usual
    expected = _features(old_tower, old_spec)
    kinds = {table.is_of_offsets for table in found.values() if isinstance(table, PositionTable)}
    errors = {}
    for way in itertools.product(
        *(RESAMPLINGS if is_of_offsets in kinds else (None,) for is_of_offsets in (False, True))
    ):
        _write(new_tower, old_tensors, found, way)
        features = _features(new_tower, new_spec)
        if features.shape != expected.shape:
            return usual
        errors[way] = float((features - expected).square().mean())
        if errors[way] <= _ROUNDING**2 * float(expected.square().mean()):
            break
    return min(errors, key=errors.get)


def _features(tower: nn.Module, spec: dict) -> torch.Tensor:
    """Of two pictures, `(2, num_features, hidden_size)`, fp32."""
    pictures = synthetic_pictures(2, num_channels(tower.config), tuple(spec["image_size"]))
    pictures = pictures.to(device_of(tower), tower.dtype)
    with torch.no_grad(), in_mode(tower):
        raw_features = call_vision_tower(tower, spec, pictures)
    return torch.stack(read_features(raw_features, spec, image_grids(spec, pictures, {}))).float()


def _described(resized: PositionTable | PatchKernel, way: tuple) -> str:
    if isinstance(resized, PatchKernel):
        return resized.describe()
    return resized.describe(way[resized.is_of_offsets])
