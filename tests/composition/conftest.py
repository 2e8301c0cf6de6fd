"""Parts as people keep them on disk."""

import pytest
import torch
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessorPil


@pytest.fixture(scope="module")
def saved_parts(tmp_path_factory):
    """Folders with a dinov2 and a llama as people keep them: weights, tokenizer, image processor, card."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tower = AutoModel.from_config(vision_config("dinov2"))
    tower.save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "tower"
    )
    (folder / "tower" / "README.md").write_text("---\nlicense: mit\n---\n# A tower\n")
    language_model = AutoModelForCausalLM.from_config(text_config("llama"))
    language_model.save_pretrained(folder / "lm")
    tiny_tokenizer().save_pretrained(folder / "lm")
    return folder
