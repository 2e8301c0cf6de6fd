"""The checks of a pair find what is broken. Each test breaks one thing of a model that works."""

import pytest
import torch

from anyvlm import CompositionError
from anyvlm.compatibility import pair_checks, tiny_configs
from anyvlm.compatibility.bare_language_model import bare_padding_works
from anyvlm.compatibility.composed_model import ComposedModel
from anyvlm.compatibility.pair_checks import CHECKS, check_pair


def test_a_pair_that_works():
    result = check_pair("clip_vision_model", "llama")
    assert (result.status, result.failed, result.marks, result.reason) == ("works", {}, [], None)
    assert result.details["tokens"] == 16
    assert result.details["layout"] == "sequence"
    assert min(result.details["parameters"].values()) > 10_000


def test_results_depend_on_the_seed_alone():
    results = [check_pair("resnet", "mamba", seed=3).to_dict() | {"seconds": 0} for _ in range(2)]
    assert results[0] == results[1]


def test_a_part_without_gradient_checkpointing_is_marked():
    assert check_pair("resnet", "llama").marks == ["no gradient checkpointing: tower"]


def test_refusals_come_with_their_reason(monkeypatch):
    def refuse(*args, **kwargs):
        raise CompositionError("These two cannot be joined.")

    monkeypatch.setattr(pair_checks, "ComposedModel", refuse)
    result = check_pair("clip_vision_model", "llama")
    assert (result.status, result.reason) == ("refused", "These two cannot be joined.")


def test_an_error_that_is_no_refusal_is_a_failure():
    result = check_pair("not_a_type", "llama")
    assert result.status == "fails"
    assert "not_a_type" in result.failed["builds"]


def test_a_missing_library_is_named():
    result = check_pair("timm_wrapper", "llama")
    if result.status == "works":
        pytest.skip("timm is installed here")
    assert (result.status, result.reason) == ("not tried", "timm is not installed")


class _Broken(ComposedModel):
    """A model that works, with one method of its composed model replaced."""

    break_model = staticmethod(lambda model: None)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.break_model(self.model)


def _forget_pictures(model):
    original = model.get_image_features

    def same_features(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.pooler_output = [torch.ones_like(tokens) for tokens in outputs.pooler_output]
        return outputs

    model.get_image_features = same_features


def _detach_projector(model):
    model.multi_modal_projector.register_forward_hook(lambda module, args, output: (output[0].detach(), output[1]))


def _add_to_logits(model):
    model.language_model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + 0.01)


def _count_calls(model):
    """Another answer at every call: neither saved nor cached generation can agree."""
    calls = iter(range(10_000))
    model.language_model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.roll(next(calls), -1)
    )


def _scale_features(model):
    original = model._language_model_inputs

    def scaled(*args, **kwargs):
        arguments, tokens = original(*args, **kwargs)
        if arguments.get("inputs_embeds") is not None:
            arguments["inputs_embeds"] = arguments["inputs_embeds"] * 1.1
        return arguments, tokens

    model._language_model_inputs = scaled


def _not_a_number(model):
    with torch.no_grad():
        model.multi_modal_projector.output_layer.weight[0, 0] = float("nan")


def _ignore_mask(model):
    original = model._language_model_inputs

    def without_mask(*args, **kwargs):
        arguments, tokens = original(*args, **kwargs)
        arguments.pop("attention_mask", None)
        return arguments, tokens

    model._language_model_inputs = without_mask


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (_not_a_number, "builds"),
        (_forget_pictures, "picture"),
        (_detach_projector, "gradients"),
        (_count_calls, "cache"),
        (_ignore_mask, "padding"),
        (_add_to_logits, "text"),
        (_count_calls, "save"),
        (_scale_features, "embeddings"),
    ],
)
def test_each_check_fails_on_what_it_is_for(monkeypatch, breakage, expected):
    monkeypatch.setattr(_Broken, "break_model", staticmethod(breakage))
    monkeypatch.setattr(pair_checks, "ComposedModel", _Broken)
    result = check_pair("clip_vision_model", "llama")
    assert result.status == "fails"
    assert expected in result.failed
    assert set(result.failed) <= set(CHECKS)


def test_padding_is_the_language_models_own_fault_only_if_it_fails_by_itself():
    torch.manual_seed(0)
    composed = ComposedModel(tiny_configs.vision_config("vit"), tiny_configs.text_config("llama"), 32)
    assert bare_padding_works(composed.bare_language_model, "left")
    assert bare_padding_works(composed.bare_language_model, "right")
    # Learned positions that the model counts by itself, padding included.
    composed = ComposedModel(tiny_configs.vision_config("vit"), tiny_configs.text_config("rwkv"), 32)
    assert not bare_padding_works(composed.bare_language_model, "left")
