"""Change a part of a trained model and keep most of what it knew."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from ..composition.arguments import typed
from ..composition.errors import CompositionError
from ..composition.parts import PartSource
from ..composition.running import synthetic_pictures
from ..composition.views import views_settings
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..processing.processing_anyvlm import AnyVlmProcessor
from .fitting import Fitting, Swapped, no_pictures
from .modality_gap import modality_gap_change
from .native_tower import native_views
from .part_changes import compare_parts, digest
from .picture_paths import PicturePath
from .recipe import recipe_after
from .report import SwapReport
from .same_tower import same_tower
from .text_swap import swap_language_model
from .vision_swap import fixed_size, swap_vision_tower


LAYERS = ("best", "last")
#: Pictures that the modality gap is measured with.
_GAP_PICTURES = 8
_TEXT_EMBEDDINGS = 2048


def swap(
    model: AnyVlmForConditionalGeneration,
    processor: AnyVlmProcessor,
    *,
    vision: PartSource | Sequence[PartSource] | None = None,
    text: PartSource | None = None,
    audio: PartSource | None = None,
    images: Any = None,
    texts: Sequence[str] | None = None,
    projector: str | dict | None = None,
    image_processor: BaseImageProcessor | str | Sequence | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    views: str | dict | None = None,
    image_tokens: str = "keep",
    vision_feature_layer: int | Sequence | str | None = None,
    vision_feature_select_strategy: str | Sequence[str] | None = None,
    vision_fusion: str = "channel",
    seconds: float | None = None,
    steps: int | None = None,
    num_pictures: int | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor, SwapReport]:
    """Put another vision tower, another language model, or both, into a trained model.

    What need not change does not: parts that stay are the same modules in the new model, bit for bit, and the old model
    stays whole beside it. With unlabelled pictures, the projector of a new tower is solved for in closed form so that it
    gives the tokens that the old path gave, and then trained for a short while to make the language model answer as before;
    that of a new language model is taught by the old model's answers.

    Args:
        model, processor: A composed model and its processor.
        vision: The new tower: a Hub id, a local path, a config (random weights) or a model instance; or a tuple of
            several.
        text: The new language model, likewise. Special tokens, chat template and generation defaults follow it.
        audio: Not supported yet; anything but `None` is refused.
        images: Unlabelled pictures, such as the model will see: a folder, a list of paths or pictures, or a dataset with a
            column `image`. A hundred are useful.
        texts: Questions such as users will ask about them. Default: plain ones.
        projector: Another projector than the model has, as for `compose`; then nothing of the old one is kept.
        image_processor: Instance, path or Hub id. Default: the new tower's.
        tokenizer: Instance, path or Hub id. Default: the new language model's.
        image_size: Pixels, one edge or `(height, width)`. Default: for a tower of the same type as before, otherwise
            what its image processor makes. Without `vision`, the model's own tower for pictures of this size.
        patch_size: Pixels along each edge of a patch: the model's own tower with its kernels resampled.
        views: How a picture is shown to the tower, as for `compose`. Default: in as many views as before. Without `vision`,
            the model's own tower with other views.
        image_tokens: `"keep"`: features are brought to the old tower's grid, so that a picture has as many tokens as the
            language model is used to. `"own"`: as many as the new tower has features for.
        vision_feature_layer: As for `compose`; or `"last"`; or `"best"`, the one whose features say most of what the old
            tower's said, tried on `images`. Default: for a tower of the same type as before, else with pictures the best.
        vision_feature_select_strategy, vision_fusion: As for `compose`. Default: for a tower of the same type as before.
        seconds: Time for training, by the clock; 0 for the closed form alone. Default, with pictures: 60 for a tower, 90 for
            a language model.
        steps: Steps of training; with these alone, the result does not depend on how fast the machine is.
        num_pictures: Look at so many of the pictures at most, a random sample.
        trust_remote_code: Allow parts whose code is in their own checkpoint.
        seed: For what is random.
        progress: Show progress bars.

    Returns:
        The new model, its processor, and a report of what was kept, solved, trained and initialised.

    Raises:
        CompositionError: the part cannot be used in this model; the message says why and what would.
        ValueError: nothing to swap, or arguments that do not go together.
    """
    keeps_tower = vision is None and any(setting is not None for setting in (image_size, patch_size, views))
    _check_arguments(model, processor, vision, text, audio, tokenizer, keeps_tower, patch_size)
    if images is None:
        no_pictures(texts, seconds, steps, num_pictures)
        fitting = None
    else:
        fitting = Fitting(images, texts, seconds, steps, num_pictures, seed, progress)
    started = time.monotonic()
    before = digest(model)
    projector_config = None if projector is None else typed(projector)
    old, new = (model, processor), (model, processor)
    swapped = [
        name for name, part in (("vision", vision is not None or keeps_tower), ("text", text is not None)) if part
    ]
    report = SwapReport(swapped=" and ".join(swapped))
    changes: dict[str, str] = {}
    notes: dict[str, str] = {}
    if keeps_tower:
        vision, said = same_tower(model, image_size, patch_size, views)
        if _is_native(views):
            views = native_views(views, model)
        # Its own layer is read, also where its class is another (NaFlex).
        if vision_feature_layer is None:
            vision_feature_layer = (
                "last" if model.config.vision_feature_layer is None else model.config.vision_feature_layer
            )
        vision_feature_select_strategy = vision_feature_select_strategy or model.config.vision_feature_select_strategy
        notes = dict(note.split(": ", 1) for note in said if ": " in note)
        image_processor = image_processor or processor.image_processor
        image_size = image_size or fixed_size(model, views)
    if vision is not None:
        put_in = functools.partial(
            swap_vision_tower,
            *old,
            projector=projector_config,
            image_processor=image_processor,
            image_size=image_size,
            views=views,
            image_tokens=image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_fusion=vision_fusion,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        new = _with_tower(old, put_in, vision, vision_feature_layer, fitting, report)
        changes |= {"vision_tower": "resized" if keeps_tower else "replaced", "multi_modal_projector": "initialised"}
        if fitting is not None:
            if fitting.align(old, new, projector is not None, report):
                changes["multi_modal_projector"] = "solved"
            if fitting.trains and fitting.distil(old, new, report):
                changes["multi_modal_projector"] = "trained"
    if text is not None:
        new = swap_language_model(
            *new,
            text,
            tokenizer=tokenizer,
            projector=projector_config if vision is None else None,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        changes |= {"language_model": "replaced", "multi_modal_projector": "initialised", "fusion": "initialised"}
        if fitting is not None and fitting.trains and fitting.teach(old, new, report):
            changes["multi_modal_projector"] = "trained"
    for when, (seen, its_processor) in (("old", old), ("new", new)):
        setattr(report, when, _described(seen, vision is not None, text is not None))
        report.tokens_per_picture = report.tokens_per_picture or {}
        report.tokens_per_picture["before" if when == "old" else "after"] = _tokens_per_picture(seen, its_processor)
    report.parts = compare_parts(before, new[0], changes)
    if report.modality_gap is None or text is not None:
        report.modality_gap = _modality_gap(PicturePath(*old), PicturePath(*new), seed)
    report.warnings += _warnings(report)
    for part in report.parts:
        if part["what"] == "resized":
            own = [note for name, note in notes.items() if part["name"].endswith(name)]
            part["note"] = "; ".join(own or [f"{name}: {note}" for name, note in notes.items()])
    report.recipe = recipe_after(report, new[0])
    report.next_steps = report.recipe["stages"]
    report.seconds = time.monotonic() - started
    return *new, report


def _with_tower(
    old: Swapped,
    put_in: Callable[..., Swapped],
    vision: PartSource | Sequence[PartSource],
    layer: int | Sequence | str | None,
    fitting: Fitting | None,
    report: SwapReport,
) -> Swapped:
    """The model with the new tower, of which the layer asked for is read.

    Raises:
        ValueError: a layer that is no such thing.
    """
    if isinstance(layer, str) and layer not in LAYERS:
        raise ValueError(f"Unknown vision_feature_layer {layer!r}. Pass a number, or one of: {', '.join(LAYERS)}.")
    if layer == "best" and fitting is None:
        raise ValueError('vision_feature_layer="best" is tried on pictures. Pass images=…, or the number of a layer.')
    several = isinstance(vision, (list, tuple))
    numbered = layer is not None and not isinstance(layer, str)
    if several or numbered or layer == "last" or fitting is None:
        return put_in(vision, vision_feature_layer=layer)
    new = put_in(vision)
    tower = new[0].vision_tower
    if layer is None and type(tower) is type(old[0].vision_tower):
        return new

    def reading(number: int | None) -> Swapped:
        # The same instance each time: it is loaded once.
        return put_in(tower, vision_feature_layer="last" if number is None else number)

    return reading(fitting.choose_layer(*old, reading, report))


def _check_arguments(
    model: Any, processor: Any, vision: Any, text: Any, audio: Any, tokenizer: Any, keeps_tower: bool, patch_size: Any
) -> None:
    if not isinstance(model, AnyVlmForConditionalGeneration):
        raise ValueError(
            f"A {type(model).__name__} is no composed model. Make one with anyvlm.compose, or of one that transformers has "
            "with anyvlm.from_native."
        )
    if not isinstance(processor, AnyVlmProcessor):
        raise ValueError(f"A {type(processor).__name__} is not the processor of a composed model. Pass its own.")
    if audio is not None:
        raise CompositionError("This model has no audio tower that could be swapped. Leave out audio=….")
    if vision is None and text is None and not keeps_tower:
        raise ValueError(
            "Nothing to swap. Pass vision=…, text=…, or both; or another image_size=… for the same tower."
        )
    if vision is not None and patch_size is not None:
        raise ValueError("patch_size=… is for the model's own tower. Leave out either that or vision=….")
    if text is None and tokenizer is not None:
        raise ValueError("tokenizer=… goes with another language model. Pass text=…, or leave it out.")


def _warnings(report: SwapReport) -> list[str]:
    """What to know before relying on the model."""
    new = [part["name"] for part in report.parts if part["what"] == "initialised" and "projector" in part["name"]]
    if not new:
        return []
    return [
        f"{', '.join(new)}: new and not fitted to anything, so answers about pictures mean nothing yet. Swap with "
        "images=… (unlabelled pictures), or train the projector."
    ]


def _described(model: AnyVlmForConditionalGeneration, vision: bool, text: bool) -> str:
    """Class and origin of the parts that are swapped."""
    origins = model.config.composed_from or {}
    named = []
    for key, part, is_swapped in (("vision", model.vision_tower, vision), ("text", model.language_model, text)):
        if is_swapped:
            origin = origins.get(key)
            ids = [entry.get("id") for entry in (origin if isinstance(origin, list) else [origin or {}])]
            known = " + ".join(found for found in ids if found)
            named.append(type(part).__name__ + (f" ({known})" if known else ""))
    return " and ".join(named)


def _is_native(views: str | dict | None) -> bool:
    return (views_settings(views) or {}).get("type") == "native"


def _tokens_per_picture(model: AnyVlmForConditionalGeneration, processor: AnyVlmProcessor) -> int:
    size = tuple(model.config.vision_tower_spec["image_size"])
    return processor._get_num_multimodal_tokens([size])["num_image_tokens"][0]


@torch.no_grad()
def _modality_gap(old: PicturePath, new: PicturePath, seed: int) -> dict[str, Any]:
    pixels = synthetic_pictures(_GAP_PICTURES, 3, (224, 224), seed)
    pixels = ((pixels + 2) * 64).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(picture) for picture in pixels]
    measured = []
    for path in (old, new):
        embeddings = path.model.get_input_embeddings()
        rows = torch.linspace(0, embeddings.weight.shape[0] - 1, _TEXT_EMBEDDINGS).long().unique()
        texts = embeddings(rows.to(embeddings.weight.device).unsqueeze(0))[0]
        tokens = torch.cat(path.tokens(path.inputs(pictures)))
        if tokens.shape[-1] != texts.shape[-1]:  # a fusion that maps tokens itself
            return None
        measured.append((tokens.float(), texts.float()))
    return modality_gap_change(*measured)
