"""Another tower in a trained model, without looking at pictures. The checks are those of the table of swaps."""

import logging

import pytest
import torch
from model_tester import picture
from tiny_parts import compose, make_sensitive, text_config, vision_config
from transformers import AutoModelForCausalLM, AutoProcessor, CLIPVisionConfig, SiglipVisionConfig

import anyvlm
from anyvlm.compatibility.model_under_test import set_gates
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native
from anyvlm.compatibility.swap_checks import Swap, TestedModel
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.parts import load_vision_tower
from anyvlm.composition.starting_scale import embedding_rms
from anyvlm.configuration.tile_layouts import TILE_LAYOUTS
from anyvlm.modeling.feature_alignment import AlignedProjector
from anyvlm.modeling.projectors import PROJECTORS
from anyvlm.swapping.feature_maps import core_projector
from anyvlm.swapping.vision_swap import swap_vision_tower


QFORMER = {
    "num_queries": 4,
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
#: Projector -> what of it changes for features of another width; and tokens of a picture of 4x4 features.
PROJECTOR_CASES = {
    "linear": ("linear", {"linear.weight"}, 16),
    "mlp": ("mlp", {"layers.0.weight"}, 16),
    "deep mlp": ({"type": "mlp", "num_layers": 3, "hidden_features": [24, 40]}, {"layers.0.weight"}, 16),
    "gated mlp": (
        {"type": "mlp", "gated": True, "hidden_act": "silu", "hidden_features": 24},
        {"layers.0.weight"},
        16,
    ),
    "mlp without bias": ({"type": "mlp", "bias": False}, set(), 16),
    "normed mlp": ({"type": "mlp", "norm": "layer_norm", "norm_every_layer": True}, set(), 16),
    "pixel_shuffle": ("pixel_shuffle", set(), 4),
    "patch_merger": ("patch_merger", set(), 4),
    "avg_pool": ({"type": "avg_pool", "tokens_per_side": 3}, set(), 9),
    "conv": ({"type": "conv", "num_convs": 1}, set(), 4),
    "resampler": ({"type": "resampler", "num_queries": 5}, set(), 5),
    "qformer": ({"type": "qformer", **QFORMER}, set(), 4),
    "identity": ("identity", set(), 16),
}


def tower(model_type: str = "resnet", seed: int = 5, **settings):
    """A tower whose every weight matters. A resnet's features are 40 wide, and 2x2 of pictures of 64x64 pixels."""
    config = vision_config(model_type)
    for name, value in settings.items():
        setattr(config, name, value)
    made = load_vision_tower(config, torch.float32, False).eval()
    make_sensitive(made, seed)
    return made


def trained(vision="clip_vision_model", text="llama", picture_size=(50, 40), **arguments) -> TestedModel:
    """A composed model whose every weight matters."""
    torch.manual_seed(0)
    model, processor = compose(vision, text, **arguments)
    make_sensitive(model.vision_tower, 2)
    make_sensitive(model.multi_modal_projector, 3)
    if model.fusion is not None:
        set_gates(model.fusion, 0.7)
    return TestedModel(model, processor, picture_size=picture_size)


def check(swap: Swap) -> None:
    """Everything but gradients and files, which take longest."""
    swap.new.check_forward_is_finite()
    swap.check_kept()
    swap.new.check_picture_changes_logits()
    swap.check_tokens()
    swap.check_text()
    swap.check_back()
    swap.check_old()


def tokens_of(tested: TestedModel, seed: int = 0) -> torch.Tensor:
    inputs = tested.one_picture(seed)
    with torch.no_grad():
        return tested.model.get_image_features(**tested.image_inputs(inputs)).pooler_output[0]


@pytest.mark.parametrize("name", PROJECTOR_CASES)
def test_every_projector(name):
    projector, changed, num_tokens = PROJECTOR_CASES[name]
    swap = Swap(trained(projector=projector), tower(), 64)
    check(swap)
    assert swap.changed_projector_tensors() == changed
    assert len(tokens_of(swap.old)) == len(tokens_of(swap.new)) == num_tokens
    assert swap.new.model.config.projector_config["aligned_grid"] == [4, 4]
    assert isinstance(swap.new.model.multi_modal_projector, AlignedProjector)


def test_every_type_of_projector_is_here():
    assert {p if isinstance(p, str) else p["type"] for p, _, _ in PROJECTOR_CASES.values()} == set(PROJECTORS)


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_fusions_stay(fusion):
    swap = Swap(trained(fusion=fusion), tower(), 64)
    check(swap)
    assert swap.new.model.fusion is swap.old.model.fusion


@pytest.mark.parametrize("layout", TILE_LAYOUTS)
def test_tiles_of_every_layout(layout):
    """A tower of twice the size gets tiles of twice the size, so a picture of twice the size gets as many."""
    settings = {"anyres": {}, "dynamic": {"max_tiles": 3}, "split": {}, "quarters": {}, "canvas": {"max_tiles": 4}}
    views = {"type": "tiles", "layout": layout, **settings.get(layout, {})}
    swap = Swap(trained(views=views, picture_size=(32, 64)), tower(), 64)
    check(swap)
    assert swap.new.model.config.image_views["view_size"] == [64, 64]
    counts = [
        each.processor._get_num_multimodal_tokens([size])["num_image_tokens"][0]
        for each, size in ((swap.old, (40, 90)), (swap.new, (80, 180)))
    ]
    assert counts[0] == counts[1] > 16
    assert (layout == "anyres") == hasattr(swap.new.model, "image_newline")


def test_slices():
    swap = Swap(trained(views={"type": "slices", "max_slices": 3}, picture_size=(32, 64)), tower(), 64)
    check(swap)
    assert swap.new.model.config.image_views["slice_size"] == 64


def test_native_sizes_stay_native_between_towers_that_take_them():
    old = trained("siglip2_vision_model", views={"type": "native", "max_tokens": 30})
    swap = Swap(old, tower("qwen2_5_vl_vision"), None)
    check(swap)
    assert swap.new.model.config.image_views["type"] == "native"
    assert swap.new.model.config.image_views["max_tokens"] == 30
    assert len(tokens_of(swap.new)) <= 30
    with pytest.raises(CompositionError, match='views="native" cannot be used.*Use views="tiles"'):
        Swap(old, tower("hiera"), 64)
    check(Swap(old, tower("hiera"), 64, views="resize"))


@pytest.mark.parametrize("same_weights", [True, False])
def test_whole_pictures_again_after_native_ones(same_weights):
    """In the size that the tower was made for, not in that of the cells that pictures were cut into."""
    model, processor = compose(views={"type": "native", "max_tokens": 40})
    assert model.config.image_views["cut_patches"]
    if same_weights:
        swapped, new_processor, _ = anyvlm.swap(model, processor, views="resize")
    else:
        new_tower = tower("clip_vision_model", 9)
        swapped, new_processor = swap_vision_tower(model, processor, new_tower, views="resize")
    assert swapped.config.vision_tower_spec["image_size"] == [32, 32]
    assert swapped.config.image_views is None
    assert len(tokens_of(TestedModel(swapped, new_processor))) == 16
    kept, _ = swap_vision_tower(model, processor, tower("clip_vision_model", 9))
    assert kept.config.image_views == model.config.image_views


def test_towers_of_pictures_of_any_size_and_of_one():
    """Where pictures have no one grid there is none to be kept."""
    for old, new, size in (("siglip2_vision_model", "resnet", 64), ("resnet", "qwen2_vl_vision", None)):
        swap = Swap(trained(old), tower(new), size)
        check(swap)
        assert "aligned_grid" not in swap.new.model.config.projector_config


@pytest.mark.parametrize("vision_fusion", ["channel", "token"])
def test_several_towers(vision_fusion):
    """One for two and, by `check_back`, two for one."""
    pair = (tower("dinov2"), tower("clip_vision_model", 6))
    if vision_fusion == "token":
        pair = (pair[0], tower("siglip_vision_model", 6))
    old = trained()
    swap = Swap(old, pair, 32, vision_fusion=vision_fusion)
    check(swap)
    two = TestedModel(swap.new.model, swap.new.processor)
    assert len(tokens_of(two)) == (16 if vision_fusion == "channel" else 32)
    back = Swap(two, tower("dinov2", 9), 32)
    check(back)
    origins = back.new.model.config.composed_from["vision"]
    assert not isinstance(origins, list)


def test_same_tower_is_the_same_model():
    """The tower itself, swapped in, changes nothing at all."""
    for arguments in ({}, {"image_tokens": "own"}):
        old = trained(vision_feature_layer=-2, vision_feature_select_strategy="full", image_size=32)
        swap = Swap(old, old.model.vision_tower, None, **arguments)
        check(swap)
        assert torch.equal(swap.new.logits(swap.new.one_picture()), swap.had_logits)
        before, after = old.model.config.to_dict(), swap.new.model.config.to_dict()
        assert {key: value for key, value in before.items() if key != "composed_from"} == {
            key: value for key, value in after.items() if key != "composed_from"
        }
        assert swap.new.processor.to_dict() == old.processor.to_dict()


def test_a_tuned_tower_keeps_the_projector_bit_for_bit():
    """Same type, other weights: also the size of pictures and the layer are those of before."""
    old = trained("siglip_vision_model", image_size=64, vision_feature_layer=-2)
    assert old.model.config.vision_tower_spec["grid"] == [8, 8]
    swap = Swap(old, tower("siglip_vision_model", 9), None)
    check(swap)
    assert not swap.changed_projector_tensors()
    assert not isinstance(swap.new.model.multi_modal_projector, AlignedProjector)
    assert swap.new.model.config.vision_tower_spec["image_size"] == [64, 64]
    assert swap.new.model.config.vision_feature_layer == -2
    # Another type knows neither.
    swap = Swap(old, tower(), None)
    assert swap.new.model.config.vision_feature_layer is None


def test_other_size_of_pictures():
    old = trained("siglip_vision_model")
    kept = Swap(old, tower("siglip_vision_model", 9), 64)
    check(kept)
    assert kept.new.model.config.vision_tower_spec["grid"] == [8, 8]
    assert len(tokens_of(kept.new)) == 16
    own = Swap(old, tower("siglip_vision_model", 9), 64, image_tokens="own")
    check(own)
    assert len(tokens_of(own.new)) == 64
    assert not isinstance(own.new.model.multi_modal_projector, AlignedProjector)


def test_swapped_twice_is_swapped_once():
    """What aligned the features of the tower in between is gone; the grid is still the first one's."""
    old = trained(projector="resampler")
    first = Swap(old, tower(), 64)
    second = Swap(TestedModel(first.new.model, first.new.processor), tower("siglip_vision_model", 9), 64)
    check(second)
    config = second.new.model.config.projector_config
    assert config == {**old.model.config.projector_config, "aligned_grid": [4, 4]}
    tensors = core_projector(second.new.model.multi_modal_projector).state_dict()
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in old.model.multi_modal_projector.state_dict().items()
    )


