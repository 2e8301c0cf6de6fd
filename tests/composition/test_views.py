"""Models whose pictures are cut into views: processor and model agree on the tokens of pictures of any size."""

import pytest
import torch
from model_tester import picture
from picture_sizes import random_sizes
from PIL import Image
from tiny_parts import compose
from transformers import AutoModelForCausalLM, MiniCPMV4_6ImageProcessorPil, Qwen2VLImageProcessorPil

from anyvlm import AnyVlmConfig
from anyvlm.compatibility import tiny_configs
from anyvlm.composition.errors import CompositionError
from anyvlm.configuration.image_views import depends_on_pictures, has_several_views, num_image_tokens, plan_views
from anyvlm.processing.view_cutting import cut_views


VIEWS = {
    "resize": None,
    "anyres": {"type": "tiles", "layout": "anyres"},
    "anyres_max_2": {"type": "tiles", "layout": "anyres", "max_merged_tiles": 2},
    "anyres_concat": {"type": "tiles", "layout": "anyres", "join": "concat"},
    "anyres_if_alone": {"type": "tiles", "layout": "anyres", "several": "whole"},
    "dynamic": {"type": "tiles", "layout": "dynamic"},
    "dynamic_scale": {"type": "tiles", "layout": "dynamic", "fit": "scale", "thumbnail": False},
    "split": {"type": "tiles", "layout": "split"},
    "quarters": {"type": "tiles", "layout": "quarters"},
    "pan_and_scan": {"type": "tiles", "layout": "pan_and_scan"},
    "canvas": {"type": "tiles", "layout": "canvas", "max_tiles": 6},
    "slices": {"type": "slices"},
}
#: Among them what a picture may be at its worst: one pixel, a line, a thin strip, and sizes just beside those of tiles.
END_TO_END = [(1, 1), (1, 2), (2, 1), (1, 700), (700, 1), (3, 640), (640, 3), (32, 32), (31, 33), (33, 31), (64, 64)]
END_TO_END += [(65, 63), (32, 64), (96, 32), (200, 200), (50, 333), (333, 50), (500, 400), (4096, 9), (1024, 768)]


@pytest.fixture(scope="module", params=VIEWS)
def model_and_processor(request):
    return compose("siglip_vision_model", views=VIEWS[request.param])


@pytest.fixture(scope="module", params=["minicpmv4_6_vision", "qwen2_vl_vision"])
def sliced(request):
    """Towers that take slices in the sizes of the plan."""
    image_processor = {
        "minicpmv4_6_vision": MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64),
        "qwen2_vl_vision": Qwen2VLImageProcessorPil(patch_size=8),
    }[request.param]
    views = {"type": "slices", "slice_size": 48, "max_slices": 4}
    tower = tiny_configs.vision_config(request.param)
    return compose(tower, views=views, image_processor=image_processor)


def image_inputs(inputs):
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}


def check_any_size(model, processor, sizes):
    """Counts before processing, what the text has, and what the model makes of the views that were cut."""
    counts = processor._get_num_multimodal_tokens(sizes)
    assert counts.num_image_tokens == [num_image_tokens(model.config, *size) for size in sizes]
    for start in range(0, len(sizes), 100):
        chunk = sizes[start : start + 100]
        plans = [plan_views(processor.image_views, *size) for size in chunk]
        # Without contents, and by the nearest pixel: a view's size does not depend on that.
        pictures = [Image.new("L", (width, height), None) for height, width in chunk]
        views = [cut_views(picture, plan, Image.Resampling.NEAREST) for picture, plan in zip(pictures, plans)]
        assert list(map(len, views)) == counts.num_image_patches[start : start + 100]
        flat = [view for picture in views for view in picture]
        assert all(min(view.size) > 0 for view in flat)
        if has_several_views(processor.image_views) and processor.image_views["view_size"] is None:
            flat = [view.convert("RGB") for view in flat]
            outputs = processor.image_processor(flat, return_tensors="pt", do_resize=False)
            outputs = {key: outputs[key] for key in processor.model_input_names if key in outputs}
        else:  # the image processor brings views of any size to one
            one = processor.image_processor([Image.new("RGB", (9, 9))], return_tensors="pt")["pixel_values"]
            outputs = {"pixel_values": one.expand(len(flat), *one.shape[1:])}
        if has_several_views(processor.image_views):
            more = [1] if depends_on_pictures(processor.image_views) else []
            outputs["original_sizes"] = torch.tensor([[*size, *more] for size in chunk])
        with torch.no_grad():
            tokens = model.get_image_features(**outputs).pooler_output
        expected = counts.num_image_tokens[start : start + 100]
        assert list(map(len, tokens)) == expected
        texts = processor.picture_texts(outputs)
        assert [text.count(processor.image_token) for text in texts] == expected


def check_end_to_end(model, processor, sizes):
    for size in sizes:
        inputs = processor(text=["w1 <image> w2"], images=[picture(0, size)], return_tensors="pt")
        expected = num_image_tokens(model.config, *size)
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == expected
        with torch.no_grad():
            assert [len(tokens) for tokens in model.get_image_features(**image_inputs(inputs)).pooler_output] == [
                expected
            ]


def test_processor_and_model_agree_on_1000_sizes(model_and_processor):
    check_any_size(*model_and_processor, random_sizes())


def test_processor_and_model_agree_end_to_end(model_and_processor):
    check_end_to_end(*model_and_processor, END_TO_END)


