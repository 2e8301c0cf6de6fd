"""Step "vision tower": it sees the pictures that its source sees, and gives its source's features."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from ..composition.probe import probe_vision_tower
from ..configuration.image_tokens import image_grids
from ..configuration.image_views import has_planned_views
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..modeling.vision_towers import call_vision_tower, read_features
from ..processing.image_outputs import image_outputs
from ..processing.prepared_views import patch_keys
from .verification_checks import (
    SAME_SHAPES,
    Check,
    CheckFailed,
    Finding,
    NotChecked,
    Subject,
    agree,
    agree_unless_trained,
    compare_weights,
    report_weights,
)


#: Pure and mixed colours: what an image processor makes of a picture of one colour does not depend on its size, but on mean,
#: deviation, scale and the order of the channels.
_COLOURS = ((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (100, 150, 200))

#: A 256th of the range of a colour, after normalisation by a deviation of about 0.25.
_COLOUR_TOLERANCE = 0.016


def check_colours(subject: Subject) -> Finding:
    """Mean, deviation, scale and order of the channels are those of the source's image processor."""
    pictures = [Image.new("RGB", (64, 64), colour) for colour in _COLOURS]
    largest = 0.0
    for index, (own, other) in enumerate(_image_processors(subject)):
        found, expected = [_colours(processor, pictures) for processor in (own, other)]
        if found[0].shape != expected[0].shape:  # patches here and pictures there: in what order is not comparable
            found, expected = ([values.unique() for values in each] for each in (found, expected))
        if [len(values) for values in found] != [len(values) for values in expected]:
            raise NotChecked("the two image processors make inputs of different forms")
        for colour, mine, theirs in zip(_COLOURS, found, expected):
            difference = float((mine - theirs).abs().max())
            largest = max(largest, difference)
            if not difference <= _COLOUR_TOLERANCE:
                raise CheckFailed(
                    f"A picture of the colour {colour} becomes {_rounded(mine)}, and for its source {_rounded(theirs)}"
                    + (f" (tower {index})." if len(subject.towers) > 1 else "."),
                    {"max_difference": difference, "settings": _settings(own), "source_settings": _settings(other)},
                    _COLOUR_TOLERANCE,
                    "one step of 8-bit colour",
                )
    return Finding(
        "Colours reach the tower as they reach its source.",
        {"max_difference": largest},
        _COLOUR_TOLERANCE,
        "one step of 8-bit colour",
    )


def check_pixels(subject: Subject) -> Finding:
    """Size, crop and interpolation are those of the source's image processor, where the model shows pictures of its size."""
    if has_planned_views(subject.config.image_views):
        raise NotChecked("the model cuts or sizes pictures itself before the image processor")
    worst, compared = 0.0, []
    for own, other in _image_processors(subject):
        found, expected = ([_pixels(processor, picture) for picture in subject.pictures] for processor in (own, other))
        shapes = [sorted({tuple(each.shape[-2:]) for each in pictures}) for pictures in (found, expected)]
        if shapes[0] != shapes[1]:
            subject.notes.append(
                f"Pictures reach the tower as {_sizes(shapes[0])} pixels, and its source by itself as "
                f"{_sizes(shapes[1])}. That is as composed with image_size=…; otherwise the image processor is "
                "another tower's."
            )
            continue
        compared.append(shapes[0])
        for mine, theirs in zip(found, expected):
            difference = float((mine - theirs).square().mean().sqrt() / theirs.std().clamp(min=1e-6))
            worst = max(worst, difference)
    if not compared:
        raise NotChecked("the model shows pictures in another size than its source")
    reason = "RMS over the deviation of the pixels; backends of one image processor differ by a step of 8-bit colour"
    if not worst <= 0.05:
        raise CheckFailed(
            f"Pixels differ from those that its source sees by {worst:.2g} of their deviation: another crop or "
            "interpolation.",
            {"relative_difference": worst},
            0.05,
            reason,
        )
    return Finding("Pixels are those that its source sees.", {"relative_difference": worst}, 0.05, reason)


