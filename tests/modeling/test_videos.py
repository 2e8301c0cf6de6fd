"""Videos in the composed model. The oracle is the same model with the frames as pictures, or the bare tower of clips."""

import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaNextVideoConfig
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

import anyvlm
from anyvlm.configuration.video_frames import resolve_video_frames
from anyvlm.modeling.video_tokens import pool_frame


def frames(number, first=0, size=(40, 50)):
    return [picture(first + index, size) for index in range(number)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def features(model, inputs):
    inputs = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return model.get_image_features(**inputs).pooler_output


@pytest.fixture(scope="module")
def plain():
    """A model whose frames keep all their tokens."""
    return compose(video_frames={"num_frames": 4, "frame_pool": 1})


def test_unpooled_frames_are_pictures(plain):
    """Pictures and videos mixed in one text and over a batch: the same model as with every frame as a picture."""
    model, processor = plain
    kwargs = {"padding": True, "return_tensors": "pt"}
    inputs = processor(
        text=["w1 <video> w2 <image> w3 <video>", "<image> w4"],
        images=[[picture(9)], [picture(8)]],
        videos=[[frames(4), frames(3, 20)], []],
        **kwargs,
    )
    pictures = [*frames(4), picture(9), *frames(3, 20)]
    expected = processor(
        text=["w1 " + "<image>" * 4 + " w2 <image> w3 " + "<image>" * 3, "<image> w4"],
        images=[pictures, [picture(8)]],
        **kwargs,
    )
    assert inputs.pop("num_video_frames").tolist() == [4, 0, 3, 0]
    for key in expected:
        assert torch.equal(inputs[key], expected[key]), key
    inputs["num_video_frames"] = torch.tensor([4, 0, 3, 0])
    assert torch.equal(logits(model, inputs), logits(model, expected))


@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_pooling_is_that_of_llava_next_video(grid):
    config = LlavaNextVideoConfig(spatial_pool_mode="average", spatial_pool_stride=2)
    config.vision_config.image_size, config.vision_config.patch_size = 8, 2  # 4 x 4 patches
    tokens = torch.randn(grid[0] * grid[1], 5)
    found, pooled = pool_frame(tokens, grid, resolve_video_frames({"frame_pool": 2}))
    assert pooled == (grid[0] // 2, grid[1] // 2)
    if grid == (4, 4):
        assert torch.allclose(found, LlavaNextVideoPooler(config)(tokens[None])[0], atol=1e-6)
    squares = tokens.unflatten(0, (pooled[0], 2, pooled[1], 2)).mean((1, 3)).flatten(0, 1)
    assert torch.allclose(found, squares, atol=1e-6)


def test_grid_that_does_not_divide():
    """Rows and columns are rounded up, and the squares overlap: every token counts, none is filled in."""
    tokens = torch.randn(5 * 7, 3)
    found, pooled = pool_frame(tokens, (5, 7), resolve_video_frames({"frame_pool": 2}))
    assert pooled == (3, 4)
    assert torch.allclose(found[0], tokens.unflatten(0, (5, 7))[:2, :2].mean((0, 1)), atol=1e-6)
    assert torch.allclose(found[-1], tokens.unflatten(0, (5, 7))[3:, 5:].mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"views": "tiles"},
        {"views": {"type": "tiles", "layout": "dynamic"}},
        {"views": "slices"},
        {"projector": {"type": "pixel_shuffle", "scale_factor": 2}},
        {"projector": {"type": "resampler", "num_queries": 5}},
        {"vision": "siglip2_vision_model", "views": {"type": "native", "max_tokens": 25}},
        {"vision": "qwen2_5_vl_vision", "views": {"type": "native", "max_tokens": 25}},
        {"vision": "vivit"},
        {"vision": "vivit", "views": {"type": "tiles", "layout": "dynamic", "max_tiles": 3}},
        {"image_attention": "bidirectional"},
    ],
    ids=str,
)
def test_processor_counts_what_the_model_makes(settings):
    """Also: in a padded batch as alone, and after generation with beams as without a batch."""
    model, processor = compose(video_frames={}, **settings)
    texts = ["w1 <video> w2 <image>", "<video> w3 <video> w4"]
    images = [[picture(9, (70, 30))], []]
    videos = [[frames(3)], [frames(2, 5, (30, 70)), frames(4, 7)]]
    batch = processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")
    made = features(model, batch)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == sum(map(len, made))
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(70, 30)], video_sizes=[(3, 40, 50), (2, 30, 70), (4, 40, 50)]
    )
    assert sum(counts.num_image_tokens + counts.num_video_tokens) == sum(map(len, made))
    found = logits(model, batch)
    beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
    for row in range(2):
        alone = processor(text=texts[row], images=[images[row]], videos=[videos[row]], return_tensors="pt")
        torch.testing.assert_close(
            found[row][batch["attention_mask"][row].bool()], logits(model, alone)[0], rtol=1e-4, atol=1e-5
        )
        expected = model.generate(**alone, max_new_tokens=3, num_beams=2, do_sample=False)[0]
        assert torch.equal(beams[row][-3:], expected[-3:])


def test_frames_change_the_logits_in_their_order(plain):
    model, processor = plain
    straight, turned = frames(4), frames(4)[::-1]
    text = ["w1 <video> w2"]
    found = [
        logits(model, processor(text=text, videos=video, return_tensors="pt"))[0, -1] for video in (straight, turned)
    ]
    assert (found[0] - found[1]).abs().max() > 1e-4


