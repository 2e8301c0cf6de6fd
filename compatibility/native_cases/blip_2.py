"""BLIP-2 and InstructBLIP, with one picture for each text, as they take them."""

from transformers import (
    BatchFeature,
    Blip2Config,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipProcessor,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from ..tiny_tokenizer import tiny_tokenizer
from . import NativeCase, case_tokenizer
from .llava import TEXT, VISION


QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": len(tiny_tokenizer()),
    "max_position_embeddings": 64,
}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 48, "pad_token_id": 1}

#: Without a placeholder: the processors put pictures before the text.
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


def _config(config_class: type[PreTrainedConfig], text_class: type[PreTrainedConfig], tied: bool) -> PreTrainedConfig:
    tokenizer = case_tokenizer("<image>")
    text = {**TEXT, "vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    if text_class is OPTConfig:
        text = {key: value for key, value in {**text, **_OPT}.items() if key in OPTConfig.__dataclass_fields__}
    return config_class(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config={**text_class(**text).to_dict()},
        num_query_tokens=5,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def _processor(config: PreTrainedConfig) -> Blip2Processor | InstructBlipProcessor:
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    tokenizer = case_tokenizer("<image>")
    if isinstance(config, InstructBlipConfig):
        qformer_tokenizer = tiny_tokenizer()
        qformer_tokenizer.padding_side = "right"
        processor = InstructBlipProcessor(image_processor, tokenizer, qformer_tokenizer, config.num_query_tokens)
    else:
        processor = Blip2Processor(image_processor, tokenizer, config.num_query_tokens)
    processor.chat_template = _TEMPLATE  # which these classes take no argument for
    return processor


def _with_positions(inputs: BatchFeature) -> BatchFeature:
    """In a batch, padding lies between the image tokens and the text. The native `forward` counts it as positions if the
    language model does not count by itself (opt does), while the native `generate` does not."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return BatchFeature({**inputs, "position_ids": positions})


CASES = (
    NativeCase("blip-2", lambda tied: _config(Blip2Config, OPTConfig, tied), _processor, max_images=1),
    NativeCase(
        "instructblip, opt", lambda tied: _config(InstructBlipConfig, OPTConfig, tied), _processor, max_images=1
    ),
    NativeCase(
        "instructblip, llama",
        lambda tied: _config(InstructBlipConfig, LlamaConfig, tied),
        _processor,
        max_images=1,
        oracle_inputs=_with_positions,
        note="positions without padding, as in its generate",
    ),
)