def test_slices_of_their_own_sizes_agree_on_1000_sizes(sliced):
    model, processor = sliced
    assert model.config.image_views["view_size"] is None
    check_any_size(model, processor, random_sizes())


def test_slices_of_their_own_sizes_agree_end_to_end(sliced):
    check_end_to_end(*sliced, END_TO_END)


def test_a_padded_batch_is_each_sample_alone(model_and_processor):
    model, processor = model_and_processor
    texts = ["w1 <image> w2", "<image> w3 w4 <image> w5 w6"]
    pictures = [[picture(0, (90, 40))], [picture(1, (20, 100)), picture(2, (64, 64))]]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(2):
            alone = model(**processor(text=[texts[row]], images=[pictures[row]], return_tensors="pt")).logits[0]
            torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, rtol=1e-4, atol=1e-5)


def test_pictures_are_cut_only_where_they_are_alone():
    """LLaVA-OneVision's rule, whether the pictures come in one list or in one for each text."""
    model, processor = compose(views=VIEWS["anyres_if_alone"])
    texts, a, b, c = ["<image> w1 <image>", "<image> w2"], *(picture(seed, (90, 40)) for seed in range(3))
    nested = processor(text=texts, images=[[a, b], [c]], padding=True, return_tensors="pt")
    flat = processor(text=texts, images=[a, b, c], padding=True, return_tensors="pt")
    assert nested["original_sizes"].tolist() == [[90, 40, 2], [90, 40, 2], [90, 40, 1]]
    assert all(torch.equal(nested[key], flat[key]) for key in nested)
    with torch.no_grad():
        tokens = [len(found) for found in model.get_image_features(**image_inputs(nested)).pooler_output]
    assert tokens == [num_image_tokens(model.config, 90, 40, pictures=pictures) for pictures in (2, 2, 1)]
    assert tokens[0] == 16 + 1 < tokens[2]
    nested["original_sizes"] = nested["original_sizes"][:, :2]
    with pytest.raises(ValueError, match=r"must be \(num_images, 3\)"):
        model(**nested)


def test_every_view_reaches_the_logits(model_and_processor):
    model, processor = model_and_processor
    inputs = processor(text=["<image> w1 w2"], images=[picture(0, (90, 40))], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits[0, -1]
        for view in range(len(inputs["pixel_values"])):
            pixel_values = inputs["pixel_values"].clone()
            pixel_values[view] = pixel_values[view].flip(-1) + 1
            after = model(**{**inputs, "pixel_values": pixel_values}).logits[0, -1]
            assert (after - before).abs().max() > 1e-5, view


@pytest.mark.parametrize("tower", ["convnext", "vivit", "siglip2_vision_model", "pixtral"])
@pytest.mark.parametrize("views", [{"type": "tiles", "layout": "dynamic", "max_tiles": 3}, "slices"])
def test_views_go_with_any_tower(tower, views):
    model, processor = compose(tiny_configs.vision_config(tower), views=views, image_size=32)
    check_end_to_end(model, processor, [(1, 1), (90, 30), (64, 64)])


def test_views_train_with_their_newline():
    model, processor = compose(views="tiles")
    inputs = processor(text=["w1 <image> w2"], images=[picture(0, (90, 40))], return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.image_newline.grad.abs().max() > 0


def test_a_newline_that_is_missing_is_an_error(tmp_path):
    """It would be random otherwise."""
    model, _ = compose(views={"type": "tiles", "join": "concat"})
    model.save_pretrained(tmp_path)
    config = AnyVlmConfig.from_pretrained(tmp_path)
    config.image_views["join"] = "spatial"
    with pytest.raises(ValueError, match="lacks 1 weights of the model: image_newline"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_tokens_of_queries_are_not_merged_into_a_map():
    model, _ = compose(views="tiles", projector={"type": "resampler", "num_queries": 4})
    assert model.config.image_views["join"] == "concat"


def test_resize_is_what_is_done_without_views():
    with_views, processor = compose(views="resize")
    assert with_views.config.image_views is None and processor.image_views is None
    assert "original_sizes" not in processor.model_input_names


def test_pictures_without_their_sizes_are_refused():
    model, processor = compose(views="tiles")
    inputs = processor(text=["<image>"], images=[picture(0)], return_tensors="pt")
    inputs.pop("original_sizes")
    with pytest.raises(ValueError, match="original_sizes says which views"):
        model(**inputs)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ("tile", "Unknown views 'tile'"),
        ({"layout": "anyres"}, "Unknown views None"),
        ({"type": "tiles", "layout": "mosaic"}, "Unknown layout of tiles 'mosaic'"),
        ({"type": "tiles", "join": "add"}, "Unknown join of views 'add'"),
        (
            {"type": "tiles", "several": "first", "background": [0, 0, 0]},
            "Unknown treatment of several pictures 'first'",
        ),
        ({"type": "tiles", "layout": "split", "longest_edge": 4000}, "Even a small picture takes .* fewer tiles"),
    ],
)
def test_wrong_views_are_refused(views, message):
    with pytest.raises(CompositionError, match=message):
        compose(views=views)


def test_more_tokens_than_half_the_context_are_warned_about(caplog):
    compose(views={"type": "tiles", "layout": "dynamic", "max_tiles": 12})
    assert "up to 208 of the 256 positions" in caplog.text
    assert "fewer tiles" in caplog.text
