"""Towers that are timm's models: read as timm describes them, saved without timm's files, and never downloaded.

timm imports torchvision, and transformers counts timm as missing where torchvision is. These tests need timm alone.
"""

import json
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_parts import text_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoProcessor, TimmBackbone, TimmBackboneConfig, TimmWrapperConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_timm_available

import anyvlm
from anyvlm.compatibility.pair_checks import check_pair


if not is_timm_available():
    pytest.skip("timm (with torchvision, which it imports) is not installed", allow_module_level=True)

import timm  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No weights may be downloaded: random ones are made from a config, and others are in the checkpoint."""

    def refuse(*args, **kwargs):
        raise AssertionError("Something was to be downloaded.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def timm_checkpoint(tmp_path):
    """A folder as timm's repositories on the Hub are: its own `config.json`, and weights under timm's own names."""

    def write(architecture, **described):
        model = timm.create_model(architecture)
        folder = tmp_path / architecture
        folder.mkdir()
        pretrained_cfg = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], **described}
        config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": pretrained_cfg}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        return folder, model.eval()

    return write


def compose(vision, **arguments):
    text = text_config("llama")
    text.max_position_embeddings = 1024
    return anyvlm.compose(vision=vision, text=text, tokenizer=tiny_tokenizer(), **arguments)


def picture(height=50, width=70):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    "model_type", ["timm_wrapper", "timm_backbone", "edgetam_vision_model", "edgetam", "pe_video_encoder"]
)
def test_type_passes_every_check(model_type):
    result = check_pair(model_type, "llama")
    assert (result.status, result.failed) == ("works", {})


#: architecture -> (pictures' size, how timm gives features, tokens that are no patches, grid), as timm documents them
ARCHITECTURES = {
    "resnet18": (224, "NCHW", 0, [7, 7]),
    "convnext_atto": (224, "NCHW", 0, [7, 7]),
    "swin_tiny_patch4_window7_224": (224, "NHWC", 0, [7, 7]),
    "swinv2_cr_tiny_ns_224": (224, "NCHW", 0, [7, 7]),
    "vit_tiny_patch16_224": (224, "NLC", 1, [14, 14]),
    "vit_tiny_patch16_384": (384, "NLC", 1, [24, 24]),
    "deit_tiny_distilled_patch16_224": (224, "NLC", 2, [14, 14]),
    "vit_small_patch16_dinov3": (256, "NLC", 5, [16, 16]),
    "eva02_tiny_patch14_224": (224, "NLC", 1, [16, 16]),
    "mobilevit_xxs": (256, "NCHW", 0, [8, 8]),
    "inception_v3": (299, "NCHW", 0, [8, 8]),
    "hiera_tiny_224": (224, "NLC", 0, [7, 7]),
    "levit_128s": (224, "NLC", 0, [4, 4]),
}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_features_are_those_of_timm(architecture):
    size, form, num_prefix_tokens, grid = ARCHITECTURES[architecture]
    model, processor = compose(TimmWrapperConfig(architecture=architecture))
    spec = model.config.vision_tower_spec
    wrapped = model.vision_tower.timm_model
    assert (spec["image_size"], spec["num_prefix_tokens"], spec["grid"]) == ([size, size], num_prefix_tokens, grid)
    assert (getattr(wrapped, "num_prefix_tokens", None) or 0) == num_prefix_tokens
    projected = []
    model.multi_modal_projector.register_forward_pre_hook(lambda module, arguments: projected.append(arguments[0]))
    pixel_values = processor(text="<image> a", images=[picture()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.eval().get_image_features(pixel_values)
        features = wrapped.forward_features(pixel_values)
    if form == "NCHW":
        features = features.permute(0, 2, 3, 1)
    expected = features[:, num_prefix_tokens:] if form == "NLC" else features.flatten(1, 2)
    assert torch.equal(projected[0].reshape(1, -1, wrapped.num_features), expected)


class TestImageProcessor:
    def test_that_of_the_checkpoint(self, timm_checkpoint, caplog):
        folder, _ = timm_checkpoint("resnet18", interpolation="bicubic")
        _, processor = compose(folder)
        made = processor.image_processor
        assert dict(made.size)["height"] == dict(made.size)["width"] == 96
        assert (list(made.image_mean), list(made.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert made.resample == Image.Resampling.BICUBIC
        assert "image processor" not in caplog.text
        image = picture()
        resized = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        expected = (resized - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
        found = made(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_that_of_the_architecture(self):
        described = timm.create_model("resnet18", features_only=True).pretrained_cfg
        _, processor = compose(TimmBackbone(TimmBackboneConfig(backbone="resnet18")))
        assert tuple(processor.image_processor.image_mean) == described["mean"] != (0.5, 0.5, 0.5)

    def test_size_that_was_asked_of_timm(self):
        config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"img_size": 64})
        model, _ = compose(config)
        assert model.config.vision_tower_spec["grid"] == [4, 4]

    def test_one_that_cannot_be_saved(self):
        class WithTransforms(BaseImageProcessor):
            """As transformers' wrapper of timm's transforms: what it is made of is not what it writes."""

            def __init__(self, pretrained_cfg, **kwargs):
                super().__init__(**kwargs)

        with pytest.raises(anyvlm.CompositionError, match="Leave image_processor out"):
            compose(TimmWrapperConfig(architecture="resnet18"), image_processor=WithTransforms({}))


class TestWeights:
    def test_checkpoint_of_timm(self, timm_checkpoint, tmp_path):
        folder, original = timm_checkpoint("resnet18")
        model, processor = compose(folder)
        inputs = processor(text="<image> a", images=[picture()], return_tensors="pt")
        with torch.no_grad():
            expected = original.forward_features(inputs["pixel_values"])
            found = model.vision_tower(inputs["pixel_values"]).last_hidden_state
            logits = model.eval()(**inputs).logits
        assert torch.equal(found, expected)

        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
        with torch.no_grad():
            found = loaded(**again(text="<image> a", images=[picture()], return_tensors="pt")).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
        loaded.save_pretrained(tmp_path / "again")
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "again")]
        assert configs[0]["vision_config"] == configs[1]["vision_config"]
        assert configs[0]["vision_config"]["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]

    def test_saved_backbone(self, tmp_path):
        """Its own `from_pretrained` takes the folder for a name of timm's weights."""
        backbone = TimmBackbone(TimmBackboneConfig(backbone="resnet18"))
        backbone.save_pretrained(tmp_path)
        model, _ = compose(tmp_path)
        assert model.vision_tower.config.backbone == "resnet18"
        weights = model.vision_tower.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("config", [TimmWrapperConfig, TimmBackboneConfig])
def test_check_needs_no_weights(config):
    name = {TimmWrapperConfig: "architecture", TimmBackboneConfig: "backbone"}[config]
    report = anyvlm.check(config(**{name: "resnet18"}), text_config("llama"), tokenizer=tiny_tokenizer())
    assert (report.works, report.tokens_per_picture) == (True, 49)


def test_architecture_of_several_scales_is_refused():
    with pytest.raises(anyvlm.CompositionError, match="no features of places"):
        compose(TimmWrapperConfig(architecture="crossvit_tiny_240"))
