"""The processor of Idefics: pictures of one size, its own marks around them in the text, and bos before it."""

import re
from typing import Any

from PIL import Image
from transformers import BatchFeature, IdeficsConfig, IdeficsImageProcessorPil, IdeficsProcessor, ViTImageProcessorPil

from ...configuration.configuration_anyvlm import AnyVlmConfig
from ...processing.processing_anyvlm import AnyVlmProcessor
from .family import require


IMAGE, FAKE, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"

#: As the instruct checkpoints were taught. Neighbouring pictures share the token between them.
_TEMPLATE = """\
{{- bos_token -}}
{%- set last = namespace(image=false) -%}
{%- macro write(content) -%}
  {%- set last.image = false -%}
  {%- if content is string -%}{{- ' ' ~ content | trim -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}
        {{- '' if last.image else '<fake_token_around_image>' -}}
        {{- '<image><fake_token_around_image>' -}}
        {%- set last.image = true -%}
      {%- else -%}
        {{- (part.text | trim) if last.image else (' ' ~ part.text | trim) -}}
        {%- set last.image = false -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- 'Assistant:' -}}{%- generation -%}{{- write(message.content) ~ '<end>' -}}{%- endgeneration -%}{{- '\\n' -}}
  {%- else -%}
    {{- message.role | capitalize ~ ':' ~ write(message.content) ~ '<end>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""


def read_processor(native: IdeficsProcessor, config: AnyVlmConfig) -> dict[str, Any]:
    """Its image processor returns a bare tensor, so a plain one that makes the same of a picture takes its place."""
    pictures = native.image_processor
    end = END if END in native.tokenizer.get_vocab() else ""
    return {
        "image_token": IMAGE,
        "image_processor": ViTImageProcessorPil(
            size={"height": pictures.size["height"], "width": pictures.size["width"]},
            resample=pictures.resample,
            image_mean=list(pictures.image_mean),
            image_std=list(pictures.image_std),
        ),
        "chat_template": native.chat_template or _TEMPLATE.replace("<end>", end),
    }


def write_processor(processor: AnyVlmProcessor, native: IdeficsConfig, config: AnyVlmConfig) -> dict[str, Any]:
    pictures, tokenizer = processor.image_processor, processor.tokenizer
    known = tokenizer.get_vocab()
    require(
        (processor.image_token == IMAGE, f"its image token is {IMAGE!r}, not {processor.image_token!r}"),
        (FAKE in known, f"its tokenizer knows {FAKE!r}, which stands around pictures"),
        (not getattr(pictures, "do_center_crop", False), "its image processor crops nothing"),
        (bool(pictures.do_resize and pictures.do_normalize), "its image processor resizes and normalises"),
        (
            int(pictures.resample) == int(Image.Resampling.BICUBIC),
            "its image processor resizes by bicubic interpolation",
        ),
    )
    return {
        "image_processor": IdeficsImageProcessorPil(
            image_size=native.vision_config.image_size,
            image_mean=list(pictures.image_mean),
            image_std=list(pictures.image_std),
        ),
        "image_size": native.vision_config.image_size,
    }


def call_processor(processor: IdeficsProcessor, texts: list[str], pictures: list, **settings) -> BatchFeature:
    """It takes words and pictures in turn, and writes bos and the tokens around pictures itself. (Called with `text` and
    `images`, it would put the pictures behind the text.)"""
    prompts = []
    for text, own in zip(texts, pictures, strict=True):
        words = re.split(f"(?:{FAKE})?{IMAGE}{FAKE}", text.removeprefix(processor.tokenizer.bos_token))
        remaining = iter(own if isinstance(own, (list, tuple)) else [own])
        prompt = [words[0]]
        for after in words[1:]:
            prompt += [next(remaining), *([after] if after else [])]
        prompts.append(prompt)
    return processor(text=prompts, **settings)