def check_weights(subject: Subject) -> Finding:
    findings = []
    for index, tower in enumerate(subject.towers):
        source = subject.source_vision_tower(index)
        # Of heads that no feature goes through, a source may have none.
        reads_pooler = _specs(subject)[index]["output"] == "pooler_output"
        comparison = compare_weights(tower, source, () if reads_pooler else ("pooler.", "head."))
        name = subject.sources.vision[index].name
        findings.append(report_weights(comparison, name, "vision_tower" in subject.trained))
    return Finding(" ".join(each.detail for each in findings), findings[0].figures, findings[0].tolerance)


def check_layer(subject: Subject) -> Finding:
    """The layer and the tokens that are read are those of the model it was before."""
    if subject.sources.composed not in subject.sources.vision or subject.sources.composed is None:
        raise NotChecked("no composed model with this tower was given, which alone says what is to be read")
    before = subject.sources.composed_model()[0].config
    for key in ("vision_feature_layer", "vision_feature_select_strategy"):
        own, other = getattr(subject.config, key), getattr(before, key)
        if own != other:
            raise CheckFailed(f"{key} is {own!r}, and was {other!r}.", {key: [own, other]})
    return Finding(f"vision_feature_layer is {subject.config.vision_feature_layer!r}, as it was.")


@torch.no_grad()
def check_features(subject: Subject) -> Finding:
    """The tower as the model calls and reads it, against its source as running that anew shows how to, on the same
    pixels. One that was trained is read as running it anew shows, and what it gives may differ from its source's."""
    inputs = dict(subject.image_inputs)
    extras = {key: inputs[key] for key in patch_keys(subject.config.vision_tower_spec) if key in inputs}
    details = []
    for index, pixels in enumerate(_pixels_of_towers(subject, inputs["pixel_values"])):
        tower, source = subject.towers[index], subject.source_vision_tower(index)
        spec, layer = _specs(subject)[index], _layers(subject)[index]
        found = _features(tower, spec, layer, pixels, extras)
        others = [(source, subject.sources.vision[index].name)]
        if "vision_tower" in subject.trained:
            others = others if _shapes(tower) == _shapes(source) else []  # else made for pictures of another size
            others.insert(0, (tower, "the tower itself, measured anew"))
        for other, than in others:
            expected = _features(other, _measured_spec(subject, other, spec, layer), layer, pixels, extras)
            if expected.shape != found.shape:
                raise CheckFailed(
                    f"As vision_tower_spec says how to read it, the tower gives {len(found)} features of "
                    f"{len(subject.pictures)} pictures; {than} gives {len(expected)}.",
                    {"features": list(found.shape), "source_features": list(expected.shape)},
                )
            details.append(_compared(subject, found, expected, than, other is tower))
    first = details[-1]
    return Finding(
        " ".join(detail.detail for detail in details), first.figures, first.tolerance, first.tolerance_reason
    )


def _compared(subject: Subject, found: torch.Tensor, expected: torch.Tensor, than: str, is_own: bool) -> Finding:
    if is_own:
        return agree(found, expected, subject.model.dtype, SAME_SHAPES, "Features", than)
    return agree_unless_trained(subject, "vision_tower", found, expected, "Features", than)


def _measured_spec(subject: Subject, tower: nn.Module, spec: dict, layer) -> dict:
    """How a tower is called and read, measured anew for pictures of the size that `spec` says."""
    fused = isinstance(subject.model.vision_tower, FusedVisionTowers)
    # Of several towers each has its own strategy, and only its spec tells which.
    strategies = ("default", "full") if fused else (subject.config.vision_feature_select_strategy,)
    measured = [probe_vision_tower(tower, tuple(spec["image_size"]), layer, strategy) for strategy in strategies]
    own = next((each for each in measured if each["grid"] == spec["grid"]), measured[0])
    chosen = [key for key in ("inputs", "call_kwargs") if own[key] != spec[key]]
    if chosen:  # pictures of their own size, or as the class of an imported model calls it
        subject.notes.append(
            "The tower is called otherwise than by itself, and so was its source: "
            + ", ".join(f"{key} is {spec[key]!r}, not {own[key]!r}" for key in chosen)
            + "."
        )
        return spec
    return own


def _shapes(tower: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tower.state_dict().items()}


