"""PaliGemma (Beyer et al. 2024) and PaliGemma 2 (Steiner et al. 2024): a siglip tower, one linear map, and a prompt all of
which sees all of it."""

import copy
import math
from typing import Any

from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, PreTrainedConfig, ProcessorMixin

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .conditions import require_text, square_tower
from .family import NativeFamily, require
from .keys import Rename
from .pieces import text_part
from .projector_arguments import same_projector


#: Its checkpoints come without a chat template: a prompt is pictures, `<bos>`, words and a line end, and then the answer.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is not string %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image-token>{% endif %}{% endfor %}{% endif %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def _read(native: PaliGemmaConfig) -> dict[str, Any]:
    text_config = text_part(native)
    # Says that there is no causal mask to fall back on; here the masks are made by `image_attention`, and text is causal.
    text_config.use_bidirectional_attention = None
    return {
        "vision_config": copy.deepcopy(native.vision_config),
        "text_config": text_config,
        "projector_config": {"type": "linear"},
        "image_token_id": native.image_token_id,
        "image_attention": "prefix",
        "image_size": (native.vision_config.image_size,) * 2,
    }


def _write(config: AnyVlmConfig) -> PaliGemmaConfig:
    text_config = copy.deepcopy(config.text_config)
    require(
        (config.fusion == "embed", f"fusion is {config.fusion!r}, not 'embed'"),
        (config.image_attention == "prefix", f"image_attention is {config.image_attention!r}, not 'prefix'"),
        (config.image_views is None or config.image_views["type"] == "resize", "a picture becomes several views"),
        (isinstance(text_config, (GemmaConfig, Gemma2Config)), "its language model is gemma or gemma2"),
        (config.vision_feature_layer is None, "it reads the last hidden state of its tower"),
        *square_tower(config, ((0, 0),)),
        *same_projector(config.projector_config, {"type": "linear"}),
    )
    return PaliGemmaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=text_config,
        image_token_index=config.image_token_id,
        projection_dim=text_config.hidden_size,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )


def _rules(native: PreTrainedConfig) -> list[Rename]:
    return [
        Rename("model.vision_tower.", "vision_tower."),
        Rename("model.multi_modal_projector.linear.", "multi_modal_projector.linear."),
    ]


def _prompt_form(tokenizer) -> dict[str, str]:
    return {"after_images": tokenizer.bos_token, "end": "\n"}


def _read_processor(native: ProcessorMixin, config: AnyVlmConfig) -> dict[str, Any]:
    chat_template = native.chat_template or _CHAT_TEMPLATE.replace("<image-token>", native.image_token)
    return {
        "image_token": native.image_token,
        "chat_template": chat_template,
        "prompt_form": _prompt_form(native.tokenizer),
    }


def _write_processor(processor: AnyVlmProcessor, native: PreTrainedConfig, config: AnyVlmConfig) -> dict[str, Any]:
    require_text(processor, {}, processor.image_token == "<image>")
    form = _prompt_form(processor.tokenizer)
    require((processor.prompt_form == form, f"its processor completes prompts, prompt_form {form}"))
    image_processor = copy.deepcopy(processor.image_processor)
    image_processor.image_seq_length = math.prod(config.vision_tower_spec["grid"])
    return {"image_processor": image_processor}


FAMILIES = (
    NativeFamily(
        model_type="paligemma",
        model_class="PaliGemmaForConditionalGeneration",
        processor_class="PaliGemmaProcessor",
        read_config=_read,
        write_config=_write,
        rules=_rules,
        read_processor=_read_processor,
        write_processor=_write_processor,
        plain_logits=False,  # it caps them as gemma2 does
    ),
)
