"""compose(): kinds of parts, what is kept, and what is new."""

import copy

import pytest
import torch
from model_tester import picture
from tiny_parts import VOCABULARY, compose, make_sensitive, text_config, tiny_tokenizer, vision_config
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Gemma3ForConditionalGeneration,
    SiglipModel,
)

import anyvlm
from anyvlm.composition.starting_scale import embedding_rms
from anyvlm.modeling.projectors import PROJECTORS


#: Projectors with weights.
LEARNT = [name for name in PROJECTORS if name != "identity"]


def test_paths_configs_and_instances_give_the_same_parts(saved_parts):
    tower = AutoModel.from_pretrained(saved_parts / "tower")
    language_model = AutoModelForCausalLM.from_pretrained(saved_parts / "lm")
    from_paths, processor = anyvlm.compose(vision=str(saved_parts / "tower"), text=saved_parts / "lm")
    from_instances, _ = anyvlm.compose(
        vision=copy.deepcopy(tower), text=copy.deepcopy(language_model), tokenizer=tiny_tokenizer()
    )
    for model in (from_paths, from_instances):
        for name, tensor in tower.state_dict().items():
            assert torch.equal(model.vision_tower.state_dict()[name], tensor)
        for name, tensor in language_model.state_dict().items():
            assert torch.equal(model.language_model.state_dict()[name][: len(tensor)], tensor)
    assert processor.image_processor.crop_size["height"] == 32
    assert from_paths.config.composed_from == {
        "vision": {"id": None, "license": "mit"},
        "text": {"id": None, "license": None},
    }


def test_no_local_path_is_saved(saved_parts, tmp_path):
    model, processor = anyvlm.compose(vision=saved_parts / "tower", text=saved_parts / "lm")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert str(saved_parts) not in file.read_text(encoding="utf-8"), file.name


def test_seed_decides_all_that_is_random():
    first, second, other = (compose(seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["multi_modal_projector.layers.0.weight"], other["multi_modal_projector.layers.0.weight"]
    )


def test_composing_leaves_the_callers_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    compose()
    assert torch.equal(torch.rand(1), expected)


def test_whole_clip_gives_its_vision_part(tmp_path):
    config = CLIPConfig(
        vision_config=vision_config("clip_vision_model").to_dict(),
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values).last_hidden_state
    for source in (tmp_path / "clip", clip):
        model, _ = compose(vision=source, image_size=32)
        with torch.no_grad():
            assert torch.equal(model.vision_tower(pixel_values).last_hidden_state, expected)


def test_whole_siglip_gives_its_vision_part(tmp_path):
    config = CONFIG_MAPPING["siglip"](
        vision_config=vision_config("siglip_vision_model").to_dict(),
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
    )
    siglip = SiglipModel(config).eval()
    siglip.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 32, 32)
    model, _ = compose(vision=tmp_path, image_size=32)
    with torch.no_grad():
        expected = siglip.vision_model(pixel_values).last_hidden_state
        assert torch.equal(model.vision_tower(pixel_values).last_hidden_state, expected)


def test_composite_language_model_gives_its_text_part(tmp_path):
    text = text_config("gemma3_text")
    text.final_logit_softcapping = None  # Gemma 3 has none, and its composite class would not apply one
    config = CONFIG_MAPPING["gemma3"](
        text_config=text.to_dict(), vision_config=vision_config("siglip_vision_model").to_dict()
    )
    gemma = Gemma3ForConditionalGeneration(config).eval()
    make_sensitive(gemma)
    gemma.save_pretrained(tmp_path)
    ids = torch.arange(10, 18).unsqueeze(0)
    with torch.no_grad():
        expected = gemma(input_ids=ids).logits
    for source in (tmp_path, gemma):
        model, _ = compose(text=source)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits[..., : len(VOCABULARY)], expected)
        assert model.config.text_config.model_type == "gemma3_text"


