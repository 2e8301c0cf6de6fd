"""Language models of every make: what the probe finds out, what is made of encoders and decoders, what is refused."""

import copy
import logging

import pytest
import torch
from tiny_parts import VOCABULARY, make_sensitive, text_config, tiny_tokenizer, vision_config
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
)

import anyvlm
from anyvlm.composition.language_model_probe import probe_language_model
from anyvlm.composition.parts import load_language_model
from anyvlm.modeling.language_models import DEFAULT_SPEC


WORDS = torch.arange(10, 18).unsqueeze(0)


def compose(text, **kwargs):
    kwargs = {"tokenizer": tiny_tokenizer(), "image_size": 32, **kwargs}
    return anyvlm.compose(vision=vision_config("clip_vision_model"), text=text, **kwargs)


def sensitive(text: str):
    torch.manual_seed(0)
    language_model = load_language_model(text_config(text)).eval()
    make_sensitive(language_model)
    return language_model


class TestSpec:
    """What is known of these families from their code."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("llama", {}),
            ("gemma3_text", {}),
            ("roberta", {"position_offset": 2}),
            ("mamba", {"position_offset": None}),
            ("falcon_h1", {"embedding_scale": 3.0}),
            ("rwkv", {"position_offset": None, "left_padding": False}),
            ("bart", {"position_offset": None, "left_padding": False, "own_loss": False}),
            ("moshi", {"use_cache": False}),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_a_family(self, text, expected, dtype):
        model, _ = compose(sensitive(text), dtype=dtype)
        assert model.config.language_model_spec == {**DEFAULT_SPEC, **expected}

    def test_is_saved(self, tmp_path):
        model, processor = compose(sensitive("bart"))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.language_model_interface.spec == model.language_model_interface.spec
        batch = processor(text=["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
        with pytest.raises(ValueError, match="padding_side='right'"):
            loaded(**batch)

    def test_model_without_a_usable_cache_decodes_without(self):
        model, processor = compose(sensitive("moshi"))
        inputs = processor(text=["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11"], return_tensors="pt")
        ids = inputs["input_ids"]
        for _ in range(4):  # the oracle: the forward pass, token by token
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        found = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
        assert torch.equal(found, ids)

    def test_the_model_is_left_as_it_was(self):
        language_model = sensitive("llama").train()
        before = copy.deepcopy(language_model.state_dict())
        probe_language_model(language_model)
        assert language_model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in language_model.state_dict().items())


class TestEncoders:
    def test_encoder_becomes_a_decoder(self, tmp_path, caplog):
        encoder = AutoModelForMaskedLM.from_config(text_config("bert")).eval()
        make_sensitive(encoder)
        encoder.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            model, _ = compose(tmp_path)
        assert "trained as an encoder" in caplog.text
        assert model.config.text_config.is_decoder
        own = model.language_model.state_dict()
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(own[name][: len(tensor)] if tensor.ndim else own[name], tensor), name
        with torch.no_grad():
            start, whole = model(input_ids=WORDS[:, :4]).logits, model(input_ids=WORDS).logits
        torch.testing.assert_close(start, whole[:, :4])

    def test_instance_of_an_encoder_is_refused(self):
        with pytest.raises(anyvlm.CompositionError, match=r"tokens after it.*is_decoder=True"):
            compose(AutoModelForCausalLM.from_config(text_config("bert")))

    def test_family_without_a_causal_form_is_refused(self):
        config = CONFIG_MAPPING["xlnet"](vocab_size=len(VOCABULARY), d_model=32, n_layer=2, n_head=4, d_inner=64)
        with pytest.raises(anyvlm.CompositionError, match="tokens after it"):
            compose(config)


class TestEncoderDecoders:
    @pytest.mark.parametrize("as_path", [True, False])
    def test_decoder_keeps_its_weights(self, tmp_path, caplog, as_path):
        """The oracle: the decoder of the whole model, run without an encoder's output."""
        whole = AutoModelForSeq2SeqLM.from_config(text_config("bart")).eval()
        make_sensitive(whole)
        with torch.no_grad():
            expected = whole.lm_head(whole.get_decoder()(input_ids=WORDS).last_hidden_state)
        if as_path:
            whole.save_pretrained(tmp_path)
        with caplog.at_level(logging.WARNING):
            model, _ = compose(tmp_path if as_path else whole)
        assert "output of an encoder" in caplog.text
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=WORDS).logits[..., : len(VOCABULARY)], expected)
        assert not any("encoder." in name.replace("decoder.", "") for name in model.language_model.state_dict())

    def test_family_without_a_class_for_its_decoder(self):
        config = CONFIG_MAPPING["t5"](vocab_size=90, d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=64)
        with pytest.raises(anyvlm.CompositionError, match="causal language model"):
            compose(config)
        with pytest.raises(anyvlm.CompositionError, match="no class for its decoder alone"):
            compose(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize("as_path", [True, False])
def test_text_part_whose_type_stands_beside_the_composite(tmp_path, as_path):
    """`AutoModelForCausalLM` lists mllama's whole config only; its text config has a class of its own."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CONFIG_MAPPING["mllama"](
        text_config={
            **sizes,
            "vocab_size": len(VOCABULARY),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": 3,
        },
        vision_config={
            **sizes,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    )
    whole = MllamaForConditionalGeneration(config).eval()
    make_sensitive(whole)
    with torch.no_grad():
        expected = whole(input_ids=WORDS).logits
    if as_path:
        whole.save_pretrained(tmp_path)
    model, processor = compose(tmp_path if as_path else whole)
    with torch.no_grad():
        assert torch.equal(model(input_ids=WORDS).logits, expected)
    # Its image token has an embedding and no logit.
    inputs = processor(text=["w1 w2"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


class TestRefusals:
    def test_what_generates_no_text(self):
        with pytest.raises(anyvlm.CompositionError, match="generates audio, not text"):
            compose(CONFIG_MAPPING["musicgen"]())

    def test_another_rule_in_generation_than_in_the_forward_pass(self):
        """xlm appends a mask token to what it continues."""
        config = CONFIG_MAPPING["xlm"](
            vocab_size=len(VOCABULARY),
            emb_dim=32,
            n_layers=2,
            n_heads=4,
            mask_token_id=5,
            bos_token_id=1,
            eos_token_id=2,
        )
        with pytest.raises(anyvlm.CompositionError, match="generates by another rule"):
            compose(config)

    def test_no_embeddings(self):
        config = CONFIG_MAPPING["cpmant"](
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            num_attention_heads=4,
            dim_head=8,
            dim_ff=64,
            num_hidden_layers=2,
            prompt_types=4,
            prompt_length=4,
            segment_types=4,
        )
        with pytest.raises(anyvlm.CompositionError, match="takes no inputs_embeds"):
            compose(config)

    def test_vocabulary_that_cannot_be_saved(self):
        """moshi has one embedding more than its config states, and room for no second new token."""
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["one more"])
        with pytest.raises(anyvlm.CompositionError, match="91 embeddings for a vocabulary of 90"):
            compose(text_config("moshi"), tokenizer=tokenizer)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("embeddings", "other logits for the embeddings"),
            ("length", "other logits when more text follows"),
            ("training", "cannot be trained"),
            ("error", r"cannot be run on a short plain text \(ValueError: of no use"),
            ("nan", "not finite"),
        ],
    )
    def test_faults_of_a_made_up_language_model(self, fault, message):
        language_model = _Faulty(text_config("llama")).eval()
        make_sensitive(language_model)
        language_model.fault = fault
        with pytest.raises(anyvlm.CompositionError, match=message):
            compose(language_model)

    def test_the_made_up_language_model_without_a_fault(self):
        language_model = _Faulty(text_config("llama")).eval()
        language_model.fault = None
        assert probe_language_model(language_model)["left_padding"]


class _Faulty(LlamaForCausalLM):
    """A llama with one fault of those that some family has."""

    fault: str | None = None

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if self.fault == "error" or (self.fault == "training" and self.training):
            raise ValueError("of no use")
        if inputs_embeds is None:
            inputs_embeds = nn.functional.embedding(input_ids, self.get_input_embeddings().weight)
        elif self.fault == "embeddings":
            inputs_embeds = inputs_embeds.flip(-1)
        if self.fault == "length":
            inputs_embeds = inputs_embeds * inputs_embeds.shape[1]
            inputs_embeds = inputs_embeds + 0.1 * inputs_embeds.shape[1]
        if self.fault == "nan":
            inputs_embeds = inputs_embeds * float("nan")
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)
