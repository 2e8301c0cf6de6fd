"""Composed and imported models as classes of transformers: which can hold which, and that nothing is copied."""

import copy

import pytest
import torch
from native_image_texts import AYA_TEXT, IDEFICS3_TEXT
from tiny_parts import compose, make_sensitive, text_config
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import anyvlm
from anyvlm import CompositionError
from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.native_cases import case_tokenizer, native_cases
from anyvlm.compatibility.native_cases.cohere_vision import AYA_TOKENS
from anyvlm.compatibility.native_cases.idefics3 import TOKENS as IDEFICS3_TOKENS
from anyvlm.compatibility.native_checks import build_native
from anyvlm.composition.native.equality import logits_of, prompt, sample_picture


def _inputs(processor):
    return processor(text=[prompt(processor, 1)], images=[[sample_picture()]], return_tensors="pt")


@pytest.mark.parametrize(
    ("vision", "text", "settings"),
    [
        ("clip_vision_model", "llama", {"vision_feature_layer": -2}),
        ("clip_vision_model", "qwen2", {}),
        ("clip_vision_model", "mixtral", {"vision_feature_layer": [-2, -1]}),
        ("siglip_vision_model", "qwen3", {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}),
        ("dinov2", "olmo2", {"vision_feature_layer": -2}),
    ],
)
def test_a_composed_model_becomes_a_llava_that_loads_anywhere(vision, text, settings, tmp_path):
    model, processor = compose(vision, text, **settings)
    make_sensitive(model)
    expected = logits_of(model, _inputs(processor))
    native, native_processor = anyvlm.to_native(model, processor)
    assert type(native) is LlavaForConditionalGeneration
    native.save_pretrained(tmp_path)
    native_processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaForConditionalGeneration
    assert torch.equal(_inputs(loaded_processor)["input_ids"], _inputs(processor)["input_ids"])
    assert float((logits_of(loaded, _inputs(loaded_processor)) - expected).abs().max()) <= 1e-5


GATED = {
    "type": "pixel_shuffle",
    "scale_factor": 2,
    "gated": True,
    "hidden_act": "silu",
    "hidden_features": 24,
    "norm": "layer_norm",
}


@pytest.mark.parametrize(
    ("class_name", "vision", "tokens", "settings"),
    [
        (
            "AyaVisionForConditionalGeneration",
            "siglip_vision_model",
            AYA_TOKENS,
            {
                "projector": GATED,
                "views": {"type": "tiles", "layout": "dynamic", "max_tiles": 6},
                "image_text": AYA_TEXT,
                "vision_feature_layer": -2,
            },
        ),
        (
            "Idefics3ForConditionalGeneration",
            "idefics3_vision",
            IDEFICS3_TOKENS,
            {
                "projector": {"type": "pixel_shuffle", "scale_factor": 2, "num_layers": 1, "bias": False},
                "views": {"type": "tiles", "layout": "split", "longest_edge": 96},
                "image_text": IDEFICS3_TEXT,
                "image_size": 32,
            },
        ),
    ],
)
def test_a_composed_model_with_tiles_and_their_text_becomes_a_native_one(
    class_name, vision, tokens, settings, tmp_path
):
    tokenizer = case_tokenizer(*tokens)
    model, processor = compose(tiny_configs.vision_config(vision), "llama", tokenizer=tokenizer, **settings)
    make_sensitive(model)
    native, native_processor = anyvlm.to_native(model, processor)
    assert type(native).__name__ == class_name
    native.save_pretrained(tmp_path)
    native_processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for size in ((40, 30), (64, 96), (33, 90)):
        pictures = {"images": [[sample_picture(*size)]], "return_tensors": "pt"}
        native_inputs = native_processor(text=[prompt(processor, 1)], **pictures)
        ours = processor(text=[prompt(processor, 1)], **pictures)
        assert torch.equal(native_inputs["input_ids"], ours["input_ids"])
        expected = logits_of(model, ours)
        assert float((logits_of(loaded, native_inputs) - expected).abs().max()) <= 1e-5


