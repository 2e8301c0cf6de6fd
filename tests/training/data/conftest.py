"""What tests of training data share: `datasets` keeps its files in a folder of the test, and pictures to load."""

import datasets
import pytest
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def collator():
    return anyvlm.AnyVlmDataCollator(
        anyvlm.compose(
            vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
        )[1]
    )


@pytest.fixture
def pictures(tmp_path):
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    return tmp_path
