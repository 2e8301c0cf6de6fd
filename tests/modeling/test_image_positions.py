"""Positions with several axes, against those that transformers' own models compute."""

import pytest
import torch
from tiny_parts import VOCABULARY, compose, make_sensitive, text_config
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLModel,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from anyvlm.compatibility.model_under_test import picture
from anyvlm.modeling.image_positions import image_positions, positions_on_axes
from anyvlm.modeling.language_models import default_position_ids
from anyvlm.modeling.text_models import TextModelForCausalLM


MODELS = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}


def text_part(family="qwen2_vl", **settings):
    return CONFIG_MAPPING[f"{family}_text"](
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **({"head_dim": 8} if family == "qwen3_vl" else {}),
        **settings,
    )


@pytest.fixture(scope="module")
def composed():
    """A tower that takes pictures of any size, before a language model with three axes."""
    model, processor = compose("qwen2_vl_vision", text_part())
    make_sensitive(model)
    return model, processor


class TestAgainstNativeModels:
    #: Rows and columns of the tokens of each picture, for each sample of a batch.
    GRIDS = ([(2, 3), (4, 1)], [(1, 5)], [])

    def batch(self, side):
        rows = []
        for grids in self.GRIDS:
            row = [0, 0]
            for height, width in grids:
                row += [1] * (height * width) + [0]
            rows.append(row)
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        pad = lambda row, gap, value: [value] * gap + row if side == "left" else row + [value] * gap  # noqa: E731
        types = torch.tensor([pad(row, gap, 0) for row, gap in zip(rows, gaps)])
        mask = torch.tensor([pad([1] * len(row), gap, 0) for row, gap in zip(rows, gaps)])
        return types, mask

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", list(MODELS))
    def test_are_the_same(self, family, side):
        types, mask = self.batch(side)
        config = CONFIG_MAPPING[family](text_config=text_part(family).to_dict())
        with torch.device("meta"):
            native = MODELS[family](config)
        grids = [grid for grids in self.GRIDS for grid in grids]
        merge = config.vision_config.spatial_merge_size
        thw = torch.tensor([(1, merge * rows, merge * columns) for rows, columns in grids])
        theirs, deltas = native.get_rope_index(
            torch.zeros_like(types), mm_token_type_ids=types, image_grid_thw=thw, attention_mask=mask
        )
        counted = default_position_ids(mask, 0, mask.shape[1], mask.device)
        ours, shift = image_positions(counted, types.bool(), grids, [rows * columns for rows, columns in grids])
        assert torch.equal(ours[:, mask.bool()], theirs[:, mask.bool()])
        assert torch.equal(shift, deltas)

    def test_a_picture_in_a_second_turn(self):
        types, mask = self.batch("left")
        grids = [grid for grids in self.GRIDS for grid in grids]
        lengths = [rows * columns for rows, columns in grids]
        counted = default_position_ids(mask, 0, mask.shape[1], mask.device)
        whole, _ = image_positions(counted, types.bool(), grids, lengths)
        cut = 9  # between the pictures of the first sample
        first, second = types[:1, :cut].bool(), types[:1, cut:].bool()
        cache = DynamicCache()
        start = positions_on_axes(counted[:1, :cut], cache, first, grids[:1], lengths[:1])
        later = positions_on_axes(counted[:1, cut:], cache, second, grids[1:2], lengths[1:2])
        assert int(first.sum()) == lengths[0]
        assert torch.equal(torch.cat([start, later], dim=-1), whole[:, :1])


