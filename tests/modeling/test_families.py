"""Every tower with a fixed language model, every language model with a fixed tower, all checks of the shared tester."""

import pytest
from model_tester import ALL_LANGUAGE_MODELS, ALL_TOWERS, ComposedModelTester
from tiny_parts import TOWERS


PAIRS = [(tower, "llama") for tower in ALL_TOWERS] + [
    ("clip_vision_model", text) for text in ALL_LANGUAGE_MODELS if text != "llama"
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "+".join(pair))
def tester(request):
    return ComposedModelTester(*request.param)


def test_forward_is_finite(tester):
    tester.check_forward_is_finite()


def test_picture_changes_logits(tester):
    tester.check_picture_changes_logits()


def test_picture_order_matters(tester):
    tester.check_picture_order_matters()


def test_gradients(tester):
    tester.check_gradients()


def test_cached_generation_equals_uncached(tester):
    tester.check_cached_generation_equals_uncached()


def test_padding(tester):
    tester.check_padding()


def test_text_only_equals_bare_language_model(tester):
    tester.check_text_only_equals_bare_language_model()


def test_embeddings_equal_ids(tester):
    tester.check_embeddings_equal_ids()


def test_loss_is_the_language_models_own(tester):
    tester.check_loss_is_the_language_models_own()


def test_save_and_load(tester, tmp_path):
    """Last: it resizes the tester's model."""
    tester.check_save_and_load(tmp_path)


@pytest.mark.parametrize("tower", ALL_TOWERS)
def test_patches_are_found(tower):
    """The probe against what each family's documentation says about its tokens."""
    spec = ComposedModelTester(tower).model.config.vision_tower_spec
    size, beside_patches, grid = TOWERS[tower]
    assert (spec["num_prefix_tokens"], spec["num_suffix_tokens"]) == beside_patches
    assert tuple(spec["grid"]) == grid
    assert spec["image_size"] == [size, size]