class TestVocabulary:
    def test_image_token_is_one_new_row(self):
        language_model = AutoModelForCausalLM.from_config(text_config("qwen2"))
        before = copy.deepcopy(language_model)
        model, processor = compose(text=language_model)
        assert processor.tokenizer.encode("<image>", add_special_tokens=False) == [len(VOCABULARY)]
        assert model.config.image_token_id == processor.image_token_id == len(VOCABULARY)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            old, new = getattr(before, get)().weight, getattr(model, get)().weight
            assert new.shape[0] == old.shape[0] + 1
            assert torch.equal(new[:-1], old)

    def test_spare_rows_are_used(self):
        config = text_config("llama")
        config.vocab_size = 128
        model, _ = compose(text=config)
        assert model.get_input_embeddings().weight.shape[0] == 128
        assert model.config.image_token_id == len(VOCABULARY)

    def test_token_that_exists_is_kept(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        model, processor = compose(tokenizer=tokenizer)
        assert len(processor.tokenizer) == len(VOCABULARY) + 1
        assert model.config.image_token_id == len(VOCABULARY)

    def test_other_special_tokens_stay(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["w1"]})
        _, processor = compose(tokenizer=tokenizer)
        assert {"w1", "<image>"} <= set(processor.tokenizer.all_special_tokens)

    def test_no_bos_and_no_pad(self):
        """Qwen has no bos; llama has no pad."""
        model, processor = compose(tokenizer=tiny_tokenizer(bos_token=None, pad_token=None), text=_without_bos())
        assert processor.tokenizer.bos_token is None
        assert processor.tokenizer.pad_token == "</s>"
        assert model.generation_config.pad_token_id == model.config.text_config.pad_token_id == 2
        inputs = processor(text=["w1 <image> w2", "w3"], images=[[picture(0)], []], padding=True, return_tensors="pt")
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2

    def test_eos_is_taken_from_the_model(self):
        _, processor = compose(tokenizer=tiny_tokenizer(eos_token=None))
        assert processor.tokenizer.eos_token == "</s>"

    def test_all_ends_of_a_turn_are_kept(self):
        language_model = AutoModelForCausalLM.from_config(text_config("llama"))
        language_model.generation_config.eos_token_id = [2, 7]
        model, _ = compose(text=language_model)
        assert model.generation_config.eos_token_id == [2, 7]

    def test_without_any_eos(self):
        config = text_config("llama")
        config.eos_token_id = None
        with pytest.raises(anyvlm.CompositionError, match="end-of-sequence"):
            compose(text=config, tokenizer=tiny_tokenizer(eos_token=None))


def _without_bos():
    config = text_config("qwen2")
    config.bos_token_id = None
    config.pad_token_id = None
    return config