def test_new_map_gives_values_of_the_size_that_the_projector_knows():
    """Whatever the size of the new features, and also where it is folded."""
    for projector in ("mlp", "pixel_shuffle"):
        old = trained(projector=projector)
        for scale in (1e-3, 1e3):
            new = tower("siglip_vision_model", 9, hidden_size=48)
            new.post_layernorm.weight.data.mul_(scale)
            new.post_layernorm.bias.data.mul_(scale)
            swap = Swap(old, new, 32)
            before, after = (tokens_of(each).std(0).mean() for each in (swap.old, swap.new))
            assert 0.3 < before / after < 3


@pytest.mark.parametrize("fusion", ["embed", "gated"])
def test_another_projector_is_new(fusion):
    """And all else stays, also what is scaled to fit a projector when composing."""
    old = trained(fusion=fusion, views="tiles", picture_size=(32, 64))
    swap = Swap(old, tower(), 64, projector={"type": "avg_pool"})
    check(swap)
    config = swap.new.model.config.projector_config
    assert config == {"type": "avg_pool", "in_features": 40, "out_features": 32}
    rms = tokens_of(swap.new).square().mean().sqrt() / embedding_rms(old.model.language_model)
    assert 0.3 < rms < 3


def test_precision_and_mode_are_the_models():
    model, processor = compose(dtype=torch.bfloat16)
    new_tower = tower()
    swapped, _ = swap_vision_tower(model.train(), processor, new_tower, image_size=64)
    assert {parameter.dtype for parameter in swapped.parameters()} == {torch.bfloat16}
    assert swapped.config.dtype == torch.bfloat16
    assert swapped.training