def _features(tower: nn.Module, spec: dict, layer, pixels: torch.Tensor, extras: dict) -> torch.Tensor:
    """Features of all pictures `(all features, width)`."""
    raw_features = call_vision_tower(tower, spec, pixels.to(tower.dtype), layer, extras)
    return torch.cat(read_features(raw_features, spec, image_grids(spec, pixels, extras)))


def _specs(subject: Subject) -> list[dict]:
    fused = isinstance(subject.model.vision_tower, FusedVisionTowers)
    return subject.config.vision_config.tower_specs if fused else [subject.config.vision_tower_spec]


def _layers(subject: Subject) -> list:
    fused = isinstance(subject.model.vision_tower, FusedVisionTowers)
    return subject.config.vision_config.vision_feature_layers if fused else [subject.config.vision_feature_layer]


def _pixels_of_towers(subject: Subject, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """What each tower sees, as `FusedVisionTowers` cuts it out."""
    if not isinstance(subject.model.vision_tower, FusedVisionTowers):
        return [pixel_values]
    vision_config = subject.config.vision_config
    cut = []
    for pixels, spec in zip(pixel_values.split(vision_config.tower_channels, dim=1), vision_config.tower_specs):
        height, width = spec["image_size"]
        cut.append(pixels[:, :, :height, :width].contiguous())
    return cut


def _image_processors(subject: Subject) -> list[tuple[BaseImageProcessor, BaseImageProcessor]]:
    """The model's image processor and its source's, for each tower of which the source has one."""
    own = subject.processor.image_processor
    own = own.image_processors if len(subject.towers) > 1 else [own]
    pairs = [(mine, subject.sources.source_image_processor(index)) for index, mine in enumerate(own)]
    pairs = [(mine, theirs) for mine, theirs in pairs if theirs is not None]
    if not pairs:
        raise NotChecked("no source came with an image processor that can be loaded")
    return pairs


def _colours(processor: BaseImageProcessor, pictures: list[Image.Image]) -> list[torch.Tensor]:
    """What pictures of one colour become: a value for each channel, or for patches the values that they have."""
    values = []
    for picture in pictures:
        pixels = _pixels(processor, picture)
        middle = pixels[0, :, pixels.shape[-2] // 2, pixels.shape[-1] // 2] if pixels.ndim == 4 else None
        values.append(pixels.mul(1000).round().div(1000).unique() if middle is None else middle)
    return values


def _pixels(processor: BaseImageProcessor, picture: Image.Image) -> torch.Tensor:
    try:
        outputs = image_outputs(processor, [picture], return_tensors="np")
        return torch.from_numpy(np.asarray(outputs["pixel_values"], dtype=np.float32))
    except Exception as error:
        raise NotChecked(
            f"{type(processor).__name__} does not take a plain picture ({type(error).__name__}: {error})"
        ) from error


def _settings(processor: BaseImageProcessor) -> dict:
    keys = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample", "do_convert_rgb")
    return {key: value for key in keys if (value := processor.to_dict().get(key)) is not None}


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _sizes(shapes: list[tuple[int, int]]) -> str:
    return " or ".join(f"{height}x{width}" for height, width in shapes[:3])


CHECKS = (
    Check(
        "colours",
        check_colours,
        "Give the model its tower's image processor: processor.image_processor = "
        "AutoImageProcessor.from_pretrained(SOURCE), with the size that the model was composed for, or compose or "
        "swap again, which does it.",
    ),
    Check(
        "pixels",
        check_pixels,
        "Give the model its tower's image processor, or compose or swap again without image_processor=….",
    ),
    Check(
        "weights",
        check_weights,
        "If it was trained or resized on purpose, say so (--trained vision_tower). Otherwise it was trained or "
        "changed by mistake, or this is not its source: put the source's weights back (anyvlm.swap(…, "
        "vision=SOURCE)), and freeze it while training.",
    ),
    Check(
        "layer",
        check_layer,
        "The projector was trained for features of another layer: set the value back in config.json, or train the "
        "projector.",
    ),
    Check(
        "features",
        check_features,
        "The weights are the source's, so what the config says about the tower (vision_config, vision_tower_spec) or "
        "the size of the pictures is not: swap the tower in with anyvlm.swap, which measures it, not by assigning the "
        "module.",
    ),
)