def _refusal(*arguments, **settings) -> str:
    with pytest.raises(CompositionError) as refusal:
        anyvlm.to_native(*compose(*arguments, **settings))
    return str(refusal.value)


def test_what_no_class_can_hold_is_refused_with_each_ones_reason():
    message = _refusal("dinov2_with_registers", "llama")
    assert "LlavaForConditionalGeneration: it drops one token before the patches or none, not (3, 0)" in message
    assert "FastVlmForConditionalGeneration: its tower gives a map, not 'sequence'" in message
    assert "its projector is 'mlp', not 'linear'" in _refusal("clip_vision_model", "llama", projector="linear")


def test_logits_that_are_capped_or_scaled_behind_the_head_are_seen_however_small_they_are():
    small = text_config("gemma2")
    small.final_logit_softcapping = 1000.0
    assert "does not scale or cap logits as Gemma2ForCausalLM does" in _refusal("clip_vision_model", small)
    assert "does not scale or cap logits as GraniteForCausalLM does" in _refusal("clip_vision_model", "granite")


def test_another_tensor_than_the_native_class_reads_is_seen_by_running_both():
    """SigLIP's last hidden state is normed, which the last of the hidden states is not."""
    message = _refusal("siglip_vision_model", "llama", vision_feature_select_strategy="full")
    assert "differ by" in message and "where 0.0001 is allowed" in message


def test_tensors_are_the_same_ones_and_stay_frozen_or_trained():
    native, processor = build_native(native_cases("llava")[0], seed=0, tied=True)
    native.model.vision_tower.requires_grad_(False)
    before = {id(parameter): parameter.requires_grad for parameter in native.parameters()}
    model, our_processor = anyvlm.from_native(native, processor)
    assert {id(parameter): parameter.requires_grad for parameter in model.parameters()} == before
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    back, _ = anyvlm.to_native(model, our_processor)
    assert {id(parameter): parameter.requires_grad for parameter in back.parameters()} == before


def test_computed_buffers_come_along_as_they_are():
    """`to(bfloat16)` rounds rotary frequencies, which loading would not; both models must use the same."""
    native, processor = build_native(native_cases("llava")[0], seed=0, tied=False)
    native.to(torch.bfloat16)
    model, _ = anyvlm.from_native(native, processor)
    assert model.language_model.model.rotary_emb.inv_freq is native.model.language_model.rotary_emb.inv_freq
    assert model.dtype == model.language_model.config.dtype == model.vision_tower.config.dtype == torch.bfloat16


def test_scales_that_the_native_class_does_not_read_are_taken_out():
    """LLaVA with a Gemma 2 gives the head's output as it is, although the config has a cap."""
    case = native_cases("llava")[0]
    config = copy.deepcopy(case.config(True))
    config.text_config = text_config("gemma2")
    config.text_config.vocab_size = 91
    native = LlavaForConditionalGeneration(config).eval()
    make_sensitive(native)
    model, processor = anyvlm.from_native(native, case.processor(config))
    assert config.text_config.final_logit_softcapping and model.config.text_config.final_logit_softcapping is None
    inputs = _inputs(processor)
    assert torch.equal(logits_of(model, inputs), logits_of(native, inputs))


def test_what_cannot_be_imported_is_refused_with_what_to_do():
    native, processor = build_native(native_cases("llava")[0], seed=0, tied=False)
    with pytest.raises(CompositionError, match="is not the class with a language modeling head.*LlavaForCond"):
        anyvlm.from_native(native.model, processor)
    with pytest.raises(CompositionError, match="'llama' is no family"):
        anyvlm.from_native(native.model.language_model, processor)
    native.model.multi_modal_projector.linear_3 = torch.nn.Linear(2, 2)
    with pytest.raises(CompositionError, match="2 weights are left over.*multi_modal_projector.linear_3.bias"):
        anyvlm.from_native(native, processor)
