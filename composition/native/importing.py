"""From a model of a native class of transformers to one of ours, around the same tensors."""

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...modeling.language_models import build_language_model
from ...modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ...modeling.vision_towers import build_vision_tower
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..assembly import assemble
from ..errors import CompositionError
from ..image_processors import config_size, output_size
from ..language_model_probe import probe_generation, probe_language_model
from ..model_sizes import embedding_width
from ..parts import source_name
from ..probe import probe_vision_tower
from ..projector_grid import complete_projector
from .equality import compare_on_a_sample
from .families import family_of
from .family import NativeFamily
from .keys import OURS
from .logits import remove_scales, removed_scales, require_plain
from .weights import build_empty, language_model_rules, put_weights, translate


@torch.no_grad()
def from_native(
    model: PreTrainedModel, processor: ProcessorMixin
) -> tuple[AnyVlmForConditionalGeneration, AnyVlmProcessor]:
    """Make a model of transformers' own vision-language classes one of ours, with the processor that goes with it.

    Nothing is trained and nothing copied: both models hold the same tensors afterwards, so go on with one of them.
    Before it is returned, the new model is run beside the native one on a picture with a text.

    Args:
        model: Such as a `LlavaForConditionalGeneration`; with its language modeling head.
        processor: Its processor.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        CompositionError: its family cannot be converted, weights are left over or missing (the message names them), or
            the two models differ.
    """
    family = family_of(model.config)
    _check_whole(model, family)
    pieces = read_pieces(family, model.config, processor, model.dtype)
    size = picture_size(pieces, processor)
    vision_tower = build_empty(lambda: build_vision_tower(pieces["vision_config"]))
    language_model = build_empty(lambda: build_language_model(pieces["text_config"]))
    rules = [*family.rules(model.config), *language_model_rules(family, language_model)]
    tensors = translate(model, rules, OURS)
    put_weights(vision_tower, tensors.part("vision_tower."), "the vision tower")
    put_weights(language_model, tensors.part("language_model."), "the language model")
    language_model.generation_config = copy.deepcopy(model.generation_config)
    if family.plain_logits:
        require_plain(language_model, family.model_class)

    spec = probe_vision_tower(
        vision_tower, size, pieces.get("vision_feature_layer"), pieces.get("vision_feature_select_strategy", "default")
    )
    config = our_config(
        family,
        model.config,
        {**pieces, "vision_config": vision_tower.config, "text_config": language_model.config},
        spec,
        probe_language_model(language_model),
        embedding_width(language_model),
        model.dtype,
        source_name(model),
    )
    ours = assemble(config, vision_tower, language_model)
    put_weights(ours, tensors, type(ours).__name__)
    ours.learn_about_language_model(probe_generation(ours))
    our_processor = processor_from_native(family, processor, config)
    compare_on_a_sample(family, model, processor, ours.eval(), our_processor)
    return ours, our_processor


def read_pieces(
    family: NativeFamily, native_config: PreTrainedConfig, processor: ProcessorMixin, dtype: torch.dtype
) -> dict[str, Any]:
    """What the family reads from the native config and processor, the parts' configs as the native model has them."""
    pieces = family.read_config(native_config)
    pieces.setdefault("image_token_id", getattr(processor, "image_token_id", None))
    if family.read_views is not None:
        pieces["image_views"] = family.read_views(native_config, processor)
    for key in ("vision_config", "text_config"):
        # Attention is computed as in the native model.
        pieces[key]._attn_implementation = getattr(native_config, key, native_config)._attn_implementation
        pieces[key].dtype = dtype
    if family.plain_logits:
        remove_scales(pieces["text_config"])
    return pieces


def our_config(
    family: NativeFamily,
    native_config: PreTrainedConfig,
    pieces: dict,
    vision_tower_spec: dict,
    language_model_spec: dict,
    width: int,
    dtype: torch.dtype,
    hub_id: str | None,
) -> AnyVlmConfig:
    """The config of the converted model, from what the family reads and what was measured.

    Args:
        width: Of the language model's embeddings.
    """
    spec = family.adjust_spec(native_config, vision_tower_spec)
    pieces = {key: copy.deepcopy(value) for key, value in pieces.items() if key != "image_size"}
    pieces["projector_config"] = complete_projector(
        pieces["projector_config"], spec["hidden_size"], width, pieces.get("fusion", "embed")
    )
    for key in ("vision_config", "text_config"):
        pieces[key].dtype = dtype
        pieces[key].name_or_path = ""
    origin = {"id": hub_id, "license": None, "model_type": family.model_type}
    scales = removed_scales(native_config.text_config, pieces["text_config"]) if family.plain_logits else None
    return AnyVlmConfig(
        vision_tower_spec=spec,
        language_model_spec=language_model_spec,
        composed_from={"native": origin | ({"text_scales": scales} if scales else {})},
        architectures=["AnyVlmForConditionalGeneration"],
        dtype=dtype,
        **pieces,
    )


def processor_from_native(family: NativeFamily, processor: ProcessorMixin, config: AnyVlmConfig) -> AnyVlmProcessor:
    """Our processor around the native one's image processor and tokenizer, copies of which it takes."""
    arguments = {
        "image_processor": copy.deepcopy(processor.image_processor),
        "tokenizer": copy.deepcopy(processor.tokenizer),
        "chat_template": processor.chat_template,
        "vision_tower_spec": config.vision_tower_spec,
        "projector_config": config.projector_config,
        "image_views": config.image_views,
        "fusion": config.fusion,
        **family.read_processor(processor, config),
    }
    return AnyVlmProcessor(**arguments)


def picture_size(pieces: dict, processor: ProcessorMixin) -> tuple[int, int]:
    """Height and width of the pictures that the tower gets; an example of them where their size is free.

    Raises:
        CompositionError: neither the family, nor the processor, nor the tower's config tells.
    """
    size = pieces.get("image_size") or (pieces.get("image_views") or {}).get("view_size")
    size = size or output_size(processor.image_processor) or config_size(pieces["vision_config"])
    if size is None:
        raise CompositionError(
            f"{type(processor).__name__} makes pictures of several sizes, and the tower's config states none. Set the "
            "image processor to one size."
        )
    return tuple(size)


def _check_whole(model: PreTrainedModel, family: NativeFamily) -> None:
    if not isinstance(model, getattr(transformers, family.model_class)):
        raise CompositionError(
            f"{type(model).__name__} is not the class with a language modeling head. Load the checkpoint with "
            f"{family.model_class}."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise CompositionError(
            "The model's weights are quantized, which the conversion would have to undo. Load it without "
            "quantization, convert it, and quantize the result."
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or model.device.type == "meta":
        raise CompositionError(
            "The model is spread over several devices. Load it on one (without device_map), or convert the checkpoint "
            "itself, which takes the memory of one of its files: anyvlm convert SRC DST."
        )
