"""Tiny sources on disk, and the model composed of them, for tests of `anyvlm verify`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_parts import VOCABULARY, make_sensitive, text_config, tiny_tokenizer, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor, PreTrainedTokenizerFast

import anyvlm


CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- ('User: ' if message.role == 'user' else 'Assistant: ') + message.content "
    "+ eos_token + '\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


@dataclass
class Sources:
    """Folders of a vision tower with its image processor, a language model with its tokenizer, and both composed."""

    tower: Path
    language_model: Path
    checkpoint: Path

    @property
    def both(self) -> list[Path]:
        return [self.language_model, self.tower]


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the tiny tokenizer under other ids."""
    words = [*VOCABULARY[:4], *reversed(VOCABULARY[4:])]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_language_model(
    folder: Path,
    model_type: str = "llama",
    seed: int = 1,
    tokenizer: PreTrainedTokenizerFast | None = None,
    chat_template: str = CHAT_TEMPLATE,
) -> Path:
    torch.manual_seed(seed)
    language_model = AutoModelForCausalLM.from_config(text_config(model_type)).eval()
    make_sensitive(language_model, seed)
    language_model.save_pretrained(folder)
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(folder: Path, model_type: str = "clip_vision_model", seed: int = 2) -> Path:
    torch.manual_seed(seed)
    tower = AutoModel.from_config(vision_config(model_type)).eval()
    make_sensitive(tower, seed)
    tower.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_composed(folder: Path, vision, text, **kwargs) -> Path:
    for part in anyvlm.compose(vision, text, **kwargs):
        part.save_pretrained(folder)
    return folder


def make_sources(folder: Path) -> Sources:
    tower, language_model = save_tower(folder / "tower"), save_language_model(folder / "language_model")
    return Sources(tower, language_model, save_composed(folder / "composed", tower, language_model))
