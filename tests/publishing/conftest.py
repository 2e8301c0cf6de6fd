"""A tiny composed checkpoint, and what a fresh process would say about it."""

import os
import shutil

import pytest
from remote_checkpoints import use_remote_image_processor, use_remote_tokenizer, write_remote_part
from tiny_parts import make_sensitive, text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.publishing.fresh_process import MODEL_CLASSES, FreshCheck


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_fresh_process():
    """Tiny models gain nothing from threads that fight with the tests' own."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session")
def composed():
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"),
        text=text_config("llama"),
        tokenizer=tiny_tokenizer(),
        image_size=32,
    )
    make_sensitive(model)
    model.config.composed_from = {
        "vision": {"id": "someone/tower", "license": "mit"},
        "text": {"id": "someone-else/language-model", "license": None},
    }
    return model, processor


@pytest.fixture(scope="session")
def whole_checkpoint(composed, tmp_path_factory):
    """Shared: not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    for part in composed:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def remote_code_checkpoint(tmp_path_factory):
    """With a language model, a tokenizer and an image processor whose code was in their own checkpoints. Not to be
    written to."""
    folder = tmp_path_factory.mktemp("remote")
    use_remote_tokenizer(write_remote_part(folder / "language_model", "old_style_lm"))
    use_remote_image_processor(write_remote_part(folder / "tower", "tower"))
    parts = anyvlm.compose(vision=folder / "tower", text=folder / "language_model", trust_remote_code=True)
    for part in parts:
        part.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def checkpoint(whole_checkpoint, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(whole_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def fresh_check():
    return FreshCheck(
        classes=MODEL_CLASSES,
        saved_again=True,
        image_tokens=((320, 240, 16), (64, 64, 16)),
        picture_effect=0.5,
        generated_tokens=(11, 12),
        generated_text="w1 w2",
        python_version="3.99.1",
        torch_version="9.1.0",
        transformers_version="8.2.0",
        seconds=1.0,
    )