class TestModel:
    def test_axes_are_found_by_running_it(self, composed):
        assert composed[0].config.language_model_spec["position_axes"] == 3
        assert compose("clip_vision_model", "llama")[0].config.language_model_spec["position_axes"] == 1

    @torch.no_grad()
    def test_text_alone_is_the_language_models_own(self, composed):
        model, processor = composed
        inputs = processor(text=["w1 w2 w3 w4", "w5 w6"], padding=True, return_tensors="pt")
        ours = model(**inputs).logits
        theirs = model.language_model.model(**inputs).last_hidden_state @ model.language_model.lm_head.weight.T
        torch.testing.assert_close(ours[inputs["attention_mask"].bool()], theirs[inputs["attention_mask"].bool()])

    @torch.no_grad()
    def test_rows_and_columns_matter(self, composed):
        """The same tokens as a grid of other proportions give other logits."""
        model, processor = composed
        inputs = processor(text=["w1 <image> w2"], images=[picture(0, (64, 128))], return_tensors="pt")
        encoded = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        run = lambda: model(inputs["input_ids"], mm_encoder_outputs={"image": encoded}).logits[0, -1]  # noqa: E731
        wide = run()
        torch.testing.assert_close(wide, model(**inputs).logits[0, -1])
        encoded.token_grids = [(columns, rows) for rows, columns in encoded.token_grids]
        assert not torch.allclose(run(), wide, atol=1e-4)
        encoded = BaseModelOutputWithPooling(pooler_output=encoded.pooler_output)
        with pytest.raises(ValueError, match="rows and columns"):
            run()

    @pytest.mark.parametrize(
        "cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str
    )
    def test_generation_equals_the_forward_pass(self, composed, cache):
        model, processor = composed
        pictures = [picture(0, (64, 128)), picture(1, (128, 32)), picture(2, (64, 64))]
        texts = ["w1 <image> w2 <image> w3", "w4 <image>"]
        batch = processor(
            text=texts, images=[pictures[:2], pictures[2:]], padding=True, padding_side="left", return_tensors="pt"
        )
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True, **cache}
        found = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
        for row, images in ((0, pictures[:2]), (1, pictures[2:])):
            alone = processor(text=[texts[row]], images=images, return_tensors="pt")
            if "num_beams" in cache:
                expected = model.generate(**alone, **settings, use_cache=False)[0, alone["input_ids"].shape[1] :]
            else:
                ids, pixels = alone.pop("input_ids"), {key: alone[key] for key in ("pixel_values", "image_grid_thw")}
                prompt = ids.shape[1]
                for _ in range(5):
                    with torch.no_grad():
                        logits = model(ids, **pixels).logits[:, -1:]
                    logits[..., [model.config.image_token_id, 2]] = -float("inf")
                    ids = torch.cat([ids, logits.argmax(-1)], dim=1)
                expected = ids[0, prompt:]
            assert torch.equal(found[row], expected)

    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    def test_with_tokens_that_see_later_ones(self, image_attention):
        model, processor = compose("qwen2_vl_vision", text_part(), image_attention=image_attention)
        make_sensitive(model)
        batch = processor(
            text=["w1 <image> w2", "w3 w4 <image> w5"],
            images=[[picture(0, (64, 128))], [picture(1, (64, 64))]],
            padding=True,
            return_tensors="pt",
        )
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))

    def test_steps_without_generate(self, composed):
        """A cache that the language model makes knows what the pictures saved."""
        model, processor = composed
        inputs = processor(text=["w1 <image> w2 w3"], images=[picture(0, (64, 128))], return_tensors="pt")
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        with torch.no_grad():
            whole = model(ids, **inputs).logits[:, -1]
            cache = model(ids[:, :-1], **inputs, use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, whole)


class TestTextModelWithAHead:
    @pytest.mark.parametrize("tied", [True, False])
    def test_is_saved_and_loaded(self, tmp_path, tied):
        model, _ = compose("clip_vision_model", text_part(tie_word_embeddings=tied))
        assert isinstance(model.language_model, TextModelForCausalLM)
        head, embeddings = model.language_model.lm_head.weight, model.get_input_embeddings().weight
        assert (head is embeddings) == tied
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        keys = loaded.state_dict().keys()
        assert "language_model.model.embed_tokens.weight" in keys
        assert "language_model.lm_head.weight" in keys
        ids = torch.arange(10, 20).unsqueeze(0)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("tied", [True, False])
    def test_is_taken_out_of_a_whole(self, tmp_path, tied):
        """The head and its tie come from the whole model, whose config alone states the tie."""
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text_part().to_dict(), vision_config=vision, tie_word_embeddings=tied)
        whole = Qwen2VLForConditionalGeneration(config).eval()
        ids = torch.arange(10, 20).unsqueeze(0)
        with torch.no_grad():
            expected = whole(ids).logits
        model, _ = compose("clip_vision_model", whole)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits[..., : expected.shape[-1]], expected)

    def test_loss_is_that_of_a_causal_lm(self):
        """Equal to a llama's with the same logits: only the labelled rows are computed, in each sample its own."""
        model, _ = compose("clip_vision_model", text_part())
        ids = torch.arange(10, 26).view(2, 8)
        labels = ids.clone()
        labels[0, :3], labels[1, :6] = -100, -100
        with torch.no_grad():
            outputs, logits = model(ids, labels=labels), model(ids).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)
        assert outputs.logits.shape[1] == 6

    def test_attention_implementation(self):
        for attention in ("eager", "sdpa"):
            config = text_part(attn_implementation=attention)
            model = TextModelForCausalLM._from_config(config)
            assert model.model.config._attn_implementation == attention

    def test_types_that_lack_more_than_a_head(self):
        for text in ("bert", "llama"):
            assert not isinstance(
                compose("clip_vision_model", text_config(text))[0].language_model, TextModelForCausalLM
            )