class TestProjector:
    @pytest.mark.parametrize("text", ["llama", "gemma2", "minicpm3", "granite"])
    @pytest.mark.parametrize("projector", [*LEARNT, {"type": "mlp", "num_layers": 3, "hidden_features": 24}])
    def test_starts_at_the_scale_of_the_embeddings(self, text, projector):
        language_model = AutoModelForCausalLM.from_config(text_config(text))
        make_sensitive(language_model)
        model, processor = compose(text=language_model, projector=projector)
        pictures = [picture(seed, (64, 64)) for seed in range(8)]
        pixel_values = processor(text=["<image>" * 8], images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            tokens = torch.stack(model.get_image_features(pixel_values).pooler_output)
            # The oracle: the embeddings of real text, through the module that a prompt goes through.
            words = model.get_input_embeddings()(torch.arange(len(VOCABULARY)).unsqueeze(0))
        ratio = tokens.square().mean().sqrt() / words.square().mean().sqrt()
        assert 0.7 < ratio < 1.4

    def test_embedding_rms_counts_the_scale_inside_the_module(self):
        """gemma multiplies its embeddings by sqrt(hidden_size) in the embedding module."""
        language_model = AutoModelForCausalLM.from_config(text_config("gemma2"))
        weight = language_model.get_input_embeddings().weight
        raw = weight[weight.abs().sum(-1) > 0].square().mean().sqrt()
        torch.testing.assert_close(embedding_rms(language_model), raw * 32**0.5, rtol=1e-3, atol=0)

    def test_unknown_projector_lists_the_known(self):
        with pytest.raises(ValueError, match="linear, mlp"):
            compose(projector="magic")

    def test_unknown_argument(self):
        with pytest.raises(ValueError, match="depth"):
            compose(projector={"type": "mlp", "depth": 3})

    @pytest.mark.parametrize("key", ["in_features", "out_features"])
    def test_widths_that_do_not_fit(self, key):
        with pytest.raises(ValueError, match=f"{key}.* to 32"):
            compose(projector={"type": "linear", key: 48})


class TestFeatures:
    def test_layer_by_index_is_the_towers_hidden_state(self):
        model, processor = compose(vision_feature_layer=-2)
        pixel_values = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            hidden_states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            features = model.get_image_features(pixel_values).last_hidden_state
        assert torch.equal(features, hidden_states[-2][:, 1:])

    def test_layers_by_list_are_joined_by_channel(self):
        model, _ = compose(vision_feature_layer=[0, -1])
        pixel_values = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            hidden_states = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            features = model.get_image_features(pixel_values).last_hidden_state
        assert torch.equal(features, torch.cat([hidden_states[0], hidden_states[-1]], dim=-1)[:, 1:])
        assert model.config.projector_config["in_features"] == 64

    def test_layers_of_different_stages_are_refused(self):
        with pytest.raises(anyvlm.CompositionError, match="one stage"):
            compose(vision="resnet", image_size=64, vision_feature_layer=[-1, -2])

    def test_full_strategy_keeps_every_token(self):
        model, processor = compose(vision_feature_select_strategy="full")
        inputs = processor(text=["<image>"], images=[picture(0)], return_tensors="pt")
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 17
        with torch.no_grad():
            expected = model.vision_tower(inputs["pixel_values"]).last_hidden_state
            assert torch.equal(model.get_image_features(inputs["pixel_values"]).last_hidden_state, expected)

    def test_map_is_read_row_by_row(self):
        """Channels last (sam2) and first (resnet) give the same order: features of one row follow one another."""
        for tower in ("resnet", "sam2_vision_model"):
            model, _ = compose(vision=tower, image_size=64)
            pixel_values = torch.randn(1, 3, 64, 64)
            with torch.no_grad():
                raw = model.vision_tower(pixel_values).last_hidden_state
                features = model.get_image_features(pixel_values).last_hidden_state
            cell = raw[0, :, 0, 1] if tower == "resnet" else raw[0, 0, 1]
            assert torch.equal(features[0, 1], cell)


class TestPictureSize:
    def test_position_embeddings_are_interpolated_off_size(self):
        """siglip rejects another size than its own unless it is asked to interpolate."""
        model, processor = compose(vision="siglip_vision_model", image_size=48)
        assert model.config.vision_tower_spec["call_kwargs"]["interpolate_pos_encoding"]
        inputs = processor(text=["<image>"], images=[picture(0)], return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (48, 48)
        assert len(model.get_image_features(inputs["pixel_values"]).pooler_output[0]) == 36

    def test_size_that_is_not_square(self):
        model, processor = compose(vision="dinov2", image_size=(32, 48))
        assert model.config.vision_tower_spec["grid"] == [4, 6]
        inputs = processor(text=["<image>"], images=[picture(0)], return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (32, 48)
        model(**inputs)

    def test_processor_that_keeps_proportions_is_set_to_one_size(self, caplog):
        from transformers import YolosImageProcessorPil

        compose(vision="yolos", image_processor=YolosImageProcessorPil())
        assert "resize to 32x32 pixels" in caplog.text
        model, processor = compose(vision="yolos", image_processor=YolosImageProcessorPil(), image_size=32)
        for size in ((20, 70), (70, 20)):
            inputs = processor(text=["<image>"], images=[picture(0, size)], return_tensors="pt")
            assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
            assert inputs["pixel_values"].shape == (1, 3, 32, 32)
        model(**inputs)

    def test_picture_that_fills_the_context_is_warned_about(self, caplog):
        compose(image_size=32)
        assert "positions" not in caplog.text
        config = text_config("llama")
        config.max_position_embeddings = 24
        compose(text=config, image_size=32)
        assert "One picture takes 16 of the 24 positions" in caplog.text

    def test_size_the_tower_cannot_take(self):
        with pytest.raises(anyvlm.CompositionError, match="image_size"):
            compose(vision="sam_vision_model", image_size=48)

    def test_processor_that_takes_no_height_and_width(self, tmp_path):
        """ConvNext's, which ResNets are saved with, fails on them: a plain one with its colours takes its place."""
        from transformers import ConvNextImageProcessorPil

        torch.manual_seed(0)
        AutoModel.from_config(vision_config("resnet")).save_pretrained(tmp_path)
        ConvNextImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
        _, processor = compose(vision=tmp_path, image_size=64)
        inputs = processor(text="<image>", images=picture(0, (90, 70)), return_tensors="pt")
        assert inputs["pixel_values"].shape[-2:] == (64, 64)
        assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)

    def test_callers_image_processor_is_not_changed(self):
        image_processor = CLIPImageProcessorPil()
        compose(image_processor=image_processor, image_size=32)
        assert image_processor.crop_size["height"] == 224

    def test_picture_of_another_size_is_refused(self):
        model, _ = compose()
        with pytest.raises(ValueError, match="32x32 pixels .* got 40x32"):
            model.get_image_features(torch.zeros(1, 3, 40, 32))


class TestDtype:
    def test_one_dtype_the_language_models(self):
        language_model = AutoModelForCausalLM.from_config(text_config("llama"), dtype=torch.bfloat16)
        tower = AutoModel.from_config(vision_config("dinov2"), dtype=torch.float32)
        model, _ = compose(vision=tower, text=language_model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == model.config.vision_config.dtype == torch.bfloat16

    def test_dtype_that_is_asked_for(self):
        language_model = AutoModelForCausalLM.from_config(text_config("llama"), dtype=torch.bfloat16)
        model, _ = compose(text=language_model, dtype="float32")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_casting_keeps_rotary_frequencies_exact(self, tmp_path):
        language_model = AutoModelForCausalLM.from_config(text_config("llama"), dtype=torch.float32)
        expected = language_model.model.rotary_emb.inv_freq.clone()
        model, _ = compose(text=language_model, dtype=torch.bfloat16)
        assert torch.equal(model.language_model.model.rotary_emb.inv_freq, expected)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = torch.arange(10, 30).unsqueeze(0)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

    @pytest.mark.parametrize("tower", ["clip_vision_model", "resnet", "sam2_vision_model", "dinov3_vit"])
    @pytest.mark.parametrize("text", ["llama", "gemma3n_text"])
    def test_bf16_is_within_its_rounding_of_fp32(self, tower, text, tmp_path):
        size = 64 if tower in ("resnet", "sam2_vision_model") else 32
        model, processor = compose(vision=tower, text=text, image_size=size)
        model.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
        words = {"input_ids": torch.arange(4, 4 + inputs["input_ids"].shape[1]).unsqueeze(0)}
        with torch.no_grad():
            error = (model(**inputs).logits - half(**inputs).logits).abs().max()
            # The oracle for what bf16 costs: the bare language model on a text of the same length.
            bare_error = (model.language_model(**words).logits - half.language_model(**words).logits).abs().max()
        assert 0 < error < 4 * bare_error
