"""Several vision towers that see the same pictures.

The oracle is each bare tower, called with what its own image processor makes.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from remote_checkpoints import write_remote_part
from test_checkpoint import check_three_generations
from tiny_parts import text_config, tiny_tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.composed_model import ComposedModel
from anyvlm.compatibility.model_under_test import picture
from anyvlm.modeling.vision_towers import build_vision_tower
from anyvlm.publishing.model_card import read_parts


PICTURES = [picture(0, (70, 90)), picture(1, (200, 64))]

#: Other means, deviations and kinds of resizing, so that a tower that gets the other's pictures shows.
CLIP_LIKE = CLIPImageProcessorPil(
    size={"height": 32, "width": 32},
    do_center_crop=False,
    image_mean=list(IMAGENET_DEFAULT_MEAN),
    image_std=list(IMAGENET_DEFAULT_STD),
)


def siglip_like(edge: int) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": edge, "width": edge})


def towers(second_size: int = 32) -> list:
    torch.manual_seed(0)
    second = tiny_configs.vision_config("siglip_vision_model")
    second.image_size = second_size
    return [build_vision_tower(config).eval() for config in (tiny_configs.vision_config("dinov2"), second)]


def compose(vision, **kwargs):
    return anyvlm.compose(vision=vision, text=text_config("llama"), tokenizer=tiny_tokenizer(), **kwargs)


def features_of(model, processor, images=PICTURES) -> torch.Tensor:
    inputs = processor(text="<image>" * len(images), images=images, return_tensors="pt")
    with torch.no_grad():
        return model.get_image_features(inputs["pixel_values"]).last_hidden_state


def own_features(tower, image_processor, images=PICTURES, layer=None) -> torch.Tensor:
    """All tokens of the bare tower."""
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = tower(pixel_values, output_hidden_states=True)
    return outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]


class TestFeatures:
    def test_each_tower_gets_its_own_pictures(self):
        first, second = towers()
        model, processor = compose((first, second), image_processor=[CLIP_LIKE, siglip_like(32)])
        expected = [own_features(first, CLIP_LIKE)[:, 1:], own_features(second, siglip_like(32))]
        assert torch.equal(features_of(model, processor), torch.cat(expected, dim=-1))
        assert model.config.projector_config["in_features"] == sum(own.shape[-1] for own in expected)

    def test_other_size_and_grid(self):
        """48 pixels are 6x6 patches, brought to the first tower's 4x4; the first tower's own are untouched."""
        first, second = towers(second_size=48)
        model, processor = compose((first, second), image_processor=[CLIP_LIKE, siglip_like(48)])
        found = features_of(model, processor)
        own = own_features(second, siglip_like(48))
        maps = own.transpose(1, 2).reshape(2, -1, 6, 6)
        maps = torch.nn.functional.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False)
        expected = [own_features(first, CLIP_LIKE)[:, 1:], maps.flatten(2).transpose(1, 2)]
        assert torch.equal(found, torch.cat(expected, dim=-1))

    def test_by_token(self):
        first, second = towers(second_size=48)
        model, processor = compose(
            (first, second), image_processor=[CLIP_LIKE, siglip_like(48)], vision_fusion="token"
        )
        found = features_of(model, processor)
        width = first.config.hidden_size
        assert torch.equal(found[:, :16, :width], own_features(first, CLIP_LIKE)[:, 1:])
        assert torch.equal(found[:, 16:, width:], own_features(second, siglip_like(48)))
        assert not found[:, :16, width:].any() and not found[:, 16:, :width].any()
        assert processor._get_num_multimodal_tokens([(70, 90)]).num_image_tokens == [16 + 36]

    def test_layers_and_tokens_of_each_tower(self):
        first, second = towers()
        model, processor = compose(
            (first, second),
            image_processor=[CLIP_LIKE, siglip_like(32)],
            vision_feature_layer=[[-2, -1], None],
            vision_feature_select_strategy=["default", "full"],
        )
        expected = [
            own_features(first, CLIP_LIKE, layer=-2)[:, 1:],
            own_features(first, CLIP_LIKE, layer=-1)[:, 1:],
            own_features(second, siglip_like(32)),
        ]
        assert torch.equal(features_of(model, processor), torch.cat(expected, dim=-1))

    def test_three_towers_of_several_kinds(self):
        """A map, patches cut by the model, and a sequence with registers."""
        configs = [tiny_configs.vision_config(name) for name in ("resnet", "qwen2_5_vl_vision", "dinov3_vit")]
        model, processor = compose(tuple(configs), image_size=64)
        assert model.config.vision_tower_spec["grid"] == [2, 2]
        found = features_of(model, processor)
        inputs = processor(text="<image><image>", images=PICTURES, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model.vision_tower.towers[0](inputs[:, :3]).last_hidden_state.flatten(2).transpose(1, 2)
        assert torch.equal(found[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("fusion", ["channel", "token"])
class TestEverythingElse:
    @pytest.fixture
    def composed(self, fusion):
        configs = tuple(tiny_configs.vision_config(name) for name in ("dinov2", "clip_vision_model"))
        return ComposedModel(configs, text_config("llama"), 32, vision_fusion=fusion)

    def test_eight_checks(self, composed, tmp_path):
        composed.check_forward_is_finite()
        composed.check_picture_changes_logits()
        composed.check_gradients()
        composed.check_cached_generation_equals_uncached()
        assert composed.check_padding() == []
        composed.check_save_and_load(tmp_path)
        composed.check_text_only_equals_bare_language_model()
        composed.check_embeddings_equal_ids()
        assert composed.checkpointing_parts() == ["tower", "language model"]

    def test_one_frozen_tower_beside_one_that_is_trained(self, composed):
        model = composed.model.train()
        frozen, trained = model.vision_tower.towers
        frozen.requires_grad_(False)
        inputs = composed.one_picture()
        seen = {}
        for name, tower in {"frozen": frozen, "trained": trained}.items():
            tower.register_forward_hook(lambda module, _, out, name=name: seen.update({name: out.last_hidden_state}))
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert not seen["frozen"].requires_grad and seen["trained"].requires_grad
        assert not frozen.training and trained.training
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_three_generations_without_the_package(tmp_path):
    first, second = towers(second_size=48)
    model, processor = compose((first, second), image_processor=[CLIP_LIKE, siglip_like(48)])
    check_three_generations(model, processor, tmp_path)
    written = json.loads((tmp_path / "three" / "config.json").read_text())["vision_config"]
    assert [written[f"tower_{index}"]["model_type"] for index in (0, 1)] == ["dinov2", "siglip_vision_model"]
    names = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    assert {f"vision_tower.towers.1.{name}" for name in second.state_dict()} <= names.keys()


@pytest.mark.parametrize("fusion", ["embed", "cross_attention", "gated"])
@pytest.mark.parametrize("projector", ["pixel_shuffle", "resampler"])
@pytest.mark.parametrize("views", ["tiles", "slices"])
def test_with_every_part_of_an_architecture(views, projector, fusion):
    """Views of several sizes, each tower with its own: as many tokens as the processor says, and other pictures other
    logits."""
    first, second = towers(second_size=48)
    model, processor = compose(
        (first, second),
        image_processor=[CLIP_LIKE, siglip_like(48)],
        views=views,
        projector=projector,
        fusion=fusion,
    )
    texts = ["w1 <image> w2 <image> w3"]
    straight = processor(text=texts, images=PICTURES, return_tensors="pt")
    assert len(straight["pixel_values"]) > len(PICTURES)
    swapped = processor(text=texts, images=[PICTURES[0], PICTURES[1].rotate(180)], return_tensors="pt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)
        first, second = model(**straight).logits[0, -1], model(**swapped).logits[0, -1]
    assert torch.isfinite(first).all() and (first - second).abs().max() > 1e-4


def test_image_processor_is_saved_as_it_is(tmp_path):
    _, processor = compose(tuple(towers(48)), image_processor=[CLIP_LIKE, siglip_like(48)])
    processor.save_pretrained(tmp_path / "processor")
    processor.image_processor.save_pretrained(tmp_path / "alone")
    loaded = AutoProcessor.from_pretrained(tmp_path / "processor").image_processor
    alone = AutoImageProcessor.from_pretrained(tmp_path / "alone")
    expected = processor.image_processor(PICTURES, return_tensors="pt")["pixel_values"]
    for found in (loaded, alone):
        assert torch.equal(found(PICTURES, return_tensors="pt")["pixel_values"], expected)
        assert found.to_dict() == processor.image_processor.to_dict()


def test_transformers_knows_what_it_knows_of_each_tower():
    """Layers that are not split over devices, and modules that stay in fp32, are gathered from model to model."""
    parts = towers()
    layers = {"Dinov2Layer", "SiglipEncoderLayer"}
    model, _ = compose(tuple(parts))
    assert layers <= {type(module).__name__ for module in model.vision_tower.modules()}
    assert layers <= model._no_split_modules
    second = model.vision_tower.towers[-1]
    assert second is parts[1] and len(model.vision_tower.towers) == 2


def test_attention_of_each_tower():
    model, _ = compose(tuple(towers()))
    model.set_attn_implementation({"vision_config": {"tower_0": "eager", "tower_1": "sdpa"}})
    assert [tower.config._attn_implementation for tower in model.vision_tower.towers] == ["eager", "sdpa"]


def test_lora_reaches_the_tower_that_is_named():
    model, _ = compose(tuple(towers()))
    adapted = get_peft_model(model, LoraConfig(target_modules=r"vision_tower\.towers\.1\..*\.q_proj"))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("vision_tower.towers.1." in name for name in trained)


def test_model_card_names_both_towers(tmp_path):
    model, processor = compose(tuple(towers()))
    model.config.composed_from["vision"] = [{"id": "a/first", "license": "mit"}, {"id": "b/second", "license": None}]
    model.save_pretrained(tmp_path)
    first, second, *_ = read_parts(tmp_path)
    assert [first.title, first.model_type, first.hub_id, first.license] == [
        "Vision tower 1",
        "dinov2",
        "a/first",
        "mit",
    ]
    assert [second.title, second.model_type, second.hub_id] == ["Vision tower 2", "siglip_vision_model", "b/second"]
    assert first.parameters == model.vision_tower.towers[0].num_parameters()


class TestCheck:
    def test_numbers_are_those_of_the_model(self):
        configs = tuple(tower.config for tower in towers(48))
        report = anyvlm.check(configs, text_config("llama"), tokenizer=tiny_tokenizer(), vision_fusion="token")
        model, processor = compose(configs, vision_fusion="token")
        assert report.works is True, report
        assert report.parameters == model.num_parameters()
        assert report.tokens_per_picture == processor._get_num_multimodal_tokens([(9, 9)]).num_image_tokens[0]
        assert report.image_size == (48, 48) and report.one_size

    def test_instances_stay_as_they_are(self):
        parts = towers()
        before = [tower.training for tower in parts]
        assert anyvlm.check(tuple(parts), text_config("llama"), tokenizer=tiny_tokenizer()).works
        assert [tower.training for tower in parts] == before

    def test_refused_for_the_reason_that_compose_gives(self):
        report = anyvlm.check((towers()[0], text_config("llama")), text_config("llama"), tokenizer=tiny_tokenizer())
        with pytest.raises(anyvlm.CompositionError) as raised:
            compose((towers()[0], text_config("llama")))
        assert report.works is False and report.reasons == [str(raised.value)]


class TestRefusals:
    def test_features_without_places(self):
        with pytest.raises(anyvlm.CompositionError, match=r'1x17 and 6x6 features.*vision_fusion="token"'):
            compose(tuple(towers(48)), vision_feature_select_strategy="full")

    def test_neighbours_of_tokens_of_several_towers(self):
        """Features of both towers in one column are not above each other in the picture."""
        with pytest.raises(anyvlm.CompositionError, match="32 features of a picture are not in rows and columns"):
            compose(tuple(towers()), vision_fusion="token", projector="pixel_shuffle")

    def test_unknown_fusion(self):
        with pytest.raises(anyvlm.CompositionError, match=r"Unknown vision_fusion 'sum'.*channel, token"):
            compose(tuple(towers()), vision_fusion="sum")

    @pytest.mark.parametrize("name", ["vision_feature_layer", "image_processor"])
    def test_as_many_entries_as_towers(self, name):
        with pytest.raises(anyvlm.CompositionError, match=f"{name}=.* has 3 entries, but there are 2 towers"):
            compose(tuple(towers()), **{name: [None, None, None]})

    def test_code_of_its_own(self, tmp_path):
        write_remote_part(tmp_path / "tower", "tower")
        arguments = {"text": text_config("llama"), "tokenizer": tiny_tokenizer(), "trust_remote_code": True}
        vision = (towers()[0], str(tmp_path / "tower"))
        with pytest.raises(anyvlm.CompositionError, match="carried for a single tower only"):
            anyvlm.compose(vision=vision, **arguments)
        report = anyvlm.check(vision, **arguments)
        assert report.works is False and "carried for a single tower only" in report.reasons[0]

    def test_no_tower(self):
        with pytest.raises(anyvlm.CompositionError, match="names no tower"):
            compose(())
