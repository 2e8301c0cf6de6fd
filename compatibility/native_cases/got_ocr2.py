"""GOT-OCR 2.0. Its processor writes 256 tokens for each picture, whatever the model makes, so the tower has many patches."""

from transformers import GotOcr2Config, GotOcr2ImageProcessorPil, GotOcr2Processor, GotOcr2VisionConfig, Qwen2Config

from . import NativeCase, case_tokenizer, chat_template
from .llava import TEXT


TOKENS = ("<imgpad>", "<img>", "</img>", "<|im_start|>", "<|im_end|>")


class OnePageGotOcr2Processor(GotOcr2Processor):
    """Takes pictures in a list for each text, as other processors do; here such a list is the pages of one document."""

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        if isinstance(images[0], list):
            images = [picture for pictures in images for picture in pictures]
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)


def _config(tied: bool) -> GotOcr2Config:
    tokenizer = case_tokenizer(*TOKENS)
    return GotOcr2Config(
        vision_config=GotOcr2VisionConfig(
            hidden_size=16,
            output_channels=8,
            mlp_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=256,
            patch_size=4,
            window_size=14,
            global_attn_indexes=[],
        ),
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied),
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        tie_word_embeddings=tied,
    )


def _processor(config: GotOcr2Config) -> GotOcr2Processor:
    edge = config.vision_config.image_size
    return OnePageGotOcr2Processor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": edge, "width": edge}),
        tokenizer=case_tokenizer(*TOKENS),
        chat_template=chat_template("<img><imgpad></img>"),
    )


CASES = (NativeCase("got_ocr2", _config, _processor, max_images=1),)