def test_chance_is_the_seeds():
    model, processor = compose()
    weights = [
        swap_vision_tower(model, processor, vision_config("resnet"), image_size=64, seed=seed)[0].state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    state = torch.get_rng_state()
    swap_vision_tower(model, processor, vision_config("resnet"), image_size=64)
    assert torch.equal(torch.get_rng_state(), state)


def test_videos_go_on():
    """Detectors' queries have no neighbours; a tower of clips has settings of its own."""
    model, processor = compose(video_frames={"num_frames": 4, "frame_pool": 4, "frame_text": "w1 {number}"})
    chosen = model.config.video_frames
    same, _ = swap_vision_tower(model, processor, vision_config("resnet"), image_size=64)
    assert same.config.video_frames == chosen
    queries, queries_processor = swap_vision_tower(model, processor, vision_config("detr"), image_size=64)
    assert queries.config.video_frames == {**chosen, "frame_pool": 1} == queries_processor.video_frames
    clips, _ = swap_vision_tower(model, processor, vision_config("vivit"), image_size=32)
    assert clips.config.video_frames["num_frames"] == clips.config.vision_tower_spec["num_frames"]
    back, _ = swap_vision_tower(clips, queries_processor, vision_config("clip_vision_model"), image_size=32)
    assert back.config.video_frames["frame_pool"] == 2


def test_instructions_go_on():
    """A projector that reads the instruction keeps its tokenizer."""
    old = trained(projector={"type": "qformer", "reads_text": True, **QFORMER})
    assert old.processor.qformer_tokenizer is not None
    check(Swap(old, tower(), 64))


def test_text_around_pictures_goes_on():
    old = trained(image_text={"start": "w1", "end": "w2"}, image_attention="prefix")
    swap = Swap(old, tower(), 64)
    check(swap)
    assert swap.new.processor.image_text == {"start": "w1", "end": "w2"}
    assert swap.new.model.config.image_attention == "prefix"


def test_after_saving_and_loading(tmp_path):
    """A trained model comes from a folder."""
    old = trained("siglip_vision_model", projector="pixel_shuffle", fusion="gated")
    old.model.save_pretrained(tmp_path)
    old.processor.save_pretrained(tmp_path)
    model, processor = AutoModelForCausalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    for parameter in model.parameters():  # weights mapped from a file are not aligned, and kernels then round else
        parameter.data = parameter.data.clone()
    swap = Swap(TestedModel(model, processor), tower(), 64)
    check(swap)
    swap.check_save(tmp_path, in_fresh_process=True)


def native_case(name: str):
    case = next(case for case in native_cases() if case.name == name)
    return anyvlm.from_native(*build_native(case, 0, case.ties[0]))


@pytest.mark.parametrize(
    "name", ["llava, clip tower", "paligemma", "qwen2_vl", "idefics3", "gemma3", "llava_next, clip tower"]
)
def test_imported_models(name):
    """How the language model is prompted stays; the old tower, put back, gives the imported model's logits."""
    old = TestedModel(*native_case(name), picture_size=(48, 96))
    swap = Swap(old, tower(), 64)
    check(swap)
    for setting in ("prompt_form", "pictures_first", "image_text", "chat_template", "image_token"):
        assert getattr(swap.new.processor, setting) == getattr(old.processor, setting)
    assert swap.new.model.config.image_attention == old.model.config.image_attention
    assert swap.new.model.generation_config is old.model.generation_config


LLAVA_TOWER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.mark.parametrize("config_class", [CLIPVisionConfig, SiglipVisionConfig])
def test_folded_into_llava_it_is_a_llava(config_class):
    model, processor = native_case("llava, clip tower")
    config = config_class(**LLAVA_TOWER, image_size=32, patch_size=8)
    # LLaVA knows no last norm, which siglip's last hidden state has, and all of a siglip's tokens are patches.
    layer = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    swapped, new_processor = swap_vision_tower(model, processor, config, image_size=32, **layer)
    native, native_processor = anyvlm.to_native(swapped, new_processor)  # which compares the logits
    assert type(native).__name__ == "LlavaForConditionalGeneration"
    inputs = native_processor(text="<image> w1 w2", images=picture(0), return_tensors="pt")
    ours = new_processor(text="<image> w1 w2", images=picture(0), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(native(**inputs).logits, swapped(**ours).logits, rtol=1e-5, atol=1e-5)


def test_what_is_aligned_is_no_native_class():
    model, processor = native_case("llava, clip tower")
    config = CLIPVisionConfig(**LLAVA_TOWER, image_size=64, patch_size=8)
    swapped, new_processor = swap_vision_tower(model, processor, config, image_size=64)
    with pytest.raises(CompositionError, match="without bringing them to a grid of 4x4 first") as refusal:
        anyvlm.to_native(swapped, new_processor)
    assert 'image_tokens="own"' in str(refusal.value)
    wider, wider_processor = swap_vision_tower(*native_case("gemma3"), config, image_size=64)
    with pytest.raises(CompositionError, match="without mapping them to a width of 32 first"):
        anyvlm.to_native(wider, wider_processor)
    own, own_processor = swap_vision_tower(model, processor, config, image_size=64, image_tokens="own")
    assert type(anyvlm.to_native(own, own_processor)[0]).__name__ == "LlavaForConditionalGeneration"


def test_what_cannot_be_is_refused():
    model, processor = compose()
    config = vision_config("resnet")

    def refused(error, match, vision=config, **arguments):
        with pytest.raises(error, match=match):
            swap_vision_tower(model, processor, vision, **{"image_size": 64, **arguments})

    refused(CompositionError, "Unknown image_tokens 'all'. Choose one of: keep, own", image_tokens="all")
    refused(ValueError, "Unknown projector 'perceiver'. Choose one of", projector={"type": "perceiver"})
    refused(ValueError, "cannot be built", projector={"type": "mlp", "depth": 3})
    refused(
        CompositionError, "cannot be cut into squares of 3x3", projector={"type": "pixel_shuffle", "scale_factor": 3}
    )
    refused(CompositionError, "An identity projector leaves", projector={"type": "identity"})
    refused(CompositionError, "Unknown views", views="mosaic")
    refused(TypeError, "must be a Hub id", vision=None)
    refused(CompositionError, "names no tower", vision=())
    refused(CompositionError, "takes something else|language model", vision=text_config("llama"))
    refused(CompositionError, "Unknown vision_fusion", vision=(config, config), vision_fusion="sum")


def test_room_for_text(caplog):
    """As when composing: refused where nothing is left, a warning where little is."""
    text = text_config("llama")
    text.max_position_embeddings = 24
    model, processor = compose(text=text)
    siglip = vision_config("siglip_vision_model")
    with pytest.raises(CompositionError, match="takes 64 tokens, and the language model has 24 positions"):
        swap_vision_tower(model, processor, siglip, image_size=64, image_tokens="own")
    with caplog.at_level(logging.WARNING):
        swap_vision_tower(model, processor, siglip, image_size=64)
    assert "takes 16 of the 24 positions" in caplog.text


def test_other_views_get_a_newline_of_the_size_of_words():
    old = trained()
    swap = Swap(old, tower(), 64, views="tiles")
    check(swap)
    rms = swap.new.model.image_newline.square().mean().sqrt() / embedding_rms(old.model.language_model)
    assert 0.5 < rms < 2