class TestFusion:
    """With a fusion other than `embed` a video is one picture with the tokens of all its frames."""

    @pytest.fixture(scope="class", params=["cross_attention", "gated"])
    def model_and_processor(self, request):
        model, processor = compose(fusion=request.param, video_frames={"num_frames": 3})
        for name, parameter in model.fusion.named_parameters():
            if "gate" in name:
                torch.nn.init.constant_(parameter, 0.5)
        return model, processor

    def test_one_placeholder_for_all_frames(self, model_and_processor):
        model, processor = model_and_processor
        inputs = processor(
            text=["w1 <video> w2 <image> w3"], images=[picture(9)], videos=[frames(3)], return_tensors="pt"
        )
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2
        assert [len(tokens) for tokens in features(model, inputs)] == [3 * 4, 16]
        assert processor._get_num_multimodal_tokens(video_sizes=[(3, 40, 50)]).num_video_tokens == [1]

    def test_every_frame_is_seen(self, model_and_processor):
        model, processor = model_and_processor
        found = logits(model, processor(text=["<video> w2 w3"], videos=frames(3), return_tensors="pt"))
        for index in range(3):
            other = frames(3)
            other[index] = picture(30)
            changed = logits(model, processor(text=["<video> w2 w3"], videos=other, return_tensors="pt"))
            assert (changed - found)[0, -1].abs().max() > 1e-6

    def test_a_batch_as_each_alone(self, model_and_processor):
        model, processor = model_and_processor
        texts, videos, images = (
            ["w1 <video> w2", "<image> w3 <video> w4 w5"],
            [[frames(3)], [frames(2, 7)]],
            [[], [picture(8)]],
        )
        batch = processor(text=texts, videos=videos, images=images, padding=True, return_tensors="pt")
        found = logits(model, batch)
        answers = model.generate(**batch, max_new_tokens=3, do_sample=False)
        for row in range(2):
            alone = processor(text=texts[row], videos=[videos[row]], images=[images[row]], return_tensors="pt")
            torch.testing.assert_close(
                found[row][batch["attention_mask"][row].bool()], logits(model, alone)[0], rtol=1e-4, atol=1e-5
            )
            expected = model.generate(**alone, max_new_tokens=3, do_sample=False)
            assert torch.equal(answers[row, -3:], expected[0, -3:])

    def test_text_between_frames_is_refused(self):
        with pytest.raises(anyvlm.CompositionError, match="nothing can be written between its frames"):
            compose(fusion="cross_attention", video_frames={"frame_text": "{number}"})


class TestTowerOfClips:
    @pytest.fixture(scope="class")
    def model_and_processor(self):
        return compose("vivit")

    def test_a_video_is_one_clip(self, model_and_processor):
        model, processor = model_and_processor
        video = frames(5)
        inputs = processor(text=["w1 <video>"], videos=video, return_tensors="pt")
        pixels = processor.image_processor([video[0], video[2]], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"], pixels[None])
        with torch.no_grad():
            expected = model.vision_tower(pixels[None], **model.config.vision_tower_spec["call_kwargs"])[0]
        found = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        assert found.shape[1] <= expected.shape[1]
        assert torch.equal(found, expected[:, -found.shape[1] :])

    def test_pictures_beside_videos_stand_still(self, model_and_processor):
        model, processor = model_and_processor
        mixed = processor(text=["<image> <video>"], images=[picture(9)], videos=[frames(2)], return_tensors="pt")
        alone = processor(text=["<image>"], images=[picture(9)], return_tensors="pt")
        assert torch.equal(mixed["pixel_values"][0], alone["pixel_values"].expand(2, -1, -1, -1))
        torch.testing.assert_close(features(model, mixed)[0], features(model, alone)[0], rtol=1e-5, atol=1e-6)

    def test_a_short_video_is_shown_slowly(self, model_and_processor):
        _, processor = model_and_processor
        pixels = processor(text=["<video>"], videos=[frames(1)], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0, 0], pixels[0, 1])

    @pytest.mark.parametrize("asked", [{"num_frames": 4}, {"fps": 1}, {"do_sample_frames": False}])
    def test_another_length_is_refused(self, model_and_processor, asked):
        with pytest.raises(ValueError, match="takes clips"):
            model_and_processor[1](text=["<video>"], videos=[frames(4)], **asked)


def test_checkpoint_keeps_how_videos_are_read(tmp_path):
    model, processor = compose(video_frames={"num_frames": 3, "frame_pool": 3, "frame_text": "w{number} "})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = [p(text=["<video> w9"], videos=frames(7), return_tensors="pt") for p in (processor, loaded_processor)]
    for key in inputs[0]:
        assert torch.equal(inputs[0][key], inputs[1][key])
    assert len(features(loaded, inputs[1])[0]) == 4  # 4 x 4 by threes, rounded up
    assert torch.equal(logits(model, inputs[0]), logits(loaded, inputs[1]))


def test_views_of_other_pictures_are_refused(plain):
    model, processor = plain
    inputs = processor(text=["<video> w1"], videos=frames(4), return_tensors="pt")
    with pytest.raises(ValueError, match="stands for 5 views.*pixel_values has 4"):
        model(**{**inputs, "num_video_frames": torch.tensor([5])})


def test_training_step(plain):
    model, processor = plain
    inputs = processor(text=["<video> w1 w2"], videos=frames(2), return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model.train()
    model(**inputs, labels=labels).loss.backward()
    gradient = next(model.multi_modal_projector.parameters()).grad
    model.zero_grad()
    model.eval()
    assert gradient.abs().max() > 0
