"""A tower and a language model that transformers does not have yet: registered, they compose without a change here."""

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

import anyvlm
from anyvlm.compatibility.composed_model import ComposedModel


class RingsConfig(PreTrainedConfig):
    """A tower with its own names: no `hidden_size`, no `image_size`, three tokens that are no patches at the end."""

    model_type = "rings"
    channels: int = 24
    cell: int = 8
    num_summaries: int = 3


class RingsModel(PreTrainedModel):
    config_class = RingsConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.cells = nn.Conv2d(3, config.channels, config.cell, config.cell)
        self.summaries = nn.Parameter(torch.randn(config.num_summaries, config.channels))
        self.mix = nn.TransformerEncoderLayer(config.channels, 2, 32, batch_first=True, dropout=0.0)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=False, return_dict=True):
        cells = self.cells(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([cells, self.summaries.expand(len(cells), -1, -1)], dim=1)
        mixed = self.mix(tokens)
        return BaseModelOutput(mixed, hidden_states=(tokens, mixed) if output_hidden_states else None)


class EchoConfig(PreTrainedConfig):
    """A language model with names of its own, which multiplies its embeddings when it gets ids, and has no cache."""

    model_type = "echo"
    words: int = 90
    wide: int = 32
    stretch: float = 3.0
    num_hidden_layers: int = 1
    attribute_map = {"vocab_size": "words", "hidden_size": "wide"}


class EchoForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = EchoConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.words, config.wide)
        self.memory = nn.Linear(config.wide, config.wide)
        self.out = nn.Linear(config.wide, config.words)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def set_input_embeddings(self, value):
        self.table = value

    def get_output_embeddings(self):
        return self.out

    def set_output_embeddings(self, value):
        self.out = value

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.table(input_ids) * self.config.stretch
        mask = torch.ones(inputs_embeds.shape[:2]) if attention_mask is None else attention_mask
        weights = mask[:, :, None].to(inputs_embeds)
        # Each place sees the mean of the places before it and its own word.
        mean = (inputs_embeds * weights).cumsum(1) / weights.cumsum(1).clamp(min=1)
        logits = self.out(torch.tanh(self.memory(mean) + inputs_embeds))
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(inputs_embeds,))


@pytest.fixture(scope="module", autouse=True)
def registered():
    AutoConfig.register("rings", RingsConfig)
    AutoModel.register(RingsConfig, RingsModel)
    AutoConfig.register("echo", EchoConfig)
    AutoModelForCausalLM.register(EchoConfig, EchoForCausalLM)
    yield
    for mapping in (AutoModel._model_mapping, AutoModelForCausalLM._model_mapping):
        mapping._extra_content.pop(RingsConfig, None)
        mapping._extra_content.pop(EchoConfig, None)


@pytest.mark.parametrize("pair", ["rings + llama", "clip + echo", "rings + echo"])
def test_checks_of_a_pair(pair, tmp_path):
    vision, text = pair.split(" + ")
    composed = ComposedModel(
        RingsConfig() if vision == "rings" else vision_config("clip_vision_model"),
        EchoConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3) if text == "echo" else text_config("llama"),
        image_size=32,
    )
    composed.check_forward_is_finite()
    composed.check_picture_changes_logits()
    composed.check_gradients()
    composed.check_cached_generation_equals_uncached()
    assert composed.check_padding() == []
    composed.check_save_and_load(tmp_path)
    composed.check_text_only_equals_bare_language_model()
    composed.check_embeddings_equal_ids()


def test_what_was_measured():
    model, processor = anyvlm.compose(
        vision=RingsConfig(),
        text=EchoConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3),
        tokenizer=tiny_tokenizer(),
        image_size=(32, 48),
    )
    spec = model.config.vision_tower_spec
    assert (spec["num_prefix_tokens"], spec["num_suffix_tokens"]) == (0, 3)
    assert spec["grid"] == [4, 6] and spec["hidden_size"] == 24
    assert model.config.language_model_spec["embedding_scale"] == pytest.approx(3.0)
    inputs = processor(text=["w1 <image>"], images=[picture(0)], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 24
