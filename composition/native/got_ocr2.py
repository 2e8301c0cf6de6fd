"""GOT-OCR 2.0 (Wei et al. 2024): a tower of windows, two convolutions and a matrix, one view of a page."""

from typing import Any

from transformers import GotOcr2Config, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from ..errors import CompositionError
from .conditions import plain_embedding, require_text
from .dynamic_tiles import for_cut_views, for_whole_pictures
from .family import NativeFamily, require
from .keys import Rename
from .pieces import read_parts, tokens_of_a_view, write_parts
from .projector_arguments import same_projector


_PROJECTOR = {"type": "conv", "num_convs": 2}

#: Tokens that the native processor writes for a view unless told otherwise.
_TOKENS = 256


def _read_config(native: GotOcr2Config) -> dict[str, Any]:
    return {
        **read_parts(native),
        "projector_config": dict(_PROJECTOR),
        "image_token_id": native.image_token_index,
        "image_size": (native.vision_config.image_size,) * 2,
    }


def _write_config(config: AnyVlmConfig) -> GotOcr2Config:
    require(
        *plain_embedding(config),
        *same_projector(config.projector_config, _PROJECTOR),
        (config.vision_config.model_type == "got_ocr2_vision", "its tower is got_ocr2_vision"),
        (config.vision_feature_layer is None, "it reads the last map of its tower"),
    )
    return GotOcr2Config(
        **write_parts(config),
        image_token_index=config.image_token_id,
        image_seq_length=tokens_of_a_view(config),
    )


def _rules(native: GotOcr2Config) -> list[Rename]:
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename("model.multi_modal_projector.conv_upsampler1.", "multi_modal_projector.convs.0."),
        Rename("model.multi_modal_projector.conv_upsampler2.", "multi_modal_projector.convs.1."),
        Rename("model.multi_modal_projector.multimodal_projector.", "multi_modal_projector.linear."),
    ]


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    """Cutting a page into tiles is asked for with each call there; what it does unasked is one view."""
    # In transformers 5.20 the number is a default of its call and no attribute.
    written = getattr(native, "num_image_tokens", _TOKENS)
    if written != tokens_of_a_view(config):
        raise CompositionError(
            f"The processor writes {written} tokens for a view, of which the model makes {tokens_of_a_view(config)}. Set "
            "processor.num_image_tokens to that."
        )
    return {"image_processor": for_cut_views(native.image_processor), "image_token": native.image_token}


def _write_processor(processor: AnyVlmProcessor, native: GotOcr2Config, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, {}, processor.image_token == "<imgpad>")
    tokens = tokens_of_a_view(config)
    require((tokens == _TOKENS, f"its processor writes {_TOKENS} tokens for a view, not {tokens}"))
    return {"image_processor": for_whole_pictures(processor, False)}


FAMILIES = (
    NativeFamily(
        model_type="got_ocr2",
        model_class="GotOcr2ForConditionalGeneration",
        processor_class="GotOcr2Processor",
        read_config=_read_config,
        write_config=_write_config,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
    ),
)
